"""Training a decoder that is not cut: lightpeft's steps beside PEFT's and TRL's, on the same rows and one machine.

    python benchmarks/sft.py configs/gsm8k/smollm2_gsm8k.yaml

Each trainer runs `train()` in a process of its own, on the same batches in the same order, in alternation. Memory is
the peak beside the loaded weights. Seconds are those of the processor, so that other programs on the machine count
less. Paths inside the config are relative to the current folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from publishing import check_counts, markdown_table, report, say
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from lightpeft import LightTrainer, accelerated, light_trainer
from lightpeft.app.runs.subject import sample_rows
from lightpeft.app.runs.workspace import Workspace, prepare
from lightpeft.config import RunConfig, load_config
from lightpeft.machine import autocast_dtype
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.plans.structure import SLOTS
from lightpeft.profiling.comparing import alternate, summarize
from lightpeft.profiling.memory import PeakMemory
from lightpeft.training.logits import labeled_head

WARMUP = 8
"""Tokens of the rows in the first batch, which is not measured."""
Around = Callable[[PeftModel], AbstractContextManager[None]]
"""Makes the context around `train()`."""


class Arm:
    """A trainer, the modules that it trains, and what is around its `train()`."""

    def __init__(
        self,
        trainer: Any,
        *,
        everywhere: bool = True,
        packed: bool = False,
        around: Around = lambda _: nullcontext(),
        **settings: Any,
    ) -> None:
        """
        Args:
            trainer: class of the trainer.
            everywhere: True for LoRA on all projections, False on q and v.
            packed: True for a batch as one sequence without padding, whose rows transformers keeps apart.
            settings: of its arguments, beside what all arms have.
        """
        self.trainer, self.everywhere, self.packed = trainer, everywhere, packed
        self.around, self.settings = around, settings


LIGHT = "LightTrainer"
ARMS: dict[str, Arm] = {
    LIGHT: Arm(LightTrainer),
    "LightTrainer, rows packed": Arm(LightTrainer, packed=True),
    "light_trainer(SFTTrainer), without gradient checkpointing": Arm(
        light_trainer(SFTTrainer), gradient_checkpointing=False
    ),
    "light_trainer(SFTTrainer), TRL's defaults": Arm(light_trainer(SFTTrainer)),
    "SFTTrainer inside accelerated, without gradient checkpointing": Arm(
        SFTTrainer, around=accelerated, gradient_checkpointing=False
    ),
    "SFTTrainer, TRL's defaults": Arm(SFTTrainer),
    "SFTTrainer, without gradient checkpointing": Arm(SFTTrainer, gradient_checkpointing=False),
    "SFTTrainer, padding_free": Arm(SFTTrainer, padding_free=True, max_length=None),
    "Trainer, LoRA on all projections": Arm(Trainer),
    "Trainer, LoRA on all projections, chunked head": Arm(Trainer, around=labeled_head),
    "Trainer, LoRA on q and v": Arm(Trainer, everywhere=False),
    "Trainer, LoRA on q and v, chunked head": Arm(Trainer, everywhere=False, around=labeled_head),
}
"""By name: what is measured; none of it is cut."""


class Clock(TrainerCallback):
    """Notes the seconds of each step, of the processor and by the clock on the wall."""

    def __init__(self) -> None:
        self.processor: list[float] = []
        self.wall: list[float] = []

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        self._started = time.process_time(), time.perf_counter()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        self.processor.append(time.process_time() - self._started[0])
        self.wall.append(time.perf_counter() - self._started[1])


def trainer_of(arm: Arm, work: Workspace, model: PeftModel, rows: Dataset, clock: Clock, folder: str) -> Any:
    """The trainer of an arm, over a model with PEFT modules."""
    config = work.config
    settings = {
        "output_dir": folder,
        "max_steps": len(rows) // config.training.batch_size,
        "per_device_train_batch_size": config.training.batch_size,
        "learning_rate": work.rate,
        "bf16": autocast_dtype(config.training) is torch.bfloat16,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "seed": config.seed,
        **arm.settings,
    }
    options: dict[str, Any] = {"train_dataset": rows, "processing_class": work.tokenizer, "callbacks": [clock]}
    if issubclass(arm.trainer, SFTTrainer):
        arguments: Any = SFTConfig(**{"max_length": config.data.max_length, **settings})
    else:
        arguments = TrainingArguments(**settings)
        padded = DataCollatorForSeq2Seq(work.tokenizer)
        options["data_collator"] = DataCollatorWithFlattening() if arm.packed else padded
    if arm.trainer.__name__.startswith("Light"):
        options["light"] = 0
    return arm.trainer(model=model, args=arguments, **options)


def measure_arm(name: str, work: Workspace, rows: Dataset) -> dict[str, Any]:
    """Train a few steps: seconds of each but the first, the second one's loss, and peak memory beside the weights."""
    arm, clock = ARMS[name], Clock()
    set_seed(work.config.seed)
    config = replace(work.config, method="plain")
    if arm.everywhere:
        config = replace(config, peft={**config.peft_settings, "slots": list(SLOTS)})
    model = add_peft(work.dense_model(), config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(arm, work, model, rows, clock, folder)
        with PeakMemory(model) as memory, arm.around(model):
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = {"processor": clock.processor[1:], "wall": clock.wall[1:]}  # the first batch is a warm-up
    return {**seconds, "memory_bytes": memory.bytes, "loss": losses[1]}


def measure(config: RunConfig, names: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of all steps, and peak memory, of some arms in alternation."""
    work = prepare(replace(config, method="light"))
    rows = concatenate_datasets(sample_rows(work, steps)).select_columns(["input_ids", "attention_mask", "labels"])
    size = config.training.batch_size
    short = rows.select(range(size)).map(lambda row: {name: row[name][-WARMUP:] for name in row})
    rows_of_arm = concatenate_datasets([short, rows])

    def apart(name: str) -> dict[str, Any]:
        with multiprocessing.get_context("fork").Pool(1) as process:  # which has no memory of others
            found: dict[str, Any] = process.apply(measure_arm, (name, work, rows_of_arm))
        say(f"{name}: {found['processor']} s, {found['memory_bytes'] / 2**20:,.0f} MiB")
        return found

    values = alternate({name: partial(apart, name) for name in names}, rounds)
    processor = {name: [each for found in of for each in found["processor"]] for name, of in values.items()}
    return {
        "results": {
            "seconds_per_step": {name: asdict(summarize(each)) for name, each in processor.items()},
            "memory_bytes": {name: max(found["memory_bytes"] for found in of) for name, of in values.items()},
            "loss": {name: of[0]["loss"] for name, of in values.items()},
        },
        "values": values,
        "tokens_per_step": sum(map(len, rows["input_ids"])) / steps,
        "labeled_tokens_per_step": sum(label != -100 for row in rows["labels"] for label in row) / steps,
        "config": asdict(config),
    }


def markdown(results: dict[str, Any]) -> str:
    """One row an arm."""
    rows = []
    first = next(iter(results["memory_bytes"]))
    for name, seconds in results["seconds_per_step"].items():
        memory, of_first = results["memory_bytes"][name], results["memory_bytes"][first]
        ratio = seconds["median"] / results["seconds_per_step"][first]["median"]
        spread = f"{seconds['median']:.1f} ({seconds['low']:.1f}-{seconds['high']:.1f})"
        rows.append([name, spread, f"{ratio:.2f}", f"{memory / 2**20:,.0f}", f"{memory / of_first:.2f}"])
    return markdown_table(("", "s a step", f"of {first}", "peak MiB", f"of {first}"), rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of a run of a causal language model")
    parser.add_argument("--rounds", type=int, default=3, help="alternations")
    parser.add_argument("--steps", type=int, default=4, help="batches a round")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="default: all")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)

    def found() -> dict[str, Any]:
        check_counts(given, "rounds", "steps")
        return measure(load_config(given.config), given.arms, given.rounds, given.steps)

    return report("sft", arguments, given.out, found, markdown)


if __name__ == "__main__":
    sys.exit(main())
