"""What a live model costs (parameters, FLOPs, seconds a step, peak memory), and comparisons on a noisy machine.

Nothing here knows about pruning. The functions take a bare transformers model, a PeftModel, or either after surgery,
and return plain numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from lightpeft.errors import require
from lightpeft.machine import has_bf16
from lightpeft.quantised import logical_numel
from lightpeft.tasks.tokens import without_labels

Batch = Mapping[str, Tensor]
"""Keyword arguments of the model's forward; with `labels` wherever a loss is needed."""
OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimizer of the parameters to train."""
MemoryMethod = Literal["cuda", "VmHWM", "sampling"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_TOLERANCE = 64 * 2**20
_SAMPLING_SECONDS = 0.002


# Parameters


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of scalar parameters; tied weights count once."""

    base: int
    """Foundation model: neither PEFT weights nor the copies that PEFT trains in place of a module."""
    peft: int
    """PEFT weights, of all adapters, whether they require a gradient or not."""
    head: int
    """Full modules saved with the adapter (`modules_to_save`, such as a classifier). Each is a copy of a module that
    `base` already counts."""
    trainable: int
    """Parameters of any kind that require a gradient."""

    @property
    def total(self) -> int:
        """Parameters of the model with its adapters: base + peft (a saved module stands in for its original)."""
        return self.base + self.peft


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a bare transformers model or a PeftModel, pruned or not."""
    head = {id(p) for wrapper in _of_type(model, ModulesToSaveWrapper) for p in wrapper.modules_to_save.parameters()}
    peft = {id(p) for layer in _of_type(model, BaseTunerLayer) for p in _adapter_weights(layer)} - head
    sizes = {id(p): logical_numel(p) for p in model.parameters()}
    return ParameterCount(
        base=sum(size for key, size in sizes.items() if key not in head | peft),
        peft=sum(sizes[key] for key in peft),
        head=sum(sizes[key] for key in head),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _of_type(model: nn.Module, cls: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, cls)]


def _adapter_weights(layer: Any) -> list[nn.Parameter]:
    """Parameters that a tuner layer holds besides those of the layer it wraps."""
    wrapped = {id(p) for p in layer.get_base_layer().parameters()}
    return [p for p in layer.parameters() if id(p) not in wrapped]


# FLOPs


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one batch; a multiply-add is 2."""

    forward: int
    """Forward pass, as in inference."""
    training: int | None
    """Forward and backward pass; None where no parameter requires a gradient."""

    @property
    def backward(self) -> int | None:
        """Backward pass alone."""
        return None if self.training is None else self.training - self.forward


def count_flops(model: nn.Module, batch: Batch) -> Flops:
    """Count the matrix products of one real forward and one real forward and backward pass over `batch`.

    PyTorch's `FlopCounterMode` does the counting, so frozen weights cost no weight-gradient product and padding counts
    as tokens do. It does not know the fused attention kernel of the CPU and counts a recomputation in those of CUDA;
    attention therefore runs unfused here, with full (not halved) score matrices under a causal mask. Thus the numbers
    depend neither on the device nor on the attention backend. Recomputation under gradient checkpointing is counted.
    Weights, gradients, mode and random state are left as they were.

    Raises:
        LightPeftError: parameters require a gradient, but the batch brings no loss.
    """
    batch = _to(batch, _device(model))
    with _countable_attention(model):
        with _mode(model, training=False), torch.no_grad(), _flop_counter() as counter:
            model(**batch)
        forward = counter.get_total_flops()
        if not _trainable(model):
            return Flops(forward, None)
        counter = _flop_counter()
        with _mode(model, training=True), _kept_gradients(model), _kept_random_state(model), counter:
            torch.autograd.backward(_loss(model, batch))
        return Flops(forward, counter.get_total_flops())


def _flop_counter() -> FlopCounterMode:
    """Counts what is added in place too (fused LoRA layers do), which PyTorch leaves out."""

    def addmm_(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})


def kv_cache_bytes(model: nn.Module, batch: Batch) -> float | None:
    """Bytes of keys and values that generation keeps for a token, over all layers; None without a KV cache.

    A layer that lost its attention still counts tokens, with one channel of zeros.
    """
    batch = _to(without_labels(batch), _device(model))
    with _mode(model, training=False), torch.no_grad():
        cache = getattr(model(**batch), "past_key_values", None)
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if not layers:
        return None
    kept = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))
    rows, _, tokens, _ = layers[0].keys.shape
    return kept / (rows * tokens)


