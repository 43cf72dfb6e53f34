"""The frozen prefix of a trainer's model: it runs without a graph and, if rows repeat, once per row."""

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
from lightpeft.training.step_rows import rows_per_step
from lightpeft.training.teacher_logits import without_teacher_logits

_log = logging.getLogger(__name__)
SHARDED = "the model is sharded over processes"
"""All processes have to run a sharded block together, and with a cache they would not."""


class TrainerPrefix:
    """Runs a trainer's frozen blocks without a graph between `open` and `close`, and once per row if that is safe.

    Attributes:
        model: the model with the blocks; None: the trainer's own.
        cache: settings of the cache; None: no cache.
        folder: folder of the cache file; None: a folder in the trainer's `output_dir`, which `remove_file` deletes.
        announce: called with one line about the cache of the training that begins.
    """

    def __init__(self, trainer: Host, sharding: Sharding) -> None:
        self.model: nn.Module | None = None
        self.cache: PrefixCache | None = None
        self.folder: Path | None = None
        self.announce: Callable[[str], None] = _log.info
        self._trainer, self._sharding = trainer, sharding
        self._prefix: FrozenPrefix | None = None
        self._cached: CachedRows | None = None
        self._announced: str | None = None
        """Announced reason why there is no cache although one is set."""

    def announce_obstacle(self) -> None:
        """Announce before training why there will be no cache, if there is a reason."""
        self._announced = None
        if self.cache is not None and FrozenPrefix(self._model):
            self._has_obstacle()

    def _has_obstacle(self) -> bool:
        """Return whether something forbids a cache; announce a reason that was not announced before."""
        reason = self._find_obstacle()
        if reason is not None and reason != self._announced:
            self.announce(f"no prefix cache: {reason}")
        self._announced = reason
        return reason is not None

    def _find_obstacle(self) -> str | None:
        if self._sharding.fsdp or is_sharded(self._model):
            return SHARDED
        if pace_of(self._trainer) is None:
            return "the training dataset has no length"
        return may_change(self._trainer.data_collator) or obstacle(self._rows, self._trainer.data_collator)

    def open(self, steps: int) -> None:
        """Make the frozen blocks run without a graph and, if rows repeat within the steps, fill the cache.

        Args:
            steps: optimizer steps that are left.

        Raises:
            LightPeftError: the folder cannot be written.
        """
        self._prefix = FrozenPrefix(self._model)
        self._prefix.attach()
        args = self._trainer.args
        pace = pace_of(self._trainer)
        if self.cache is None or not self._prefix or (pace and steps * rows_per_step(args) <= pace.rows):
            return
        if self._has_obstacle():  # the cut may have frozen the first block only now, and FSDP shards only now
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
        """Restore the model's blocks, and close the cache."""
        if self._prefix is not None:
            self._prefix.detach()
            self._prefix = None
        if self._cached is not None:
            self._cached.close()
            self._cached = None

    def remove_file(self) -> None:
        """Delete the cache file in `output_dir`, when training is complete; a given `folder` is left to its owner."""
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
        """Training rows as the collator gets them."""
        rows = without_teacher_logits(self._trainer.train_dataset)
        if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
            return used_columns(self._trainer, rows)
        return rows
