"""PEFT: classes that its modules are of, its tables, and what it does with names of modules."""

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
"""PEFT's word for an adapter without modules on layers; without it, PEFT refuses to load one."""

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
    "check_saves_other_types",
    "forget_norms",
    "let_hooks_see",
    "names_of_experts",
    "register_prefix",
]


def adapters_in(layer: Any) -> list[str]:
    """Names of all adapters that a module holds, active or not."""
    held: list[Any] = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    return sorted({key for each in held if hasattr(each, "keys") for key in each})


def forget_norms(magnitude: Any) -> None:
    """Have DoRA's module take the norms of its weights anew: they were changed under it.

    PEFT keeps them from 0.19 on.
    """
    forget = getattr(magnitude, "_cache_clear", None)
    if forget is not None:
        forget()


_PAST_HOOKS = tuple(int(part) for part in peft.__version__.split(".")[:2]) < (0, 21)
"""Whether PEFT calls the method `forward` of the model that it adapts, and not the model with its hooks."""


def let_hooks_see(model: PeftModel) -> None:
    """Let PEFT call the model inside a PeftModel with its hooks, as it does from 0.21 on."""
    tuner = model.base_model
    if _PAST_HOOKS and isinstance(tuner, BaseTuner):
        vars(tuner)["forward"] = MethodType(_with_hooks, tuner)


def _with_hooks(tuner: Any, *args: Any, **options: Any) -> Any:
    return tuner.model(*args, **options)


def check_saves_other_types() -> None:
    """PEFT before 0.21 trains types that are not its own, and fails where it saves them.

    Raises:
        LightPeftError: such a release is here.
    """
    saves = hasattr(BaseTuner, "_remove_adapter_name_from_key")
    require(saves, f"PEFT by bottleneck adapters needs peft 0.21 or newer; here is {peft.__version__}")


# Tables


def register_prefix(method: str, prefix: str) -> None:
    """Let PEFT know how names of a method's weights begin.

    Raises:
        LightPeftError: it has no table of these.
    """
    with needed_for("PEFT by bottleneck adapters"):
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        PEFT_TYPE_TO_PREFIX_MAPPING[method] = prefix


def names_of_experts(model_type: str) -> frozenset[str]:
    """Last parts of target modules' names that LoRA takes for parameters of routed experts in models of this type.

    They were those of experts when each was a module. LoRA on linear layers that are still called so, of shared experts
    and of layers without experts, is therefore not to be had. PEFT before 0.19 takes none.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion

        pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
        return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))
    except (ImportError, AttributeError):
        return frozenset()