@contextlib.contextmanager
def _countable_attention(model: nn.Module) -> Iterator[None]:
    """Attention as plain matrix products; backends beside eager and SDPA are switched to SDPA meanwhile."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    backend = getattr(getattr(base, "config", None), "_attn_implementation", None)
    switch = backend not in (None, "eager", "sdpa")
    if switch:
        base.set_attn_implementation("sdpa")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if switch:
            base.set_attn_implementation(backend)


@contextlib.contextmanager
def _kept_gradients(model: nn.Module) -> Iterator[None]:
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _kept_random_state(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    device = _device(model)
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


# Memory


class PeakMemory:
    """Context manager: the most memory in use inside the block, in bytes.

    On CUDA what the allocator handed out on the model's (first) device, weights included; elsewhere the resident memory
    of the process beyond that at entry. Blocks cannot be nested, since each resets the high-water mark. Resident memory
    depends on what the process did before; for a comparison of models run each in a process of its own.

        with PeakMemory(model) as memory:
            train(model)
        memory.bytes
    """

    method: MemoryMethod
    """How it was read: "cuda" allocator statistics, "VmHWM" the kernel's high-water mark, or "sampling" by a thread
    (which can miss a short peak)."""
    before: int
    """Bytes in use at entry."""
    peak: int
    """Most bytes in use inside the block, those at entry included."""

    def __init__(self, model: nn.Module) -> None:
        self._device = _device(model)
        self._sampler: _Sampler | None = None
        self.method = "cuda" if self._device.type == "cuda" else "VmHWM"
        self.before = self.peak = 0

    @property
    def bytes(self) -> int:
        """The result: the peak itself on CUDA, the peak above the value at entry elsewhere; 0 before the block ends."""
        return self.peak if self.method == "cuda" else max(0, self.peak - self.before)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.method == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self.before = torch.cuda.memory_allocated(self._device)
            return self
        _trim_heap()
        self.method = "VmHWM" if _reset_high_water() else "sampling"
        self.before = _resident()
        if self.method == "sampling":
            self._sampler = _Sampler()
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._sampler is not None:
            self.peak = self._sampler.stop()
            self._sampler = None
        elif self.method == "cuda":
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self.peak = _high_water()


class _Sampler(threading.Thread):
    """Reads resident memory every few milliseconds and keeps the largest value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._peak = _resident()

    def run(self) -> None:
        while not self._done.wait(_SAMPLING_SECONDS):
            self._peak = max(self._peak, _resident())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self._peak, _resident())


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _high_water() -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def _reset_high_water() -> bool:
    """Set the kernel's high-water mark to the current value (proc_pid_clear_refs(5)); False where it does not obey."""
    try:
        # opened without creation: elsewhere than on Linux the file must not come into being.
        with _CLEAR_REFS.open("r+b", buffering=0) as file:
            file.write(b"5")
        return _high_water() <= _resident() + _RESET_TOLERANCE
    except (OSError, KeyError, ValueError):
        return False


