"""A trainer's model whose frozen blocks run without a graph and, where rows come again, only once."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from lightpeft.compat.transformers import used_columns
from lightpeft.machine import processes
from lightpeft.models.sharding import is_sharded
from lightpeft.training.arguments import half_precision
from lightpeft.training.host import Host
from lightpeft.training.prefix.blocks import FrozenPrefix
from lightpeft.training.prefix.caching import CachedRows, PrefixCache, cache_prefix, may_change, obstacle
from lightpeft.training.schedule import pace_of
from lightpeft.training.sharding import Sharding
from lightpeft.training.step_rows import rows_a_step
from lightpeft.training.teaching import without_answers

_log = logging.getLogger(__name__)
SHARDED = "processes share the model's weights"
"""All of them have to go through its blocks together, and would not."""


class TrainerPrefix:
    """Between `open` and `close` the model's frozen blocks run without a graph, and once a row where that is known to
    change nothing. Batches are the trainer's own.

    Attributes:
        model: has the blocks; None: the trainer's own.
        cache: how the outputs are kept; None: they are computed every time.
        folder: where a file of outputs goes; None: into the trainer's, from which `remove_file` takes it.
        announce: told what is worth knowing about the training that begins.
    """

    def __init__(self, trainer: Host, sharding: Sharding) -> None:
        self.model: nn.Module | None = None
        self.cache: PrefixCache | None = None
        self.folder: Path | None = None
        self.announce: Callable[[str], None] = _log.info
        self._trainer, self._sharding = trainer, sharding
        self._prefix: FrozenPrefix | None = None
        self._cached: CachedRows | None = None
        self._obstacle: str | None = None
        """Why nothing is kept, where somebody might expect it."""

    def foresee(self) -> None:
        """Say before training why the outputs of frozen blocks will be computed every time, if they will."""
        self._obstacle = None
        if self.cache is None or not FrozenPrefix(self._model):
            return
        rows, collator = self._rows, self._trainer.data_collator
        if self._sharding.fsdp or is_sharded(self._model):
            self._obstacle = SHARDED
        elif pace_of(self._trainer) is None:
            self._obstacle = "how often a row comes is not known"
        else:
            self._obstacle = may_change(collator) or obstacle(rows, collator)
        if self._obstacle is not None:
            self.announce(f"no prefix cache: {self._obstacle}")

    def open(self, steps: int) -> None:
        """Let the frozen blocks run without a graph and, if rows come again within the steps, once.

        Raises:
            LightPeftError: the folder cannot be written.
        """
        self._prefix = FrozenPrefix(self._model)
        self._prefix.attach()
        args = self._trainer.args
        if self.cache is None or self._obstacle is not None or not self._prefix:
            return
        if is_sharded(self._model):  # by an engine that takes the model when training begins
            self.announce(f"no prefix cache: {SHARDED}")
            return
        if steps * rows_a_step(args) <= len(self._trainer.train_dataset):
            return
        self._cached = cache_prefix(
            self._prefix,
            self._rows,
            self._trainer.data_collator,
            self.cache,
            self.folder or self._own_folder,
            batch_size=args.eval_batch_size,
            autocast=half_precision(args),
            announce=self.announce,
        )
        self._prefix.known = self._cached

    def close(self) -> None:
        """The model's blocks compute as before."""
        if self._prefix is not None:
            self._prefix.detach()
            self._prefix = None
        if self._cached is not None:
            self._cached.close()
            self._cached = None

    def remove_file(self) -> None:
        """To be called where training is over and not merely stopped; a folder that was given goes with its owner."""
        if self.folder is not None:
            return
        processes().wait_for_everyone()
        if processes().is_main_process:
            shutil.rmtree(self._own_folder, ignore_errors=True)

    @property
    def _model(self) -> nn.Module:
        return self._trainer.model if self.model is None else self.model

    @property
    def _own_folder(self) -> Path:
        return Path(self._trainer.args.output_dir) / "prefix"

    @property
    def _rows(self) -> Any:
        """The training rows as the collator gets them."""
        rows = without_answers(self._trainer.train_dataset)
        if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
            return used_columns(self._trainer, rows)
        return rows
