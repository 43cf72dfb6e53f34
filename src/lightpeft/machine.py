"""What this run computes on: device, processes, and precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import PartialState

from lightpeft.config import TrainingConfig
from lightpeft.errors import require

_CPU_BF16 = ("avx512_bf16", "avx10_2", "amx_bf16", "bf16", "sve_bf16")
"""What x86 and ARM call bfloat16 arithmetic."""


def accelerator() -> torch.device | None:
    """The accelerator of this machine; None without one, whatever PyTorch was built for."""
    return torch.accelerator.current_accelerator(check_available=True)


def processes() -> PartialState:
    """The processes that `accelerate launch` or `torchrun` started for this run; without them, this one alone."""
    return PartialState(cpu=accelerator() is None)  # unless it is told so, it does not see those of a CPU


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
        not training.fp16 or accelerator() is not None,
        "training.fp16 needs a GPU, and there is none; set training.bf16: auto, which takes what this CPU is good at",
    )


def autocast_dtype(training: TrainingConfig) -> torch.dtype | None:
    """The half precision that a run computes in under autocast here; None: that of the weights.

    What was trained in float16 is computed so on an accelerator alone: CPUs have no arithmetic for it.
    """
    if training.fp16:
        return None if accelerator() is None else torch.float16
    chosen = has_bf16() if training.bf16 == "auto" else training.bf16
    return torch.bfloat16 if chosen else None


def autocasting(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """A context whose products of matrices are computed in a half precision; None: in that of what they are given."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
