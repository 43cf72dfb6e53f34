# mypy: disable-error-code="safe-super"
"""The one class that extends methods of `transformers.Trainer`, and of whatever trainer is built on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from lightpeft.compat.accelerate import keep_loss_undivided
from lightpeft.training.fitting import reporting_lost_processes
from lightpeft.training.prefix import TrainerPrefix
from lightpeft.training.resuming import Checkpoints
from lightpeft.training.rows import with_repeatable_order
from lightpeft.training.schedule import Schedule
from lightpeft.training.sharding import Sharding
from lightpeft.training.step_loss import step_loss
from lightpeft.training.teaching import Teaching

if TYPE_CHECKING:
    from lightpeft.training.host import Host as _Below
else:
    _Below = object  # at run time the trainer's class stands behind this one


class Training(_Below):
    """Mixin of `Trainer` classes: repeatable batches, sharded models, checkpoints as of one process, a frozen prefix,
    distillation.

    Methods of `Trainer` are extended here and nowhere else in lightpeft, in the order in which a training calls them.
    Each delegates to one of the trainer's parts, and its docstring says why. `LightTraining` replaces some of the
    parts, and does its own work around a training in `_training`.
    """

    # -- the parts -----------------------------------------------------------------------------------------------

    @cached_property
    def _sharding(self) -> Sharding:
        """Support for FSDP2."""
        return Sharding(self)

    @cached_property
    def _checkpoints(self) -> Checkpoints:
        """Reading and writing of checkpoints."""
        return Checkpoints(self, self._sharding)

    @cached_property
    def _schedule(self) -> Schedule:
        """Learning rate and steps of the optimizer."""
        return Schedule()

    @cached_property
    def _prefix(self) -> TrainerPrefix:
        """Frozen lower blocks, and the cache of their outputs."""
        return TrainerPrefix(self, self._sharding)

    @cached_property
    def _teaching(self) -> Teaching:
        """Distillation from a teacher's logits."""
        return Teaching(self)

    # -- a trainer is made ---------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Let a loss be divided once, and refuse unsupported sharding before `Trainer` ignores it or fails later."""
        super().create_accelerator_and_postprocess()
        keep_loss_undivided()
        self._sharding.check()

    # -- training begins -----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """Wrap the whole training: some work comes before the first step and after the last one."""
        checkpoint = self._checkpoints.to_resume(resume_from_checkpoint)
        with self._training(checkpoint):
            return super().train(checkpoint, *args, **options)

    def get_train_dataloader(self) -> Any:
        """Collate a teacher's logits, which collators do not support."""
        with self._teaching.batching(training=True):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **options: Any) -> Any:
        """Drop a teacher's logits from rows for evaluation."""
        with self._teaching.batching(training=False):
            return super().get_eval_dataloader(*args, **options)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the column of a teacher's logits: `Trainer` drops columns that are no arguments of the model."""
        with self._teaching.keeping_column():
            super()._set_signature_columns_if_needed()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Make the order repeatable: `Trainer` draws it from a random state that a resumed run does not have."""
        return with_repeatable_order(super()._get_train_sampler(train_dataset), self)

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Set the learning rate first: it differs before and after the cut."""
        self._schedule.set_rate()
        return super().create_optimizer(*args, **options)

    def create_scheduler(self, num_training_steps: int, *args: Any, **options: Any) -> Any:
        """Schedule the remaining steps only after the cut."""
        return super().create_scheduler(self._schedule.steps(num_training_steps), *args, **options)

    def _load_from_checkpoint(self, folder: str, *args: Any, **options: Any) -> None:
        """Cut the model first if the checkpoint's was cut, and load weights before the model is sharded."""
        self._checkpoints.load_weights(folder, partial(super()._load_from_checkpoint, folder, *args, **options))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load states that were saved as by one process, also under FSDP."""
        self._checkpoints.load_states(checkpoint, super()._load_optimizer_and_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Accept a checkpoint without random state, as is written right after the cut."""
        self._checkpoints.load_random_state(checkpoint, super()._load_rng_state)

    # -- a step --------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Average the gradients that FSDP does not, before they are clipped, which a callback could not do."""
        loss = super().training_step(*args, **options)
        self._sharding.average()
        return loss

    def autocast_smart_context_manager(self, *args: Any, **options: Any) -> Any:
        """Use autocast under FSDP, whose mixed precision leaves out trained weights."""
        return self._sharding.autocast() or super().autocast_smart_context_manager(*args, **options)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """Add the teacher's loss, and correct losses that ignore `num_items_in_batch`: `Trainer` would add up means."""
        distillation = self._teaching.distillation(model, inputs)
        self._see_labels(inputs)
        usual = partial(super().compute_loss, model, inputs, *args)
        if distillation is not None and not args and self._learns_from_teacher():
            usual = partial(distillation.loss, usual)
        return usual(**options) if args else step_loss(usual, self, options, plain=self.has_plain_loss())

    def _see_labels(self, inputs: Any) -> None:
        """Look at the labels of a batch before the loss takes them out of it. Can be overridden."""

    def _learns_from_teacher(self) -> bool:
        """Return whether the loss includes that of a teacher, if there is one. Can be overridden."""
        return True

    def has_plain_loss(self) -> bool:
        """Return True if the loss is computed by `Trainer`'s own method."""
        return super().compute_loss.__func__ is Trainer.compute_loss  # type: ignore[attr-defined]

    # -- a checkpoint, and the end -------------------------------------------------------------------------------

    def save_model(self, *args: Any, **options: Any) -> None:
        """Write a sharded model's adapter once, as by one process."""
        with self._sharding.as_one_process():
            super().save_model(*args, **options)

    def _save_optimizer_and_scheduler(self, *args: Any, **options: Any) -> None:
        """Save states as by one process, also under FSDP."""
        with self._sharding.as_one_process():
            super()._save_optimizer_and_scheduler(*args, **options)

    def _load_best_model(self) -> None:
        """Load the best model also if it wraps the PeftModel, which `Trainer` does not support."""
        self._checkpoints.load_best(super()._load_best_model)

    # -- around all of it ----------------------------------------------------------------------------------------

    @contextmanager
    def _training(self, checkpoint: str | None) -> Iterator[None]:
        """Prepare the trainer before the block, in which it trains, and clean up afterwards.

        Args:
            checkpoint: checkpoint to resume from; None: start anew.
        """
        try:
            with reporting_lost_processes():
                self._teaching.check(plain=self.has_plain_loss())
                self._prefix.announce_obstacle()
                self._sharding.before(checkpoint)
                yield
        finally:
            self._prefix.close()
