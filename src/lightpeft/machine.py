"""What this run computes on: device, processes, and precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import PartialState

from lightpeft.config import TrainingConfig

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


def in_bf16(training: TrainingConfig) -> bool:
    """Whether a run computes under bfloat16 autocast here."""
    return has_bf16() if training.bf16 == "auto" else training.bf16