def _trim_heap() -> None:
    """Give freed heap memory back to the system, so that the next block does not use it unseen (glibc only)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


# Time


def measure_training(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer_factory: OptimizerFactory = AdamW,
    *,
    steps: int | None = None,
    warmup: int = 2,
    bf16: bool = False,
    max_grad_norm: float = 1.0,
) -> list[float]:
    """Seconds of each training step: copy to the device, forward, backward, clipping, optimizer step.

    The model really trains: its trainable weights change, and gradients are gone afterwards.

    Args:
        batches: model inputs with `labels`; the timed steps start at the first and go round.
        optimizer_factory: makes the optimizer of the list of trainable parameters.
        steps: timed steps; unset: one pass over `batches`.
        warmup: steps before those, not timed; the first one allocates the optimizer's state.
        bf16: bfloat16 autocast in the forward pass.
        max_grad_norm: gradient norm clipping; 0 switches it off.

    Raises:
        LightPeftError: no batches, no trainable parameters, no loss, or counts out of range.
    """
    parameters = _trainable(model)
    require(parameters, "nothing to train: no parameter of the model requires a gradient")
    optimizer = optimizer_factory(parameters)
    device = _device(model)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = _loss(model, _to(batch, device))
        torch.autograd.backward(loss)
        if max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with _mode(model, training=True):
        return _timed(step, batches, steps, warmup, device)


def measure_inference(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int | None = None,
    warmup: int = 2,
    bf16: bool = False,
) -> list[float]:
    """Seconds of each forward pass in eval mode without gradients; labels are left out, so no loss is computed.

    Args: as in `measure_training`.

    Raises:
        LightPeftError: no batches, or counts out of range.
    """
    device = _device(model)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            model(**_to(without_labels(batch), device))

    with _mode(model, training=False), torch.no_grad():
        return _timed(step, batches, steps, warmup, device)


def _timed(
    step: Callable[[Batch], None], batches: Sequence[Batch], steps: int | None, warmup: int, device: torch.device
) -> list[float]:
    steps = len(batches) if steps is None else steps
    require(len(batches) > 0, "no batches to measure with; give at least one")
    require(steps >= 1, f"steps is {steps}; measure at least 1")
    require(warmup >= 0, f"warmup is {warmup}; it cannot be negative")
    for batch in islice(cycle(batches), warmup):
        step(batch)
    marks = [_mark(device)]
    for batch in islice(cycle(batches), steps):
        step(batch)
        marks.append(_mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]
    return [end - start for start, end in pairwise(marks)]


def _mark(device: torch.device) -> Any:
    """A moment: an event in the stream on CUDA, where the host runs ahead of the device, and the clock elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return event


def throughput(samples: float, seconds: float) -> float:
    """Samples (or tokens) a second.

    Raises:
        LightPeftError: `seconds` is not positive.
    """
    require(seconds > 0, f"seconds is {seconds:g}; throughput needs a positive time")
    return samples / seconds


# Comparison


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample, in the unit of its values."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    n: int
    """Number of values."""


def summarize(values: Iterable[float]) -> Spread:
    """Median and quartiles (linear interpolation) of at least one value.

    Raises:
        LightPeftError: no values.
    """
    array = np.fromiter(values, dtype=float)
    require(array.size > 0, "no values to summarize; measure at least once")
    low, median, high = (float(value) for value in np.percentile(array, (25, 50, 75)))
    return Spread(median=median, low=low, high=high, n=array.size)


def alternate(subjects: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every subject once a round, in turn: its values by name, one a round.

    Every other round goes backwards, so that a drift of the machine falls on all subjects alike.

    Raises:
        LightPeftError: no subjects, or `rounds` below 1.
    """
    require(subjects, "no subjects to measure; name at least one")
    require(rounds >= 1, f"rounds is {rounds}; measure at least 1")
    values: dict[str, list[float]] = {name: [] for name in subjects}
    for index in range(rounds):
        for name in list(subjects)[:: -1 if index % 2 else 1]:
            values[name].append(subjects[name]())
    return values


def ratio(a: Sequence[float], b: Sequence[float]) -> Spread:
    """Spread of `a[i] / b[i]` over paired rounds, as `alternate` returns them.

    Raises:
        LightPeftError: different lengths, no values, or a zero in `b`.
    """
    require(len(a) == len(b), f"{len(a)} and {len(b)} values cannot be paired; measure both in the same rounds")
    require(all(b), "a ratio to 0 is not defined; the second series holds a 0")
    return summarize(x / y for x, y in zip(a, b, strict=True))


# Surroundings


def hardware() -> dict[str, str | int | None]:
    """The machine and the software that numbers were measured with, as plain data for a report."""
    return {
        "cpu": _cpu_name(),
        "logical_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": has_bf16(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        **versions(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of lightpeft and of what its results depend on; "0+unknown" for a source tree that is not installed."""
    return {name: _version(name) for name in ("torch", "transformers", "peft", "lightpeft")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def folder_bytes(path: str | Path) -> int:
    """Sizes of all files under a folder, in bytes.

    Raises:
        LightPeftError: `path` is not a folder.
    """
    path = Path(path)
    require(path.is_dir(), f"{path} is not a folder; give the folder whose size is wanted")
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# The live model


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _to(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    require(loss is not None, "the model returned no loss; give batches with labels")
    assert isinstance(loss, Tensor)
    return loss


@contextlib.contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode inside the block, every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
