"""A language model's head in training: all tokens' logits, those of labelled tokens at once, and some at a time.

    python benchmarks/head.py configs/gsm8k/smollm2_gsm8k.yaml

The run is estimated (if anything is to go) and pruned first. Prints and writes training speed and peak memory of the
three ways, which are otherwise the same. Paths inside the config are relative to the current folder.
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
from lightpeft.training import acceleration, logits

AS_IT_IS, AT_ONCE, OF_ALL = "as it is", "logits of labelled tokens at once", "logits of all tokens"


@contextmanager
def at_once(work: Workspace, model: nn.Module) -> Iterator[None]:
    """Steps as a light run makes them, but with the logits of all labelled tokens in memory together."""
    with patch.object(logits._Labelled, "_computed_in", lambda labelled, hidden: None), accelerating(work, model):
        yield


@contextmanager
def of_all(work: Workspace, model: nn.Module) -> Iterator[None]:
    """The same with those of all tokens."""
    with patch.object(acceleration, "labelled_head", lambda model: nullcontext()), accelerating(work, model):
        yield


def subjects_of(config: RunConfig) -> subjects.Subjects:
    """The light model's steps in three ways."""
    run = subjects.pruned(config, Path("runs") / "head" / Path(config.output).name)
    changed = {AT_ONCE: at_once, OF_ALL: of_all}
    others = {name: (replace(BUILDS["light"], accelerating=around), run) for name, around in changed.items()}
    return {AS_IT_IS: ("light", run), **others}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    return subjects.main("head", __doc__ or "", subjects_of, arguments)


if __name__ == "__main__":
    sys.exit(main())
