"""PEFT: classes of its modules, its tables, and its rules for module names."""

from __future__ import annotations

from types import MethodType
from typing import Any

import peft
from peft import PeftModel

from lightpeft.compat.missing import missing, needed_for
from lightpeft.errors import require

# Classes of modules


def _is_module_of_peft(module: Any) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "active_adapters")


def _has_lora(module: Any) -> bool:
    return _is_module_of_peft(module) and hasattr(module, "lora_A")


def _is_trained_whole(module: Any) -> bool:
    return hasattr(module, "modules_to_save") and hasattr(module, "original_module")


try:
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as _error:
    BaseTunerLayer = missing("This PEFT kind", _error, _is_module_of_peft)
try:
    from peft.tuners.tuners_utils import BaseTuner
except ImportError as _error:
    BaseTuner = missing("PEFT by bottleneck adapters", _error)
try:
    from peft.tuners.lora import LoraLayer
except ImportError as _error:
    LoraLayer = missing("This LoRA", _error, _has_lora)
try:
    from peft.tuners.lora import Linear as LoraLinear
except ImportError as _error:
    LoraLinear = missing("LoRA computed in one step", _error)
try:
    from peft.tuners.lora import ParamWrapper
except ImportError as _error:
    ParamWrapper = missing("LoRA on routed experts", _error)
try:
    from peft.tuners.ia3 import IA3Layer
except ImportError as _error:
    IA3Layer = missing("PEFT by IA3", _error)
try:
    from peft.utils import ModulesToSaveWrapper
except ImportError as _error:
    ModulesToSaveWrapper = missing("A head that PEFT trains", _error, _is_trained_whole)

NO_TARGETS = "dummy-target-modules"
"""PEFT's `target_modules` of an adapter without modules; with an empty list, PEFT refuses to load it."""

__all__ = [
    "NO_TARGETS",
    "BaseTuner",
    "BaseTunerLayer",
    "IA3Layer",
    "LoraLayer",
    "LoraLinear",
    "ModulesToSaveWrapper",
    "ParamWrapper",
    "adapters_in",
    "call_with_hooks",
    "check_saves_other_types",
    "forget_norms",
    "names_of_experts",
    "register_prefix",
]


def adapters_in(layer: Any) -> list[str]:
    """Return the names of all adapters that a module holds, active or not."""
    held: list[Any] = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    return sorted({key for each in held if hasattr(each, "keys") for key in each})


def forget_norms(magnitude: Any) -> None:
    """Clear the cached weight norms of a DoRA module, after its weights have changed; PEFT caches them from 0.19 on."""
    forget = getattr(magnitude, "_cache_clear", None)
    if forget is not None:
        forget()


_PAST_HOOKS = tuple(int(part) for part in peft.__version__.split(".")[:2]) < (0, 21)
"""True if PEFT calls the method `forward` of the adapted model, which skips the model's hooks."""


def call_with_hooks(model: PeftModel) -> None:
    """Make a PeftModel call the model inside it with its hooks, as PEFT does from 0.21 on."""
    tuner = model.base_model
    if _PAST_HOOKS and isinstance(tuner, BaseTuner):
        vars(tuner)["forward"] = MethodType(_with_hooks, tuner)


def _with_hooks(tuner: Any, *args: Any, **options: Any) -> Any:
    return tuner.model(*args, **options)


def check_saves_other_types() -> None:
    """Refuse PEFT before 0.21, which trains registered PEFT methods but fails to save them.

    Raises:
        LightPeftError: PEFT is older than 0.21.
    """
    saves = hasattr(BaseTuner, "_remove_adapter_name_from_key")
    require(saves, f"bottleneck adapters need peft 0.21 or newer, and {peft.__version__} is installed; upgrade peft")


# Tables


def register_prefix(method: str, prefix: str) -> None:
    """Register the prefix of a method's weight names with PEFT.

    Raises:
        LightPeftError: this release of PEFT has no table of prefixes.
    """
    with needed_for("PEFT by bottleneck adapters"):
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        PEFT_TYPE_TO_PREFIX_MAPPING[method] = prefix


def names_of_experts(model_type: str) -> frozenset[str]:
    """Return the last parts of target module names that LoRA treats as parameters of routed experts in this model type.

    They are the names that experts had when each was a module. Linear layers that still have such names, in shared
    experts and in layers without experts, therefore cannot get LoRA. The set is empty for PEFT before 0.19.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion

        pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
        return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))
    except (ImportError, AttributeError):
        return frozenset()
