"""What this run computes on: device, processes, and precision."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from lightpeft.config import TrainingConfig
from lightpeft.errors import LightPeftError, one_line, require

_CPU_BF16 = ("avx512_bf16", "avx10_2", "amx_bf16", "bf16", "sve_bf16")
"""What x86 and ARM call bfloat16 arithmetic."""


def accelerator() -> torch.device | None:
    """The accelerator of this machine; None without one, whatever PyTorch was built for."""
    return torch.accelerator.current_accelerator(check_available=True)


def processes() -> PartialState:
    """The processes that `accelerate launch` or `torchrun` started for this run; without them, this one alone.

    Raises:
        LightPeftError: the environment tells of others, but not how to meet them: it is left over from another job.
    """
    told = [name for name in _LAUNCHERS if name in os.environ]
    if not told or torch.distributed.is_initialized():
        return _state()
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about threads of CPUs
            return _state()
    except (ValueError, RuntimeError) as error:
        says = f"the environment ({', '.join(told)}) says that this process is one of several"
        alone = f"but it cannot meet the others ({one_line(error, 200)})"
        instead = "start all with accelerate launch or torchrun, or unset what is left over from another job"
        raise LightPeftError(f"{says}, {alone}; {instead}") from error


def sharding_launched() -> bool:
    """Whether `accelerate launch` has started this process as one of several that share a model's weights (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def deepspeed_launched() -> bool:
    """Whether `accelerate launch` has started this process for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def _state() -> PartialState:
    return PartialState(cpu=accelerator() is None)  # unless it is told so, it does not see those of a CPU


_LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which launchers tell a process that it is one of several."""


def has_bf16() -> bool:
    """Whether the accelerator, or without one the CPU, has bfloat16 arithmetic.

    Where it has not, bfloat16 saves no time: it is computed in float32 and rounded.
    """
    device = accelerator()
    if device is not None:
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    read: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # older PyTorch has none
    return any(read().get(name, False) for name in _CPU_BF16)


def check_precision(training: TrainingConfig) -> None:
    """Refuse a precision that would silently be another one here.

    Raises:
        LightPeftError: training in float16 without an accelerator, where accelerate would train in float32 instead.
    """
    require(
        training.precision != "fp16" or accelerator() is not None,
        "training.precision: fp16 needs a GPU, and there is none; auto takes what this CPU is good at",
    )


def autocast_dtype(training: TrainingConfig) -> torch.dtype | None:
    """The half precision that a run computes in under autocast here; None: that of the weights.

    What was trained in float16 is computed so on an accelerator alone: CPUs have no arithmetic for it.
    """
    if training.precision == "fp16":
        return None if accelerator() is None else torch.float16
    chosen = training.precision == "bf16" or (training.precision == "auto" and has_bf16())
    return torch.bfloat16 if chosen else None


def random_apart(device: torch.device) -> AbstractContextManager[None]:
    """A context that draws no random numbers of the run's, on a device or on the CPU: it ends where it began."""
    apart = device.type != "cpu"
    return torch.random.fork_rng([device] if apart else [], device_type=device.type if apart else "cuda")


def autocasting(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """A context whose products of matrices are computed in a half precision; None: in that of what they are given."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def computed_in(x: Tensor, *weights: Tensor) -> torch.dtype | None:
    """The data type that products of these are computed in here; None where they would differ."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if all(weight.dtype == x.dtype for weight in weights) else None
