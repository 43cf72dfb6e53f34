"""A model that does not fit: peak memory of one process that estimates, cuts and trains it, by stage.

    python benchmarks/on_disk.py
    python benchmarks/on_disk.py --blocks 0.4 --batch 2 --length 128 --ways "weights on disk"

A Llama-shaped model with random bfloat16 weights, 1.1 billion of them (the shape of TinyLlama: 22 blocks, hidden size
2048, 32,000 tokens), which is written shard by shard and never held as a whole. `LightTrainer` takes it through all of
Light-PEFT with LoRA on all projections, bfloat16 autocast and gradient checkpointing: with the weights of the blocks
on disk (`weights_on_disk`), loaded as usual, and in 4 bits (NF4, extra `quantised`). Each in a process of its own.
Peaks are of resident memory, pages of files included, above what the process had when it had imported everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from publishing import markdown_table, report
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from lightpeft.app.cli.command import quiet
from lightpeft.app.runs.workers import Worker
from lightpeft.config import LightConfig
from lightpeft.errors import require
from lightpeft.models.on_disk import weights_on_disk
from lightpeft.plans.records import PrunePlan
from lightpeft.profiling import PeakMemory
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.trainer import LightTrainer

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    },
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
"""All parameters -> TinyLlama's shape, and a small one to try the script with. Head and embeddings are not tied."""
ON_DISK, IN_MEMORY, IN_4_BITS = "weights on disk", "loaded as usual", "in 4 bits"
WAYS = (ON_DISK, IN_MEMORY, IN_4_BITS)
STAGES = ("loading", "estimation", "cut", "training")
SHARD = 2**28
"""Bytes of a file of the base."""


@dataclass(frozen=True)
class Case:
    """What is trained, and for how long."""

    size: str
    blocks: float
    """Part of the blocks' parameters that goes."""
    batch: int
    length: int
    estimation: int
    """Steps."""
    training: int
    """Steps behind the cut."""


def config_of(case: Case) -> LlamaConfig:
    """The model's configuration."""
    return LlamaConfig(
        **SHAPES[case.size], max_position_embeddings=case.length, tie_word_embeddings=False, use_cache=False
    )


