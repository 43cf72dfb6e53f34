"""A toy: experts cut for one task of a small mixture, trained from random weights, beside experts cut at random.

    python benchmarks/experts.py --out benchmarks/experts.json

Not a real model and not real tasks. A Mixtral of four layers with eight experts each learns, from random weights, to
sort eight digits, and to write them backwards in a code that has another digit for each; a token in front says which.
Both tasks read and write the same digits. Then some of the experts of each layer are cut for one of the tasks: by
Fisher scores or by the router's frequencies on that task, by Fisher scores on the other task, or at random. Measured
are the loss and the answers on held-out rows as the cut leaves them, and after a short LoRA training on attention, the
same for all cuts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from publishing import markdown_table, report
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, set_seed

from lightpeft.config import Criterion, light_config
from lightpeft.models.families import block_specs
from lightpeft.plans.planning import check_experts, make_plan
from lightpeft.plans.records import EstimationRecord
from lightpeft.profiling import versions
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.surgery import apply_plan

TASKS = ("sort", "code")
CODE = (7, 2, 9, 4, 0, 8, 3, 6, 1, 5)
DIGITS, FIRST, EQUALS = 8, 4, 3
"""Digits of a row; the token of the digit 0; the token behind the digits. Tokens 1 and 2 say which task it is."""
SHAPE: dict[str, Any] = {
    "vocab_size": FIRST + 10,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.01,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
ROWS = 32
"""Of a step."""
HELD_OUT = 256
CUTS: dict[str, Criterion] = {
    "fisher": "fisher",
    "fisher of the other task": "fisher",
    "random": "random",
}
"""What is said of a cut -> the criterion."""
RANDOM = 2
"""Random cuts of each model and task; their mean counts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, cut and measure; 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="of the model, on both tasks")
    parser.add_argument("--estimation-steps", type=int, default=32)
    parser.add_argument("--tuning-steps", type=int, default=30, help="of LoRA after a cut, on the task alone")
    parser.add_argument("--experts", type=float, nargs="+", default=[0.5, 0.75], help="parts of the experts that go")
    parser.add_argument("--out", type=Path, help="where to write what was found")
    given = parser.parse_args(arguments)
    return report("experts", arguments, given.out, lambda: found(given), table)


def found(given: argparse.Namespace) -> dict[str, Any]:
    """What is written: every cut of every seed, and their means over seeds and tasks."""
    block, *_ = block_specs(MixtralForCausalLM(MixtralConfig(**SHAPE)))
    for part in given.experts:
        check_experts(block, light_config({"remove": {"experts": part}}))
    cells = [cell for seed in given.seeds for cell in of_seed(seed, given)]
    keys = list(dict.fromkeys((cell["experts"], cell["cut"]) for cell in cells))
    results = [
        {"experts": experts, "cut": cut, **_mean([c for c in cells if (c["experts"], c["cut"]) == (experts, cut)])}
        for experts, cut in keys
    ]
    model = "a Mixtral shape trained from random weights on two synthetic tasks; no real model, no real task"
    steps = {"model": given.steps, "estimation": given.estimation_steps, "tuning": given.tuning_steps}
    facts = {"model": model, "shape": SHAPE, "steps": steps, "rows": ROWS, "held_out": HELD_OUT, "seeds": given.seeds}
    return {"results": results, "cells": cells, **facts, "versions": versions()}


MEASURES = ("loss", "correct", "tuned_loss", "tuned_correct")


def _mean(cells: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.fmean(cell[name] for cell in cells) for name in MEASURES}


def table(results: Sequence[dict[str, Any]]) -> str:
    """One row a cut."""
    header = ["experts that go", "by", "loss", "digits right", "loss after LoRA", "digits right after LoRA"]
    rows = [
        [
            f"{row['experts']:.0%}",
            row["cut"],
            f"{row['loss']:.3f}",
            f"{row['correct']:.1%}",
            f"{row['tuned_loss']:.3f}",
            f"{row['tuned_correct']:.1%}",
        ]
        for row in results
    ]
    return markdown_table(header, rows)


