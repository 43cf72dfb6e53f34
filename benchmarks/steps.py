"""What makes a step of a light run fast: one setting after the other taken away, in alternation.

    python benchmarks/steps.py configs/movie_reviews/minilm_default.yaml

The run is estimated and pruned first. Prints and writes training speed and peak memory of its fine-tuning stage. Paths
inside the config are relative to the current folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import subjects
import torch
from peer_methods import with_settings
from torch import nn

from lightpeft import pipeline
from lightpeft.bench import BUILDERS
from lightpeft.config import RunConfig
from lightpeft.pipeline import Workspace

AS_IT_IS = "as it is"
SETTINGS: dict[str, Mapping[str, Any]] = {
    AS_IT_IS: {},
    "LoRA and attention as PEFT and PyTorch have them": {"training.fused": False},
    "with the base's dropout": {"light.dropout": None},
    "padded to the longest row alone": {"training.pad_to_multiple_of": 1},
    "without all three": {"training.fused": False, "light.dropout": None, "training.pad_to_multiple_of": 1},
    "without prefix cache": {"training.prefix_cache": "off"},
    "in float32": {"training.bf16": False},
}
"""What is measured: settings that differ from the config's."""
CHECKPOINTED = "with gradient checkpointing"


class Checkpointed:
    """The light model with activations computed again in the backward pass."""

    def __call__(self, work: Workspace) -> tuple[nn.Module, Callable[..., torch.optim.Optimizer]]:
        model, optimizer = BUILDERS["light"](work)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        return model, optimizer

    def accelerating(self, work: Workspace, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block, the model trains as in light runs."""
        return pipeline.accelerating(work, model)


def of(config: RunConfig) -> subjects.Subjects:
    """What is measured, all of it on one pruned model."""
    config = replace(config, method="light", output=str(Path("runs") / "steps" / Path(config.output).name))
    work = pipeline.prepare(config)
    pipeline.estimate(work)
    pipeline.plan(work.run)
    pipeline.prune(work)
    found = {name: ("light", with_settings(config, settings)) for name, settings in SETTINGS.items()}
    return {**found, CHECKPOINTED: (Checkpointed(), config)}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    return subjects.main("steps", __doc__ or "", of, arguments)


if __name__ == "__main__":
    sys.exit(main())
