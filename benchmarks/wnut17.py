"""Entities in short texts (WNUT-17, token classification) through `LightTrainer`, with the methods of configs/frontier.

    python benchmarks/wnut17.py --models minilm --methods full lora "60%, all" --seeds 0

A cell is a folder with the model and its numbers; one that is done is not run again, so all may be run in parts. The
metric is F1 of whole entities. `frontier.py` reads the output folder as it reads those of grids.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import publishing
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from row_counts import Counts, entities, value
from torch import Tensor
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    set_seed,
)

from lightpeft import LightTrainer
from lightpeft.adapters.merging import load_merged, merged_copy, save_merged
from lightpeft.app.cli.command import quiet
from lightpeft.app.runs.reproduce.grid import slug
from lightpeft.config import TrainingConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json
from lightpeft.models.families.family_table import block_specs
from lightpeft.plans.structure import SLOTS
from lightpeft.profiling.memory import PeakMemory
from lightpeft.profiling.sizes import folder_bytes, parameter_report
from lightpeft.profiling.surroundings import hardware
from lightpeft.saving.whole import MERGED
from lightpeft.training.arguments import training_arguments
from lightpeft.training.trainer import Training

TASK, METRIC, FILE = "wnut17", "entity_f1", "metrics.json"
DATA = Path("demo/cache/wnut17")
RATES = {"minilm": (1e-4, 1e-3, 3), "mpnet": (5e-5, 5e-4, 2)}
"""Model -> rate of full fine-tuning, rate of LoRA, epochs, as in configs/frontier."""
CUTS = (60, 40, 20, 80, 90)
METHODS: dict[str, Any] = {
    "full": None,
    "lora": ("q", "v"),
    **{f"{part}%, all": {"remove": {"blocks": part / 100}, "train": "all"} for part in CUTS},
    "lora on all projections": SLOTS,
    **{f"{part}%": {"remove": {"blocks": part / 100}} for part in CUTS},
}
"""Method -> slots of plain LoRA, settings of `light`, or None."""


def encoded(file: Path, tokenizer: Any, names: Sequence[str] = ()) -> tuple[list[dict[str, Any]], Sequence[str]]:
    """Rows, the first token of each word with the number of its tag, and the tags; empty: those of the file."""
    data = load_dataset("json", data_files=str(file), split="train")
    names = names or sorted({tag for tags in data["tags"] for tag in tags})

    def encode(each: Mapping[str, Any]) -> dict[str, Any]:
        found = tokenizer(each["tokens"], is_split_into_words=True, truncation=True, max_length=128)
        words = found.word_ids()
        first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
        labels = [names.index(each["tags"][w]) if begins else -100 for w, begins in zip(words, first, strict=True)]
        return {**found, "labels": labels, "length": len(words)}

    return [encode(each) for each in data], names


class Dense(Training, Trainer):
    """A trainer of a model that stays as it is, which may have a teacher."""


@torch.inference_mode()
def ask(teacher: Path, file: Path, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Give rows the logits of a teacher whose tokenizer makes the same word pieces, with other numbers."""
    model: Any = AutoModelForTokenClassification.from_pretrained(teacher).eval()
    its_rows, _ = encoded(file, AutoTokenizer.from_pretrained(teacher), names)
    for own, its in zip(rows, its_rows, strict=False):
        require(
            own["labels"] == its["labels"], f"{teacher} cuts words into other pieces; it cannot teach token by token"
        )
        own["teacher_logits"] = model(input_ids=torch.tensor([its["input_ids"]])).logits[0].tolist()


