"""Learning rate, optimizer and scheduler: one of each before the cut, and new ones after it."""

from __future__ import annotations

from lightpeft.compat.accelerate import forget_optimizers, prepare_optimizer
from lightpeft.recipe.host import LightHost
from lightpeft.recipe.parallel import rewrap
from lightpeft.training.schedule import Schedule


class LightSchedule(Schedule):
    """Learning rate and scheduler steps of estimation, and of fine-tuning after the cut.

    Attributes:
        last_steps: final optimizer steps of the run that are trained elsewhere (at full width).
    """

    def __init__(self, trainer: LightHost) -> None:
        self.last_steps = 0
        self._trainer, self._scale = trainer, 1.0

    def set_rate(self) -> None:
        """Set the trainer's learning rate: plain PEFT's, times `rates.estimation_scale` while PEFT trains alone before
        the cut, and else times `rates.scale`: fewer ranks train then, or all weights."""
        trainer, light = self._trainer, self._trainer.light_config
        rates, alone = light.rates, trainer.light_plan is None and not trainer._base_joined
        scale = float((rates.estimation_scale if alone else rates.scale) or 1.0)
        if trainer.optimizer_cls_and_kwargs is not None:  # with a rate of its own
            kind, settings = trainer.optimizer_cls_and_kwargs
            scaled = {"lr": settings["lr"] / self._scale * scale} if "lr" in settings else {}
            trainer.optimizer_cls_and_kwargs = kind, {**settings, **scaled}
        trainer.args.learning_rate, self._scale = trainer.light_plain_rate * scale, scale

    def steps(self, of_run: int) -> int:
        """Return the steps of the next scheduler: all of the run, and once other weights train the remaining ones."""
        trainer = self._trainer
        if trainer.light_plan is None:
            return of_run - trainer._base_joined
        return of_run - trainer._estimation_steps - self.last_steps

    def renew(self, max_steps: int) -> None:
        """Replace optimizer and scheduler by new ones of the same kind, for the parameters of the cut model."""
        trainer = self._trainer
        rewrap(trainer)
        forget_optimizers(trainer.accelerator)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.create_optimizer()
        trainer.optimizer = prepare_optimizer(trainer.accelerator, trainer.model, trainer.optimizer)
        trainer.create_scheduler(num_training_steps=max_steps)
        for name in ("optimizer", "lr_scheduler"):
            setattr(trainer.callback_handler, name, getattr(trainer, name))
