"""Makes PEFT know the bottleneck method. Nothing else in lightpeft touches PEFT's tables."""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from lightpeft.errors import require

NAME = "BOTTLENECK"


def bottleneck_type() -> PeftType:
    """The member `PeftType.BOTTLENECK`, added to the enum by the first call.

    PEFT registers methods of others, but only under a name that its enum has, and an enum takes no members once its
    class exists. So this writes what the enum's own machinery would have written for one more line of its class body.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        type.__setattr__(PeftType, NAME, member)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        # Python 3.13 answers `value in PeftType` from a list of its own
        getattr(PeftType, "_hashable_values_", []).append(NAME)
    return PeftType[NAME]


def register(config_cls: type[Any], model_cls: type[Any]) -> None:
    """Register the method's two classes with PEFT; a second call changes nothing.

    Raises:
        LightPeftError: PEFT has another method of this name.
    """
    present = PEFT_TYPE_TO_TUNER_MAPPING.get(bottleneck_type())
    if present is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
    require(
        present in (None, model_cls),
        f"PEFT already has a method {NAME} ({getattr(present, '__module__', present)}); only one of them can be used",
    )