def write_base(case: Case, folder: Path) -> int:
    """Write a random base as transformers would save it, with one shard in memory at a time; its parameters."""
    config = config_of(case)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator, places = torch.Generator().manual_seed(0), dict[str, str]()
    for number, names in enumerate(_shards(shapes)):
        file = f"model-{number:05d}.safetensors"
        save_file({name: _random(shapes[name], generator) for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    return total


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    names, size = list[str](), 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Weights as a fresh model has them: norms of 1, matrices of small numbers."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)


class Stages:
    """Seconds and peak memory of one stage after the other."""

    def __init__(self) -> None:
        self._clock = PeakMemory(nn.Linear(1, 1))
        self.found: dict[str, dict[str, Any]] = {}
        with self._clock:
            self.imports = self._clock.before

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done inside is this stage."""
        started = time.perf_counter()
        with self._clock:
            yield
        seconds = time.perf_counter() - started
        peak = self._clock.peak - self.imports
        self.found[name] = {"seconds": seconds, "peak_bytes": peak, "method": self._clock.method}


class Process:
    """What is measured, in a process that has imported everything and loaded nothing."""

    def __init__(self, case: Case, folder: Path, what: str) -> None:
        self.case, self.folder, self.what = case, folder, what

    def run(self) -> dict[str, Any]:
        """Seconds and bytes at most of every stage, and what the weights take before and after the cut."""
        stages = Stages()
        with stages.stage("loading"):
            model = self._load()
            dense = _bytes_of(model)
            set_seed(0)
            trainer = self._trainer(model, stages)
        del model
        trainer.train_in_stages()
        light = _bytes_of(trainer.model)
        return {
            "imports_bytes": stages.imports,
            "weights_bytes": {"before": dense, "after": light},
            "loss": trainer.state.log_history[-1]["train_loss"],
            "stages": {name: stages.found[name] for name in STAGES},
        }

    def _load(self) -> nn.Module:
        options: dict[str, Any] = {}
        if self.what == IN_4_BITS:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        with weights_on_disk() if self.what == ON_DISK else nullcontext():
            return LlamaForCausalLM.from_pretrained(self.folder, dtype="auto", **options)

    def _trainer(self, model: nn.Module, stages: Stages) -> _InStages:
        case, steps = self.case, self.case.estimation + self.case.training
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trained"),
            max_steps=steps,
            per_device_train_batch_size=case.batch,
            learning_rate=1e-4,
            bf16=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            dataloader_pin_memory=False,
        )
        light = LightConfig(blocks=case.blocks, length=case.estimation, least_examples=0)
        lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
        return _InStages(
            model,
            arguments,
            stages=stages,
            light=light,
            peft_config=lora,
            train_dataset=rows(case),
            data_collator=default_data_collator,
        )


class _InStages(LightTrainer):
    """`LightTrainer`, with a clock that is read at the cut."""

    def __init__(self, *args: Any, stages: Stages, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stages = stages

    def train_in_stages(self) -> None:
        """All of training: estimation up to the plan, the cut, and what follows."""
        self._stage = self._stages.stage("estimation")
        self._stage.__enter__()
        self.train()
        self._stage.__exit__(None, None, None)

    def prune_light_model(self, plan: PrunePlan) -> LightModel:
        """The cut, with the clock of estimation stopped before and that of training started afterwards."""
        self._stage.__exit__(None, None, None)
        with self._stages.stage("cut"):
            light = super().prune_light_model(plan)
        self._stage = self._stages.stage("training")
        self._stage.__enter__()
        return light


def rows(case: Case) -> list[dict[str, Tensor]]:
    """Random tokens, all of which the loss counts."""
    generator = torch.Generator().manual_seed(0)
    count, vocabulary = case.batch * (case.estimation + case.training), SHAPES[case.size]["vocab_size"]
    ids = torch.randint(3, vocabulary, (count, case.length), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def _bytes_of(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def measure(cases: Sequence[Case], ways: Sequence[str]) -> dict[str, Any]:
    """Write the base, and take it through all stages, for every cut in every way, one after the other.

    Args:
        cases: of the same base.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_base(cases[0], Path(folder))
        for case, way in itertools.product(cases, ways):
            with Worker(Process, case, Path(folder), way) as worker:
                found[f"{way}, {case.blocks:.0%} cut"] = {"case": asdict(case), **worker.measure("run")}
    return {"shape": SHAPES[cases[0].size], "parameters": parameters, "results": found}


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row an arm: seconds and MiB of every stage, and the loss that all of them come to."""
    lines = []
    for name, found in results.items():
        cells = [f"{each['seconds']:,.0f} s, {each['peak_bytes'] / 2**20:,.0f}" for each in found["stages"].values()]
        lines.append([name, *cells, f"{found['loss']:.6f}"])
    return markdown_table(("", *STAGES, "loss"), lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="on_disk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="1.1B")
    parser.add_argument("--blocks", type=float, nargs="+", default=[0.6], help="parts of the blocks' parameters to cut")
    parser.add_argument("--batch", type=int, default=2, help="rows a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--estimation", type=int, default=2, help="steps of estimation")
    parser.add_argument("--training", type=int, default=2, help="steps behind the cut")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--out", type=Path, help="where the numbers go")
    options = parser.parse_args(arguments)
    quiet()

    def found() -> dict[str, Any]:
        sizes = (options.batch, options.length, options.estimation, options.training)
        require(min(sizes) >= 1, "--batch, --length, --estimation and --training start at 1")
        return measure([Case(options.size, blocks, *sizes) for blocks in options.blocks], options.ways)

    return report("on_disk", arguments, options.out, found, markdown)


if __name__ == "__main__":
    sys.exit(main())
