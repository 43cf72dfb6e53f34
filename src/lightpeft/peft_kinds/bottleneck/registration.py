"""Registration of the bottleneck method in PEFT's tables."""

from __future__ import annotations

from enum import Enum
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from lightpeft.errors import require


class BottleneckType(str, Enum):  # noqa: UP042 (as PEFT's own)
    """PEFT type beside those of `PeftType`, which cannot be extended; PEFT's tables find it by its text."""

    BOTTLENECK = "BOTTLENECK"


BOTTLENECK = BottleneckType.BOTTLENECK
PREFIX = "bottleneck_"
"""Prefix of the names of its weights."""


def register(config_cls: type[Any], model_cls: type[Any]) -> None:
    """Register the method's two classes with PEFT; a second call changes nothing.

    Raises:
        LightPeftError: PEFT has another method of this name.
    """
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    configs: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    present = tuners.setdefault(BOTTLENECK, model_cls)
    other = getattr(present, "__module__", present)
    require(
        present is model_cls,
        f"PEFT already has a method {BOTTLENECK.value} ({other}); uninstall the package that registers it",
    )
    configs[BOTTLENECK] = config_cls
