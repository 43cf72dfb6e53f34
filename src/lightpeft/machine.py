"""Hardware of this run: device, processes, and precision."""

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
"""Names of bfloat16 arithmetic among the CPU capabilities of x86 and ARM."""


def accelerator() -> torch.device | None:
    """Return the accelerator of this machine; None if there is none, even if PyTorch was built for one."""
    return torch.accelerator.current_accelerator(check_available=True)


def processes() -> PartialState:
    """Return the state of the processes that `accelerate launch` or `torchrun` started; else of this process alone.

    Raises:
        LightPeftError: environment variables announce other processes that cannot be reached.
    """
    told = [name for name in _LAUNCHERS if name in os.environ]
    if not told or torch.distributed.is_initialized():
        return _make_state()
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about threads of CPUs
            return _make_state()
    except (ValueError, RuntimeError) as error:
        says = f"environment variables ({', '.join(told)}) say that this process is one of several"
        alone = f"but this process cannot reach the others ({one_line(error, 200)})"
        instead = "start all with accelerate launch or torchrun, or unset variables left over from another job"
        raise LightPeftError(f"{says}, {alone}; {instead}") from error


def sharding_launched() -> bool:
    """Return whether `accelerate launch` started this process for FSDP, which shards the weights of a model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def deepspeed_launched() -> bool:
    """Return whether `accelerate launch` started this process for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def _make_state() -> PartialState:
    return PartialState(cpu=accelerator() is None)  # by default it does not find processes that compute on CPUs


_LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables by which launchers announce a distributed run."""


def has_bf16() -> bool:
    """Return whether the accelerator, or the CPU if there is none, has bfloat16 arithmetic.

    Hardware without it computes bfloat16 in float32 and rounds, which saves no time.
    """
    device = accelerator()
    if device is not None:
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    read: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # older PyTorch has none
    return any(read().get(name, False) for name in _CPU_BF16)


def check_precision(training: TrainingConfig) -> None:
    """Refuse a precision that this machine would silently replace by another.

    Raises:
        LightPeftError: `fp16` without an accelerator, where accelerate would train in float32 instead.
    """
    require(
        training.precision != "fp16" or accelerator() is not None,
        "training.precision: fp16 needs a GPU, and this machine has none; set it to auto, bf16 or float32",
    )


def autocast_dtype(training: TrainingConfig) -> torch.dtype | None:
    """Return the half precision of a run's autocast on this machine; None: no autocast.

    float16 is used on accelerators only, because CPUs have no arithmetic for it.
    """
    if training.precision == "fp16":
        return None if accelerator() is None else torch.float16
    chosen = training.precision == "bf16" or (training.precision == "auto" and has_bf16())
    return torch.bfloat16 if chosen else None


def preserve_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores the random states of the CPU and of a device at its end."""
    apart = device.type != "cpu"
    return torch.random.fork_rng([device] if apart else [], device_type=device.type if apart else "cuda")


def autocasting(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return an autocast context for a half precision; None: autocast is off."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def compute_dtype(x: Tensor, *weights: Tensor) -> torch.dtype | None:
    """Return the data type of matrix products of these tensors, autocast considered; None: their types differ."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if all(weight.dtype == x.dtype for weight in weights) else None
