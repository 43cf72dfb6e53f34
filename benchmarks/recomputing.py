"""What activations that the backward pass makes again save, and cost: steps of a light run, beside such that keep all.

    python benchmarks/recomputing.py configs/socialiqa/smollm2_writer.yaml

The run is estimated (if anything is to go) and pruned first. Prints and writes training speed and peak memory. Paths
inside the config are relative to the current folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import subjects
from torch import nn

from lightpeft.app.runs.bench import BUILDS, accelerating
from lightpeft.app.runs.pipeline import Workspace
from lightpeft.config import RunConfig
from lightpeft.training import acceleration

AS_IT_IS, KEPT = "as it is", "all activations kept"


@contextmanager
def all_kept(work: Workspace, model: nn.Module) -> Iterator[None]:
    """Steps as a light run makes them, but for that."""
    nothing = patch.object(acceleration, "recomputed_activations", lambda model: nullcontext())
    with nothing, accelerating(work, model):
        yield


def subjects_of(config: RunConfig) -> subjects.Subjects:
    """The light model's steps in both ways."""
    run = subjects.pruned(config, Path("runs") / "recomputing" / Path(config.output).name)
    light = BUILDS["light"]
    return {AS_IT_IS: (light, run), KEPT: (replace(light, accelerating=all_kept), run)}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    return subjects.main("recomputing", __doc__ or "", subjects_of, arguments)


if __name__ == "__main__":
    sys.exit(main())
