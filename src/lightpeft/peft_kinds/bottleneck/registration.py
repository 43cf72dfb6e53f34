"""Makes PEFT know the bottleneck method."""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.utils import register_peft_method

from lightpeft.compat.peft import method_named, tuner_of
from lightpeft.errors import require

NAME = "BOTTLENECK"


def bottleneck_type() -> PeftType:
    """The member `PeftType.BOTTLENECK`, added to the enum by the first call."""
    return method_named(NAME)


def register(config_cls: type[Any], model_cls: type[Any]) -> None:
    """Register the method's two classes with PEFT; a second call changes nothing.

    Raises:
        LightPeftError: PEFT has another method of this name.
    """
    present = tuner_of(bottleneck_type())
    if present is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
    require(
        present in (None, model_cls),
        f"PEFT already has a method {NAME} ({getattr(present, '__module__', present)}); only one of them can be used",
    )