def of_seed(seed: int, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One model, and all cuts of it for both tasks."""
    set_seed(seed)
    base = MixtralForCausalLM(MixtralConfig(**SHAPE))
    train(base, given.steps, seed, TASKS, 3e-3, balanced=True)
    records = {task: estimated(base, task, given.estimation_steps, seed) for task in TASKS}
    for task in TASKS:
        yield {"seed": seed, "task": task, "experts": 0.0, "cut": "none", **measured(base, task, None, seed, given)}
        other = next(name for name in TASKS if name != task)
        for part in given.experts:
            for cut, criterion in CUTS.items():
                record = records[other if "other" in cut else task]
                tries = range(RANDOM if cut == "random" else 1)
                budget = light_config(
                    {
                        "preset": "paper",
                        "remove": {"heads": 0, "neurons": 0, "experts": part},
                        "estimate": {"criterion": criterion},
                        "modules": {"remove": 0, "remove_ranks": 0},
                    }
                )
                plans = [make_plan(shuffled(record, 100 * seed + each), budget) for each in tries]
                made = [measured(base, task, plan, seed, given) for plan in plans]
                yield {"seed": seed, "task": task, "experts": part, "cut": cut, **_mean(made)}


def shuffled(record: EstimationRecord, seed: int) -> EstimationRecord:
    """The record with other random scores of experts."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(values.shape, generator=generator) if name.startswith("experts/random/") else values
        for name, values in record.scores.items()
    }
    return EstimationRecord(record.blocks, record.sites, scores, record.base_parameters, record.fingerprint)


def estimated(base: nn.Module, task: str, steps: int, seed: int) -> EstimationRecord:
    """Scores of the experts on one task, LoRA on attention training beside the masks."""
    model = with_lora(base, seed)
    estimator = Estimator(
        model, light_config({"preset": "paper", "estimate": {"length": steps, "mask_learning_rate": 2e-2}})
    )
    estimator.start(None)
    train(model, steps, 1000 + seed, (task,), 1e-3, estimator=estimator)
    estimator.stop()
    return estimator.record()


def measured(base: nn.Module, task: str, plan: Any, seed: int, given: argparse.Namespace) -> dict[str, float]:
    """Loss and digits right of a cut as it is, and after training on the task."""
    model = with_lora(base, seed)
    if plan is not None:
        apply_plan(model, plan)
    before = evaluated(model, task)
    train(model, given.tuning_steps, 2000 + seed, (task,), 3e-3)
    return dict(zip(MEASURES, (*before, *evaluated(model, task)), strict=True))


def with_lora(base: nn.Module, seed: int) -> PeftModel:
    """A copy with LoRA on attention."""
    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets)
    model = get_peft_model(copy.deepcopy(base), config)
    assert isinstance(model, PeftModel)
    return model


def train(
    model: nn.Module,
    steps: int,
    seed: int,
    tasks: Sequence[str],
    rate: float,
    balanced: bool = False,
    estimator: Estimator | None = None,
) -> None:
    """Steps of AdamW with linear decay, on rows of some tasks in equal parts."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    model.train()
    for _ in range(steps):
        each = ROWS // len(tasks)
        batch = torch.cat([rows(task, each, generator) for task in tasks])
        model(**inputs(batch), output_router_logits=balanced).loss.backward()
        if estimator is not None:
            estimator.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def evaluated(model: nn.Module, task: str) -> tuple[float, float]:
    """Mean loss and part of the digits that are right, on held-out rows."""
    model.eval()
    batch = rows(task, HELD_OUT, torch.Generator().manual_seed(9999))
    output = model(**inputs(batch))
    told = output.logits[:, -DIGITS - 1 : -1].argmax(-1)
    return float(output.loss), float((told == batch[:, -DIGITS:]).float().mean())


def rows(task: str, count: int, generator: torch.Generator) -> Tensor:
    """Token ids [count, 2 + 2 * DIGITS]: the task, digits, the equals sign, and the answer."""
    digits = torch.randint(0, 10, (count, DIGITS), generator=generator)
    answers = {"sort": digits.sort(1).values, "code": torch.tensor(CODE)[digits.flip(1)]}
    front = torch.full((count, 1), 1 + TASKS.index(task))
    return torch.cat([front, digits + FIRST, torch.full((count, 1), EQUALS), answers[task] + FIRST], 1)


def inputs(batch: Tensor) -> dict[str, Tensor]:
    """What the model takes; the answer alone has a loss."""
    labels = batch.clone()
    labels[:, :-DIGITS] = -100
    return {"input_ids": batch, "labels": labels}


if __name__ == "__main__":
    raise SystemExit(main())
