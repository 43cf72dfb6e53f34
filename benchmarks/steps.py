"""Causes of the speed of a light run's steps: one setting after the other taken away, in alternation.

    python benchmarks/steps.py configs/movie_reviews/minilm_default.yaml

The run is estimated and pruned first. Prints and writes training speed and peak memory of its fine-tuning stage. Paths
inside the config are relative to the current folder.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import subjects
import torch

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.pipeline import Workspace
from lightpeft.app.runs.subject import BUILDS, Made
from lightpeft.config import RunConfig
from lightpeft.models.families.family_table import block_lists
from lightpeft.models.unwrap import transformers_model

LIGHT = BUILDS["light"]
AS_IT_IS = "as it is"
SETTINGS: dict[str, Mapping[str, Any]] = {
    "LoRA and attention as PEFT and PyTorch have them": {"training.fast_steps": False},
    "with the base's dropout": {"light.rates.dropout": "keep"},
    "without both": {"training.fast_steps": False, "light.rates.dropout": "keep"},
    "without prefix cache": {"training.prefix_cache": "off"},
    "in float32": {"training.precision": "float32"},
}
"""By name: settings that differ from the config's."""
FLOAT16 = "in float16, the loss scaled"
CHECKPOINTED, COMPILED = "with gradient checkpointing", "compiled (torch.compile)"
UNROUNDED = "neurons in any number instead of multiples of 8"


def checkpointed(work: Workspace) -> Made:
    """Activations are computed again in the backward pass."""
    model, optimizer = LIGHT.make(work)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return model, optimizer


def compiled(work: Workspace) -> Made:
    """Blocks are compiled, for any number of tokens."""
    model, optimizer = LIGHT.make(work)
    for blocks in block_lists(transformers_model(model)):
        for block in blocks:
            block.compile(dynamic=True)
    return model, optimizer


def changed(run: RunConfig, settings: Mapping[str, Any], folder: Path) -> RunConfig:
    """Other settings on the pruned model of a run."""
    config = replace(subjects.with_settings(run, settings), output=str(folder))
    work = pipeline.prepare(config)
    work.run.begin()
    shutil.copytree(RunFolder.open(run).pruned, work.run.pruned, dirs_exist_ok=True)
    return config


def subjects_of(config: RunConfig) -> subjects.Subjects:
    """The variants of the run, nearly all on one pruned model."""
    folder = Path("runs") / "steps" / Path(config.output).name
    run = subjects.pruned(config, folder / AS_IT_IS)
    found = {name: ("light", changed(run, settings, folder / name)) for name, settings in SETTINGS.items()}
    unrounded = subjects.with_settings(config, {"light.remove.multiple_of": 1})
    return {
        AS_IT_IS: ("light", run),
        **found,
        UNROUNDED: ("light", subjects.pruned(unrounded, folder / UNROUNDED)),
        FLOAT16: (replace(LIGHT, autocast=torch.float16), run),
        CHECKPOINTED: (replace(LIGHT, make=checkpointed), run),
        COMPILED: (replace(LIGHT, make=compiled), run),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    return subjects.main("steps", __doc__ or "", subjects_of, arguments)


if __name__ == "__main__":
    sys.exit(main())
