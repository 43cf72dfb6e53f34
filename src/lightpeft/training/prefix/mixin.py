"""Any trainer, on a model whose frozen blocks run without a graph and, where rows come again, only once."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from lightpeft.compat.transformers import used_columns
from lightpeft.machine import processes
from lightpeft.models.sharding import is_sharded
from lightpeft.training.arguments import half_precision
from lightpeft.training.prefix.blocks import FrozenPrefix
from lightpeft.training.prefix.caching import CachedRows, PrefixCache, cache_prefix, may_change, obstacle
from lightpeft.training.schedule import pace_of
from lightpeft.training.step_rows import rows_a_step

_log = logging.getLogger(__name__)
SHARDED = "processes share the model's weights"
"""All of them have to go through its blocks together, and would not."""


class PrefixMixin:
    """Mixin of `Trainer` classes: between `_open_prefix` and `_close_prefix` the model's frozen blocks run without a
    graph, and once a row where that is known to change nothing. Batches are the trainer's own."""

    prefix_cache: PrefixCache | None = None
    """How the outputs are kept; None: they are computed every time."""
    _frozen_prefix: FrozenPrefix | None = None
    _cached_rows: CachedRows | None = None
    _prefix_obstacle: str | None = None
    """Why nothing is kept, where somebody might expect it."""

    @property
    def _prefix_folder(self) -> Path:
        """Where a file of outputs goes; it is removed when nobody reads it any more."""
        return Path(self._trainer.args.output_dir) / "prefix"

    def _announce(self, line: str) -> None:
        """Say something worth knowing about the training that begins."""
        _log.info(line)

    def _foresee_prefix(self, model: nn.Module) -> None:
        """Say before training why the outputs of frozen blocks will be computed every time, if they will."""
        self._prefix_obstacle = None
        if self.prefix_cache is None or not FrozenPrefix(model):
            return
        rows, collator = self._prefix_rows, self._trainer.data_collator
        if self._trainer._shards or is_sharded(model):
            self._prefix_obstacle = SHARDED
        elif pace_of(self._trainer) is None:
            self._prefix_obstacle = "how often a row comes is not known"
        else:
            self._prefix_obstacle = may_change(collator) or obstacle(rows, collator)
        if self._prefix_obstacle is not None:
            self._announce(f"no prefix cache: {self._prefix_obstacle}")

    def _open_prefix(self, model: nn.Module, steps: int) -> None:
        """Let the frozen blocks of a model run without a graph and, if rows come again within the steps, once.

        Raises:
            LightPeftError: the folder cannot be written.
        """
        self._frozen_prefix = FrozenPrefix(model)
        self._frozen_prefix.attach()
        args = self._trainer.args
        if self.prefix_cache is None or self._prefix_obstacle is not None or not self._frozen_prefix:
            return
        if is_sharded(model):  # by an engine that takes the model when training begins
            self._announce(f"no prefix cache: {SHARDED}")
            return
        if steps * rows_a_step(args) <= len(self._trainer.train_dataset):
            return
        self._cached_rows = cache_prefix(
            self._frozen_prefix,
            self._prefix_rows,
            self._trainer.data_collator,
            self.prefix_cache,
            self._prefix_folder,
            batch_size=args.eval_batch_size,
            autocast=half_precision(args),
            announce=self._announce,
        )
        self._frozen_prefix.known = self._cached_rows

    @property
    def _prefix_rows(self) -> Any:
        """The training rows as the collator gets them."""
        rows = self._trainer.train_dataset
        if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
            return used_columns(self._trainer, rows)
        return rows

    def _close_prefix(self) -> None:
        """The model's blocks compute as before."""
        if self._frozen_prefix is not None:
            self._frozen_prefix.detach()
            self._frozen_prefix = None
        if self._cached_rows is not None:
            self._cached_rows.close()
            self._cached_rows = None

    def _remove_prefix_file(self) -> None:
        """To be called where training is over and not merely stopped."""
        processes().wait_for_everyone()
        if processes().is_main_process:
            shutil.rmtree(self._prefix_folder, ignore_errors=True)

    @property
    def _trainer(self) -> Any:
        """This, as the trainer that it is mixed into."""
        return self
