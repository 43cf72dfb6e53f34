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

from lightpeft.compat.accelerate import divide_no_loss
from lightpeft.training.fitting import meeting_others
from lightpeft.training.prefix import TrainerPrefix
from lightpeft.training.resuming import Checkpoints
from lightpeft.training.rows import repeatable
from lightpeft.training.schedule import Schedule
from lightpeft.training.sharding import Sharding
from lightpeft.training.step_loss import step_loss
from lightpeft.training.teaching import Teaching

if TYPE_CHECKING:
    from lightpeft.training.host import Host as _Below
else:
    _Below = object  # at run time the trainer's class stands behind this one


class Training(_Below):
    """Mixin of `Trainer` classes: repeatable batches, sharded models, checkpoints of one process, a frozen prefix, a
    teacher.

    Methods of `Trainer` are extended here and nowhere else in lightpeft, in the order in which a training comes to
    them. Each hands on to one of the trainer's parts, and its first line says why it has to be. `LightTraining` puts
    parts of its own in the place of some; what it does around a training is `_training`.
    """

    # -- the parts -----------------------------------------------------------------------------------------------

    @cached_property
    def _sharding(self) -> Sharding:
        """FSDP2."""
        return Sharding(self)

    @cached_property
    def _checkpoints(self) -> Checkpoints:
        """What is written to checkpoints, and read from them."""
        return Checkpoints(self, self._sharding)

    @cached_property
    def _schedule(self) -> Schedule:
        """Learning rate and steps of the optimizer."""
        return Schedule()

    @cached_property
    def _prefix(self) -> TrainerPrefix:
        """The frozen lower blocks."""
        return TrainerPrefix(self, self._sharding)

    @cached_property
    def _teaching(self) -> Teaching:
        """What a teacher has said of the training rows."""
        return Teaching(self)

    # -- a trainer is made ---------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """A loss is divided once, and sharding asked for in vain is refused before `Trainer` goes on without it."""
        super().create_accelerator_and_postprocess()
        divide_no_loss()
        self._sharding.check()

    # -- training begins -----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """Something has to be done before the first step, also where none is taken, and behind the last one."""
        checkpoint = self._checkpoints.to_resume(resume_from_checkpoint)
        with self._training(checkpoint):
            return super().train(checkpoint, *args, **options)

    def get_train_dataloader(self) -> Any:
        """Collators know nothing of a teacher's logits."""
        with self._teaching.batching(training=True):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **options: Any) -> Any:
        """Rows to evaluate on may have such logits, and no use for them."""
        with self._teaching.batching(training=False):
            return super().get_eval_dataloader(*args, **options)

    def _set_signature_columns_if_needed(self) -> None:
        """`Trainer` drops columns that are neither arguments of the model nor labels."""
        with self._teaching.keeping_column():
            super()._set_signature_columns_if_needed()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """`Trainer` draws batches by length from random numbers that a resumed run does not have."""
        return repeatable(super()._get_train_sampler(train_dataset), self)

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """All ranks and the few that stay have learning rates of their own."""
        self._schedule.set_rate()
        return super().create_optimizer(*args, **options)

    def create_scheduler(self, num_training_steps: int, *args: Any, **options: Any) -> Any:
        """Behind the cut a schedule is over the steps that are left."""
        return super().create_scheduler(self._schedule.steps(num_training_steps), *args, **options)

    def _load_from_checkpoint(self, folder: str, *args: Any, **options: Any) -> None:
        """Weights of a checkpoint fit the model only once it is cut as they are, and before it is sharded."""
        self._checkpoints.load_weights(folder, partial(super()._load_from_checkpoint, folder, *args, **options))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Their states are those of one process."""
        self._checkpoints.load_states(checkpoint, super()._load_optimizer_and_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Right behind the cut there is none."""
        self._checkpoints.load_random_state(checkpoint, super()._load_rng_state)

    # -- a step --------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """FSDP averages gradients of what it shards alone, and they are clipped before a callback could."""
        loss = super().training_step(*args, **options)
        self._sharding.average()
        return loss

    def autocast_smart_context_manager(self, *args: Any, **options: Any) -> Any:
        """FSDP computes what it shards in half precision, and what trains is not."""
        return self._sharding.autocast() or super().autocast_smart_context_manager(*args, **options)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """`Trainer` adds up the means of a step's parts where a loss does not read how many labels these have, and
        knows no teacher."""
        lesson = self._teaching.lesson(model, inputs)
        usual = partial(super().compute_loss, model, inputs, *args)
        if lesson is not None and not args:
            usual = partial(lesson.loss, usual)
        return usual(**options) if args else step_loss(usual, self, options, plain=self.has_plain_loss())

    def has_plain_loss(self) -> bool:
        """Whether the loss is computed by `Trainer`'s own method."""
        return super().compute_loss.__func__ is Trainer.compute_loss  # type: ignore[attr-defined]

    # -- a checkpoint, and the end -------------------------------------------------------------------------------

    def save_model(self, *args: Any, **options: Any) -> None:
        """Of a sharded model the adapter is written, once."""
        with self._sharding.as_one_process():
            super().save_model(*args, **options)

    def _save_optimizer_and_scheduler(self, *args: Any, **options: Any) -> None:
        """Their states are those of one process."""
        with self._sharding.as_one_process():
            super()._save_optimizer_and_scheduler(*args, **options)

    def _load_best_model(self) -> None:
        """`Trainer` loads no best model that has the PeftModel inside."""
        self._checkpoints.load_best(super()._load_best_model)

    # -- around all of it ----------------------------------------------------------------------------------------

    @contextmanager
    def _training(self, checkpoint: str | None) -> Iterator[None]:
        """Inside the block the trainer trains.

        Args:
            checkpoint: that it goes on from.
        """
        try:
            with meeting_others():
                self._teaching.check(plain=self.has_plain_loss())
                self._prefix.foresee()
                self._sharding.before(checkpoint)
                yield
        finally:
            self._prefix.close()
