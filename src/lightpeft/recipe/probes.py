"""The probes of a trainer: how many steps, on which of its rows, and which rows are set aside to measure on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from datasets import Dataset

from lightpeft.config import LightConfig
from lightpeft.profiling.live import Batch
from lightpeft.prune.probing import Probe
from lightpeft.training.arguments import half_precision

PART = 0.04
"""Part of a run's steps that a probe takes."""
LEAST_STEPS, MOST_STEPS = 8, 64
"""From some 20 on, more of them hardly leave less of what a cut costs."""
HELD_PART = 0.035
"""Rows that are set aside, as a part of all that the run's steps see. With this, and with probes of one whole model and
of one or two cut ones, finding a budget takes a seventh of an encoder's run of plain PEFT. The least numbers here make
that more of a run of few steps: a fifth to a third of one of 250, all of one of 63."""
LEAST_HELD, MOST_HELD = 128, 1024
_MOST_OF_ROWS = 1 / 4
"""Part of the rows that may be set aside."""
_HELD_BATCHES, _LEAST_IN_BATCH = 24, 8
"""Batches that rows set aside come in, or more: so many tell how sure a mean is, and larger ones take less time."""


def make_probe(
    trainer: Any, light: LightConfig, steps: int, seen: Collection[int] | None, fast: bool, length: int | None = None
) -> Probe:
    """Probes that train as a trainer does, but by AdamW, at its rate.

    Args:
        steps: of the whole run.
        seen: numbers of rows that estimation has gone through; None: not known. Rows are set aside from the others, if
            there are enough of them.
        fast: whether the steps are the faster ones.
        length: steps of a probe; None: by those of the run.
    """
    args, rows = trainer.args, trainer.train_dataset
    size = args.train_batch_size * args.world_size
    each = size * args.gradient_accumulation_steps
    held = rows_aside(trainer, steps * each)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    unseen = [number for number in drawn if number not in seen] if seen is not None else drawn
    aside = (unseen if len(unseen) >= held else drawn)[:held]
    apart = set(aside)
    rest = [number for number in drawn if number not in apart]
    taken = min(max(LEAST_STEPS, round(PART * steps)), MOST_STEPS) if length is None else length
    batches = partial(batches_of, rows, trainer)
    return Probe(
        light=light,
        train=[*batches(_around(rest, taken * each), size)],
        accumulation=args.gradient_accumulation_steps,
        rows=aside,
        held=batches(aside, max(_LEAST_IN_BATCH, min(args.train_batch_size, len(aside) // _HELD_BATCHES))),
        rate=trainer.light_plain_rate,  # copies keep all ranks, and `learning_rate_scale` is for few
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        autocast=half_precision(args),
        fast=fast,
    )


def rows_aside(trainer: Any, seen: int) -> int:
    """How many rows are set aside.

    Args:
        seen: rows that the whole run goes through, repeated ones included.
    """
    most = int(_MOST_OF_ROWS * len(trainer.train_dataset))
    return min(max(LEAST_HELD, int(HELD_PART * seen)), MOST_HELD, most)


def why_unmeasured(trainer: Any) -> str | None:
    """Why probes cannot measure a budget here; None: they can."""
    if trainer._shards or trainer._in_deepspeed:
        engine = "FSDP" if trainer._shards else "DeepSpeed"
        return f"light.blocks: auto probes copies of the model, which cannot be made of one that {engine} shards"
    try:
        count = len(trainer.train_dataset)
    except TypeError:
        return "light.blocks: auto sets rows aside, which these, of no known number, do not allow"
    if rows_aside(trainer, 0) < LEAST_HELD:
        aside = f"light.blocks: auto measures on {LEAST_HELD} rows that it sets aside"
        return f"{aside}, and {count} rows are too few for that"
    return None


def _around(numbers: Sequence[int], count: int) -> list[int]:
    """So many of them, from the beginning again where they end."""
    return list(islice(cycle(numbers), count))


def batches_of(rows: Any, trainer: Any, numbers: Sequence[int], size: int) -> list[Batch]:
    """Batches of rows of similar length, in an order that has nothing to do with it, as a trainer feeds them.

    Args:
        numbers: of the rows.
        size: rows a batch.
    """
    lengths = rows["length"][:] if isinstance(rows, Dataset) and "length" in rows.column_names else None
    order = list(numbers) if lengths is None else sorted(numbers, key=lengths.__getitem__)
    if isinstance(rows, Dataset):
        rows = trainer._remove_unused_columns(rows, description="training")
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [trainer.data_collator([rows[number] for number in part]) for part in parts]
    mixed = torch.randperm(len(batches), generator=torch.Generator().manual_seed(trainer.args.seed)).tolist()
    return [batches[index] for index in mixed]
