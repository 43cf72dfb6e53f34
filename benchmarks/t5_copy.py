"""A toy: a small T5, trained from random weights, goes through estimation, pruning and fine-tuning on a copy task.

    python benchmarks/t5_copy.py

Not a real model and not a real task. It shows that the loss falls through all three stages of an encoder-decoder
(encoder, decoder and cross-attention pruned, position biases indexed by each layer's kept heads), and what is left at
the end. The base learns to copy sequences; LoRA then learns to copy them in reverse, on the base that it prunes.
Writes t5_copy.results.json beside this file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from publishing import command
from rich.console import Console
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments, set_seed

from lightpeft import EarlyPruner, preset_light
from lightpeft.cli.command import quiet
from lightpeft.cli.tables import facts_table, plan_table
from lightpeft.files import write_json
from lightpeft.profiling import count_parameters, hardware, versions

SYMBOLS, LENGTH, END = 24, 8, 1
"""Symbols are the tokens 2 to 25; a sequence has eight of them and an end mark."""
BASE: dict[str, Any] = {
    "vocab_size": SYMBOLS + 2,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 8,
}
BASE |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": END, "dropout_rate": 0.0}


def main() -> None:
    """Make the base, run the three stages, and write what was seen."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base-steps", type=int, default=2000, help="steps of full training on copying")
    options.add_argument("--estimation-steps", type=int, default=150)
    options.add_argument("--steps", type=int, default=1500, help="steps of LoRA in all, estimation included")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".results.json"))
    given = options.parse_args()
    quiet()
    set_seed(given.seed)
    base = T5ForConditionalGeneration(T5Config(**BASE))
    losses = {"base, copying, from random weights": train(base, rows(64 * given.base_steps, 0, False), 2e-3)}
    report = light_run(base, given, losses)
    write_json(given.output, {"losses": losses, **report, "seed": given.seed, "steps": steps_of(given)} | facts())
    Console().print(facts_table(report, "T5 from random weights on a toy copy task"))
    Console().print({stage: [curve[0], curve[-1]] for stage, curve in losses.items()})


def light_run(
    base: T5ForConditionalGeneration, given: argparse.Namespace, losses: dict[str, list[float]]
) -> dict[str, Any]:
    """Estimate, prune and fine-tune on the reversed copies; adds each stage's loss curve to `losses`."""
    task, test = rows(64 * given.steps, 1, True), rows(512, 2, True)
    targets = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    model = get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", r=16, lora_alpha=32, target_modules=targets))
    report: dict[str, Any] = {"loss before LoRA": loss_of(model, test), "exact match before LoRA": exact(model, test)}
    dense = count_parameters(model)
    pruner = EarlyPruner(model, preset_light("paper", length=given.estimation_steps, mask_learning_rate=5e-3))
    losses["estimation"] = train(model, task, 5e-3, pruner.callback())
    report["loss after estimation"] = loss_of(model, test)
    plan = pruner.plan()
    light = pruner.prune(plan)
    Console().print(plan_table(plan))
    report["loss after pruning"] = loss_of(light, test)
    done = 64 * given.estimation_steps
    losses["fine-tuning"] = train(light, task.select(range(done, len(task))), 5e-3)
    small = count_parameters(light)
    return report | {
        "loss after fine-tuning": loss_of(light, test),
        "exact match after fine-tuning": exact(light, test),
        "base parameters": dense.base,
        "base parameters removed": dense.base - small.base,
        "removed ratio": 1 - small.base / dense.base,
        "PEFT parameters at the start": dense.peft,
        "PEFT parameters at the end": small.peft,
    }


def rows(count: int, seed: int, backwards: bool) -> Dataset:
    """Random sequences of symbols and their copies."""
    sequences = torch.randint(2, SYMBOLS + 2, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    end = torch.full((count, 1), END)
    copies = sequences.flip(1) if backwards else sequences
    columns = {"input_ids": torch.cat([sequences, end], 1), "labels": torch.cat([copies, end], 1)}
    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()}).with_format("torch")


def train(model: nn.Module, data: Dataset, rate: float, *callbacks: TrainerCallback) -> list[float]:
    """One pass over the data in batches of 64, linear decay; the loss at every tenth step, nats a token."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=64,
            num_train_epochs=1,
            learning_rate=rate,
            warmup_steps=50,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
        trainer.train()
    return [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def loss_of(model: nn.Module, data: Dataset) -> float:
    """Cross-entropy, nats a token."""
    return float(model.eval()(input_ids=data["input_ids"][:], labels=data["labels"][:]).loss)


def exact(model: Any, data: Dataset) -> float:
    """Part of the sequences that greedy generation with the KV cache gets wholly right."""
    inputs, labels = data["input_ids"][:], data["labels"][:]
    answers: Tensor = model.eval().generate(input_ids=inputs, max_new_tokens=LENGTH + 1, do_sample=False)[:, 1:]
    answers = nn.functional.pad(answers, (0, labels.shape[1] - answers.shape[1]))
    return float((answers == labels).all(1).float().mean())


def steps_of(given: argparse.Namespace) -> dict[str, int]:
    """Optimizer steps of each stage."""
    tuning = given.steps - given.estimation_steps
    return {"base": given.base_steps, "estimation": given.estimation_steps, "fine-tuning": tuning}


def facts() -> dict[str, Any]:
    """What is needed to repeat the run, beside its settings."""
    return {"base_config": BASE, "hardware": hardware(), "versions": versions(), "command": command("t5_copy")}


if __name__ == "__main__":
    main()
