"""Any trainer, on a model whose frozen blocks run without a graph and, where rows come again, only once."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightpeft.machine import processes
from lightpeft.models.sharding import is_sharded
from lightpeft.training.arguments import half_precision
from lightpeft.training.prefix.batches import Numbered, number_rows, with_states
from lightpeft.training.prefix.blocks import FrozenPrefix
from lightpeft.training.prefix.caching import PrefixCache, cache_prefix, obstacle
from lightpeft.training.prefix.states import StateStore
from lightpeft.training.step_rows import rows_a_step

_log = logging.getLogger(__name__)


class PrefixMixin:
    """Mixin of `Trainer` classes.

    Batches say which rows they are made of. Between `_open_prefix` and `_close_prefix` they get what the frozen blocks
    give for these rows where a step begins, so that batches which a loader has made before are none the worse.
    """

    prefix_cache: PrefixCache | None = None
    """How the outputs are kept; None: they are computed every time."""
    _frozen_prefix: FrozenPrefix | None = None
    _prefix_store: StateStore | None = None
    _prefix_rows: Dataset | None = None
    """The training rows as the collator gets them, where their states can be kept."""
    _prefix_obstacle: str | None = None
    """Why they cannot."""
    _prefix_numbering = False

    @property
    def _prefix_folder(self) -> Path:
        """Where a file of outputs goes; it is removed when nobody reads it any more."""
        return Path(self._trainer.args.output_dir) / "prefix"

    def _announce(self, line: str) -> None:
        """Say something worth knowing about the training that begins."""
        _log.info(line)

    def _open_prefix(self, model: nn.Module, steps: int) -> None:
        """Let the frozen blocks of a model run without a graph and, if rows come again within the steps, once.

        Raises:
            LightPeftError: the folder cannot be written.
        """
        self._frozen_prefix = FrozenPrefix(model)
        self._frozen_prefix.attach()
        args, rows = self._trainer.args, self._prefix_rows
        seen = steps * rows_a_step(args)
        if self.prefix_cache is None or not self._frozen_prefix or seen <= len(self._trainer.train_dataset):
            return
        if is_sharded(model):  # all processes have to go through its blocks together, and would not
            self._announce("no prefix cache: processes share the model's weights")
            return
        if rows is None:
            self._announce(f"no prefix cache: {self._prefix_obstacle}")
            return
        self._prefix_store = cache_prefix(
            self._frozen_prefix,
            rows,
            self._trainer.data_collator,
            self.prefix_cache,
            self._prefix_folder,
            batch_size=args.eval_batch_size,
            autocast=half_precision(args),
            announce=self._announce,
        )

    def _close_prefix(self) -> None:
        """The model's blocks compute as before."""
        if self._frozen_prefix is not None:
            self._frozen_prefix.detach()
            self._frozen_prefix = None
        if self._prefix_store is not None:
            self._prefix_store.close()
            self._prefix_store = None

    def _remove_prefix_file(self) -> None:
        """To be called where training is over and not merely stopped."""
        processes().wait_for_everyone()
        if processes().is_main_process:
            shutil.rmtree(self._prefix_folder, ignore_errors=True)

    # -- what Trainer calls --------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The trainer's own; its batches say which rows they are made of, where that can be of use."""
        trainer = self._trainer
        rows, collator = trainer.train_dataset, trainer.data_collator
        if self.prefix_cache is None:
            return super().get_train_dataloader()  # type: ignore[misc]
        if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
            rows = trainer._remove_unused_columns(rows, description="training")
        self._prefix_obstacle = obstacle(rows, collator)
        if self._prefix_obstacle is not None:
            return super().get_train_dataloader()  # type: ignore[misc]
        self._prefix_rows, self._prefix_numbering, trainer.data_collator = rows, True, Numbered(collator)
        try:
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self._prefix_numbering, trainer.data_collator = False, collator

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        rows = super()._remove_unused_columns(dataset, description)  # type: ignore[misc]
        return number_rows(rows) if self._prefix_numbering else rows

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One backward pass, of a batch that brings what is kept of its rows."""
        known = with_states(inputs, self._prefix_store) if self._prefix_rows is not None else inputs
        return super().training_step(model, known, num_items_in_batch)  # type: ignore[misc]

    @property
    def _trainer(self) -> Any:
        """This, as the trainer that it is mixed into."""
        return self
