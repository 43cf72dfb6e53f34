"""PEFT: its table of methods, and what its modules know of adapters beside what they tell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING


def method_named(name: str) -> PeftType:
    """The member `name` of PEFT's enum of methods, added to it where it has none.

    PEFT registers methods of others, but only under a name that its enum has, and an enum takes no members once its
    class exists. So this writes what the enum's own machinery would have written for one more line of its class body.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        # Python 3.13 answers `value in PeftType` from a list of its own
        getattr(PeftType, "_hashable_values_", []).append(name)
    return PeftType[name]


@contextmanager
def peft_model_made_by(make: Callable[..., PeftModel], config: PeftConfig) -> Iterator[list[PeftModel]]:
    """Inside the block, whoever asks `get_peft_model` for a PeftModel with this configuration gets one of `make`.

    A trainer that loads its model by name puts the modules on right away; PEFT has no place in between.

    Args:
        make: called as `get_peft_model` is.

    Yields:
        What it has made.
    """
    made: list[PeftModel] = []
    plain = peft.get_peft_model

    def asked(model: Any, peft_config: PeftConfig, *args: Any, **options: Any) -> Any:
        if peft_config is not config:
            return plain(model, peft_config, *args, **options)
        made.append(make(model, peft_config, *args, **options))
        return made[-1]

    others = [each for name, each in sys.modules.items() if name.partition(".")[0] != __name__.partition(".")[0]]
    importers = [vars(each) for each in others if getattr(each, "__dict__", {}).get(plain.__name__) is plain]
    try:
        for names in importers:
            names[plain.__name__] = asked
        yield made
    finally:
        for names in importers:
            names[plain.__name__] = plain


def tuner_of(method: PeftType) -> type[Any] | None:
    """The class that puts a method's modules into a model; None: nobody has registered one."""
    return PEFT_TYPE_TO_TUNER_MAPPING.get(method)


def fitting_key(keys: Collection[str], name: str) -> str:
    """Which of the keys, regular expressions for the end of a module's name, PEFT takes for it; the name if none fits.

    As in `LoraConfig.rank_pattern`.
    """
    return get_pattern_key(keys, name)


def names_of_experts(model_type: str) -> frozenset[str]:
    """Last parts of target modules' names that LoRA takes for parameters of routed experts in models of this type.

    They were those of experts when each was a module. LoRA on linear layers that are still called so, of shared experts
    and of layers without experts, is therefore not to be had.
    """
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), ()))


def adapters_in(layer: BaseTunerLayer) -> list[str]:
    """Names of all adapters that a module holds, active or not."""
    return layer._all_available_adapter_names()


def forget_norms(magnitude: Any) -> None:
    """Have DoRA's module take the norms of its weights anew: they were changed under it."""
    magnitude._cache_clear()
