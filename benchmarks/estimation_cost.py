"""What masks and importances cost: the estimation stage beside PEFT on the same sites, in alternation.

    python benchmarks/estimation_cost.py configs/movie_reviews/minilm_default.yaml

Modules sit in every block, so that PEFT alone runs backwards through all of them too; a third subject is estimation as
the config has it. Prints and writes training speed and peak memory. Paths inside the config are relative to the current
folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import subjects
import torch
from torch import nn

from lightpeft import pipeline
from lightpeft.bench import adamw
from lightpeft.config import RunConfig
from lightpeft.loading import add_peft
from lightpeft.pipeline import Workspace

PLAIN, MASKED, AS_IT_IS = "PEFT in every block", "with masks and importances", "estimation as the config has it"


class SameSites:
    """The model that estimation starts with, without masks and observers, with the faster steps of light runs."""

    def __call__(self, work: Workspace) -> tuple[nn.Module, Callable[..., torch.optim.Optimizer]]:
        return add_peft(pipeline.dense_model(work), work.config), adamw(work)

    def accelerating(self, work: Workspace, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block, the model trains as in light runs."""
        return pipeline.accelerating(work, model)


def of(config: RunConfig) -> subjects.Subjects:
    """What is measured."""
    everywhere = replace(config, light=replace(config.light, module_blocks=1.0))
    return {PLAIN: (SameSites(), everywhere), MASKED: ("estimation", everywhere), AS_IT_IS: ("estimation", config)}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    return subjects.main("estimation_cost", __doc__ or "", of, arguments)


if __name__ == "__main__":
    sys.exit(main())
