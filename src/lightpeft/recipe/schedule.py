"""One optimizer and one schedule before the cut, others behind it."""

from __future__ import annotations

from lightpeft.compat.accelerate import forget_optimizers, prepared
from lightpeft.recipe.host import LightHost
from lightpeft.recipe.parallel import rewrap
from lightpeft.training.schedule import Schedule


class LightSchedule(Schedule):
    """Rate and steps of a light training: those of estimation, and behind the cut those of what is left.

    Attributes:
        last_steps: of the run, that others make behind this training.
    """

    def __init__(self, trainer: LightHost) -> None:
        self.last_steps = 0
        self._trainer, self._scale = trainer, 1.0

    def set_rate(self) -> None:
        """The trainer's learning rate is that of what it trains: all ranks before the cut, and behind it those that
        stay."""
        trainer, light = self._trainer, self._trainer.light_config
        rates = light.rates
        scale = float((rates.estimation_scale if trainer.light_plan is None else rates.scale) or 1.0)
        if trainer.optimizer_cls_and_kwargs is not None:  # with a rate of its own
            kind, settings = trainer.optimizer_cls_and_kwargs
            scaled = {"lr": settings["lr"] / self._scale * scale} if "lr" in settings else {}
            trainer.optimizer_cls_and_kwargs = kind, {**settings, **scaled}
        trainer.args.learning_rate, self._scale = trainer.light_plain_rate * scale, scale

    def steps(self, of_run: int) -> int:
        """Those of the whole run for estimation, and those that are left behind the cut."""
        trainer = self._trainer
        return of_run if trainer.light_plan is None else of_run - trainer._estimation_steps - self.last_steps

    def renew(self, max_steps: int) -> None:
        """A new optimizer of the same sort, and a new scheduler: the parameters are others now."""
        trainer = self._trainer
        rewrap(trainer)
        forget_optimizers(trainer.accelerator)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.create_optimizer()
        trainer.optimizer = prepared(trainer.accelerator, trainer.model, trainer.optimizer)
        trainer.create_scheduler(num_training_steps=max_steps)
        for name in ("optimizer", "lr_scheduler"):
            setattr(trainer.callback_handler, name, getattr(trainer, name))
