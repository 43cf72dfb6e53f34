"""`LightTrainer` in Python beside `lightpeft run` on one config: the same plan and weights, and the time of both.

    python benchmarks/recipe.py configs/movie_reviews/minilm_default.yaml

Paths inside the config are relative to the current folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import publishing
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import load_file
from transformers import set_seed

from lightpeft import LightTrainer, load_config
from lightpeft.app.cli.command import quiet
from lightpeft.app.runs import pipeline
from lightpeft.config import RunConfig
from lightpeft.profiling import hardware, ratio, summarize
from lightpeft.training.arguments import training_arguments

WEIGHTS = "adapter_model.safetensors"
STAGES = ("estimate", "prune", "train")


def in_python(config: RunConfig, folder: Path) -> float:
    """Train as somebody's own program does, and save; returns the seconds of `train()`."""
    work = pipeline.prepare(replace(config, output=str(folder / "unused")))
    set_seed(config.seed)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=config.lora.r, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout
    )
    arguments = training_arguments(work.config.training, folder / "out", work.steps, config.seed)
    trainer: Any = LightTrainer(
        model=work.dense_model().model,
        args=arguments,
        peft_config=lora,
        light=config.light,
        train_dataset=work.train_rows,
        data_collator=work.collator,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model(str(folder / "adapter"))
    return seconds


def in_the_shell(config: RunConfig, folder: Path) -> float:
    """The same by `lightpeft run`, whose verb calls this; returns the seconds of its stages up to the adapter."""
    report = pipeline.run(replace(config, output=str(folder)))
    return sum(report["seconds"][stage] for stage in STAGES)


WAYS: Mapping[str, Callable[[RunConfig, Path], float]] = {"python": in_python, "shell": in_the_shell}


def main(arguments: list[str] | None = None) -> int:
    """Run both in alternation, compare what they leave, and print or publish the times; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    publishing.add_option(parser)
    options = parser.parse_args(arguments)
    quiet()
    config = load_config(options.config)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.rounds):
            folders = {name: Path(place) / f"{name}-{number}" for name in WAYS}
            for name, train in WAYS.items():
                seconds[name].append(train(config, folders[name]))
                publishing.say(f"round {number + 1}, {name}: {seconds[name][-1]:.1f} s")
            adapters = [folders[name] / "adapter" / WEIGHTS for name in WAYS]
            one, other = (load_file(file) for file in adapters)
            equal = one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
            if not equal:
                publishing.say("python and shell trained other weights")
                return 1
    found = asdict(ratio(seconds["python"], seconds["shell"]))
    rows = [[name, publishing.spread_text(asdict(summarize(values)))] for name, values in seconds.items()]
    text = publishing.markdown_table(["way", "s"], [*rows, ["python / shell", publishing.spread_text(found)]])
    Console().print(text, markup=False)
    if options.write_readme:
        results = {
            "seconds": seconds,
            "ratio": found,
            "hardware": hardware(),
            "config": asdict(config),
            "command": publishing.command("recipe", arguments),
        }
        publishing.publish("recipe", text, f"{options.config.stem}.recipe.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