def train(model: str, method: str, seed: int, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Train a cell and leave its model in the folder; returns metrics.json but for the metric."""
    set_seed(seed)
    source, chosen = str(Path("demo") / "cache" / model), METHODS[method]
    tokenizer = AutoTokenizer.from_pretrained(source)
    file = given.data / "train.jsonl"
    rows, names = encoded(file, tokenizer)
    rows = rows[: given.rows]
    base: Any = AutoModelForTokenClassification.from_pretrained(source, id2label=dict(enumerate(names)))
    if given.prior:
        labels = torch.tensor([label for row in rows for label in row["labels"] if label >= 0])
        base.classifier.bias.data = (labels.bincount(minlength=len(names)).clamp(min=1) / len(labels)).log()
    config = settings_of(model, method, given)
    rate, epochs = (config["training"][name] for name in ("learning_rate", "epochs"))
    training = TrainingConfig(batch_size=32, learning_rate=rate, save_steps=10**9)
    steps = epochs * -(-len(rows) // 32)
    common: dict[str, Any] = {
        "args": training_arguments(training, folder / "checkpoints", steps, seed),
        "data_collator": without_length(DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8)),
    }
    peft = LoraConfig(task_type="TOKEN_CLS")
    started = time.perf_counter()
    if given.teacher is not None:
        ask(given.teacher, file, names, rows)
    common["train_dataset"] = Dataset.from_list(rows)
    with PeakMemory(base) as memory:
        if isinstance(chosen, dict):
            trainer: Any = LightTrainer(base, **common, processing_class=tokenizer, peft_config=peft, light=chosen)
        else:
            peft.target_modules = [
                name for spec in block_specs(base) for slot, name in spec.projections.items() if slot in (chosen or ())
            ]
            trainer = Dense(base if chosen is None else get_peft_model(base, peft), **common)
        trainer.train()
        seconds = time.perf_counter() - started
    trained: Any = trainer.model
    if isinstance(chosen, dict):
        save_merged(trained, folder / "model", tokenizer, overwrite=True)
    else:
        (merged_copy(trained) if isinstance(trained, PeftModel) else trained).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    return {
        "parameters": parameter_report(trained),
        "seconds": {"train": seconds},
        "training": {"train": {"peak_memory_bytes": memory.bytes, "resumed_at": 0}},
        "adapter_bytes": folder_bytes(folder / "model"),
        "hardware": hardware(),
        "config": config,
    }


def settings_of(model: str, method: str, given: argparse.Namespace) -> dict[str, Any]:
    """Settings of a cell, as metrics.json has them."""
    full, lora, epochs = RATES[model.partition("_")[0]]
    training = {
        "teacher": given.teacher and str(given.teacher),
        "learning_rate": given.rate or (full if METHODS[method] is None else lora),
        "epochs": given.epochs or epochs,
    }
    data = {"path": str(given.data), "rows": given.rows, "split": given.split}
    return {"data": data, "training": training, "prior": given.prior}


def check(given: argparse.Namespace) -> None:
    """Check that all that cells read is there.

    Raises:
        LightPeftError: a file, model or teacher is missing, or a model has no rates.
    """
    for split in ("train", given.split):
        file = given.data / f"{split}.jsonl"
        require(file.is_file(), f"{file} does not exist; give the folder of WNUT-17 as --data")
    for model in given.models:
        require(model.partition("_")[0] in RATES, f"--models {model}: no rate is known but for {' and '.join(RATES)}")
    places = [Path("demo") / "cache" / model for model in given.models]
    for place in [*places, *([given.teacher] if given.teacher else [])]:
        require((place / "config.json").is_file(), f"{place} is no folder of a model")


def check_cell(file: Path, wanted: dict[str, Any]) -> None:
    """Check that a finished cell was made with these settings; cells had no rows or split in theirs once.

    Raises:
        LightPeftError: it was made with others.
    """
    found = read_json(file)["config"]
    known = {**found, "data": {"rows": None, "split": "test", **found["data"]}}
    require(known == wanted, f"{file.parent} was made with other settings: {known}; give another --out")


def without_length(collate: Any) -> Callable[[Sequence[Mapping[str, Any]]], Any]:
    """The collator for rows that have a length beside what the model reads."""
    return lambda rows: collate([{name: each[name] for name in each if name != "length"} for each in rows])


def opened(
    folder: Path, data: Path, split: str = "test"
) -> tuple[Any, Any, Callable[[int], list[dict[str, Tensor]]], Any]:
    """Of a finished cell: the model, the tokenizer, what makes batches of a split's rows, and what counts answers."""
    place = folder / "model"
    merged = (place / MERGED).is_file()
    model: Any = load_merged(place) if merged else AutoModelForTokenClassification.from_pretrained(place)
    tokenizer, names = AutoTokenizer.from_pretrained(place), [*model.config.id2label.values()]
    rows, _ = encoded(data / f"{split}.jsonl", tokenizer, names)
    collate = without_length(DataCollatorForTokenClassification(tokenizer))

    def batches(size: int) -> list[dict[str, Tensor]]:
        return [dict(collate(rows[start : start + size])) for start in range(0, len(rows), size)]

    return model.eval(), tokenizer, batches, partial(entities, names)


def quality(folder: Path, data: Path, split: str) -> float:
    """F1 of whole entities on the rows of a split."""
    model, _, batches, counted = opened(folder, data, split)
    counts: list[Counts] = []
    for inputs in batches(64):
        labels = inputs.pop("labels")
        counts += [*counted(model(**inputs).logits, labels)]
    return value(METRIC, counts)


def main(arguments: list[str] | None = None) -> int:
    """Run cells that are not done; 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm"], help="folders in demo/cache")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--split", default="test", help="the rows that are scored; to choose settings: validation")
    parser.add_argument("--teacher", type=Path, help="the model of a finished cell, as .../full/0/model")
    parser.add_argument("--rate", type=float, help="another learning rate than that of the grids")
    parser.add_argument("--epochs", type=int, help="another number of epochs")
    parser.add_argument(
        "--prior",
        action="store_true",
        help="begin with the tags' log frequencies as biases of the head; without it MPNet-base learns nothing",
    )
    parser.add_argument("--rows", type=int, help="train on the first rows alone")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier/wnut17"))
    given = parser.parse_args(arguments)
    quiet()
    try:
        check(given)
        for seed, model, method in itertools.product(given.seeds, given.models, given.methods):
            folder = given.out / "cells" / model / TASK / slug(method) / str(seed)
            if (folder / FILE).is_file():
                check_cell(folder / FILE, settings_of(model, method, given))
            else:
                found = train(model, method, seed, folder, given)
                f1 = quality(folder, given.data, given.split)
                write_json(folder / FILE, {**found, "method": method, "main_metric": METRIC, "metrics": {METRIC: f1}})
                publishing.say(f"{model}/{method}/{seed}: {METRIC} {f1:.4f}, {found['seconds']['train']:.0f} s")
        write_json(given.out / "results.json", summary(given.out, arguments))
    except LightPeftError as error:
        publishing.say(f"wnut17: {error}")
        return 2
    return 0


def summary(out: Path, arguments: list[str] | None) -> dict[str, Any]:
    """The finished cells in a folder: metric, seconds and parameters, with the command."""
    cells = {}
    for file in sorted(out.glob(f"cells/*/{TASK}/*/*/{FILE}")):
        found = read_json(file)
        facts = {name: found[name] for name in ("metrics", "seconds", "parameters", "hardware")}
        cells[f"{file.parents[3].name}/{found['method']}/{file.parent.name}"] = facts
    return {"command": publishing.command("wnut17", arguments), "cells": cells}


if __name__ == "__main__":
    sys.exit(main())
