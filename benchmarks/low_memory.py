"""Training what does not fit: peak memory of a process from loading to the last of a few steps.

    python benchmarks/low_memory.py
    python benchmarks/low_memory.py --size 1B --batch 4 --length 128

A Llama-shaped model with random bfloat16 weights, saved in shards of a gigabyte: the dense model with plain LoRA on q
and v, and light models (LoRA on all projections) whose base is read whole and then cut, or read straight into the cut
layers, as `lightpeft train` does. Each in a process of its own; what its imports take is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from publishing import markdown_table, report
from scaling import SIZES, shape_of
from synthetic import Case, random_batches, random_model, with_lora
from torch import nn
from transformers import AutoModelForCausalLM

from lightpeft.adapters.light_adapter import load_light
from lightpeft.app.cli.command import quiet
from lightpeft.app.runs.workers import Worker
from lightpeft.config import LightConfig
from lightpeft.errors import require
from lightpeft.profiling import PeakMemory, measure_training
from lightpeft.recipe.pruner import EarlyPruner
from lightpeft.training.acceleration import accelerated

PLAIN, WHOLE, STREAMED = "dense, plain LoRA", "light, base read whole", "light, read into the cut layers"
CUTS = (0.4, 0.6)
STEPS = 2


def budget(part: float) -> LightConfig:
    """This part of the heads and of the neurons of every layer, by chance, which takes no training."""
    return LightConfig(
        heads=part,
        neurons=part,
        neurons_scope="layerwise",
        modules=0.0,
        ranks=0.0,
        head_criterion="random",
        neuron_criterion="random",
        length=2,
        least_examples=0,
    )


def prepare(case: Case, folder: Path) -> None:
    """Write the base, and a light adapter for each cut."""
    random_model(case).save_pretrained(folder / "base", max_shard_size="1GB")
    short = replace(case, batch_size=1, length=8, steps=1)
    for part in CUTS:
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
        pruner = EarlyPruner(with_lora(base), budget(part))
        pruner.start(100)
        while not pruner.finished:
            pruner.model(**random_batches(short)[0]).loss.backward()
            pruner.step()
            pruner.model.zero_grad()
        pruner.prune().save_pretrained(folder / f"{part:.0%}")


class Process:
    """What is measured, in a process that has imported everything and loaded nothing."""

    def __init__(self, case: Case, folder: Path, what: str, part: float | None) -> None:
        self.case, self.folder, self.what, self.part = case, folder, what, part

    def peak(self) -> dict[str, Any]:
        """Bytes at most, from loading to the last step, and what the weights take of them."""
        with PeakMemory(nn.Linear(1, 1)) as memory:
            model: Any = self._load()
            autocast = torch.bfloat16
            context = ExitStack()
            if self.part is not None:
                context.enter_context(accelerated(model, dropout=0.0, loss_alone=True))
            with context:
                batches = random_batches(self.case)[:STEPS]
                measure_training(
                    model, batches, lambda ps: torch.optim.AdamW(ps, lr=1e-4), steps=STEPS, warmup=0, autocast=autocast
                )
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        return {"peak_bytes": memory.bytes, "weights_bytes": weights, "method": memory.method}

    def _load(self) -> nn.Module:
        if self.part is None:
            return with_lora(AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype="auto"), ("q", "v"))
        adapter = self.folder / f"{self.part:.0%}"
        return load_light(adapter, is_trainable=True, low_memory=self.what == STREAMED)


def measure(case: Case) -> dict[str, dict[str, Any]]:
    """All arms, one after another."""
    arms: dict[str, tuple[str, float | None]] = {PLAIN: (PLAIN, None)}
    arms |= {f"{part:.0%} cut: {what}": (what, part) for part in CUTS for what in (WHOLE, STREAMED)}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(case, Path(folder))
        for name, arm in arms.items():
            with Worker(Process, case, Path(folder), *arm) as worker:
                found[name] = worker.measure("peak")
    return found


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row an arm."""
    first = results[PLAIN]["peak_bytes"]
    rows = []
    for name, each in results.items():
        weights, peak = each["weights_bytes"] / 2**20, each["peak_bytes"] / 2**20
        rows.append([name, f"{weights:,.0f}", f"{peak:,.0f}", f"{each['peak_bytes'] / first:.2f}"])
    return markdown_table(("", "weights, MiB", "peak, MiB", "of plain LoRA's"), rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="low_memory", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1B")
    parser.add_argument("--batch", type=int, default=4, help="rows a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--out", type=Path, help="where the numbers go")
    options = parser.parse_args(arguments)
    quiet()

    def found() -> dict[str, Any]:
        require(min(options.batch, options.length) >= 1, "--batch and --length start at 1")
        shape = shape_of("llama", options.size)
        case = Case(shape, options.batch, options.length, STEPS, budget(CUTS[0]), bf16=True)
        sizes = {"size": options.size, "batch": options.batch, "length": options.length}
        return {**sizes, "results": measure(case)}

    return report("low_memory", arguments, options.out, found, markdown)


if __name__ == "__main__":
    sys.exit(main())
