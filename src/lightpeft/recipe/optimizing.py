"""One optimizer and one schedule before the cut, others behind it."""

from __future__ import annotations

from typing import Any

from lightpeft.compat.accelerate import forget_optimizers, prepared
from lightpeft.config import LightConfig
from lightpeft.plans.records import PrunePlan
from lightpeft.recipe.parallel import rewrap


class OptimizingMixin:
    """Mixin of `LightTraining`: what its steps are made with."""

    light_config: LightConfig
    light_plan: PrunePlan | None
    light_plain_rate: float
    """Learning rate of plain PEFT: what the trainer was given."""
    _estimation_steps: int
    _rate_scale = 1.0
    _trainer: Any

    def _renew_optimizer(self, max_steps: int) -> None:
        """The parameters are others now."""
        trainer = self._trainer
        rewrap(trainer)
        forget_optimizers(trainer.accelerator)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.create_optimizer()
        trainer.optimizer = prepared(trainer.accelerator, trainer.model, trainer.optimizer)
        trainer.create_scheduler(num_training_steps=max_steps)
        for name in ("optimizer", "lr_scheduler"):
            setattr(trainer.callback_handler, name, getattr(trainer, name))

    def _set_rate(self) -> None:
        """The trainer's learning rate is that of what it trains: all ranks before the cut, and behind it those that
        stay."""
        trainer, light = self._trainer, self.light_config
        scale = light.estimation_rate_scale if self.light_plan is None else light.learning_rate_scale
        if trainer.optimizer_cls_and_kwargs is not None:  # with a rate of its own
            kind, settings = trainer.optimizer_cls_and_kwargs
            scaled = {"lr": settings["lr"] / self._rate_scale * scale} if "lr" in settings else {}
            trainer.optimizer_cls_and_kwargs = kind, {**settings, **scaled}
        trainer.args.learning_rate, self._rate_scale = self.light_plain_rate * scale, scale

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """The trainer's own, at the rate of what trains."""
        self._set_rate()
        return super().create_optimizer(*args, **options)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, *args: Any, **options: Any) -> Any:
        """The trainer's own, over the whole run for estimation, and over the steps that are left after the cut."""
        left = num_training_steps - (self._estimation_steps if self.light_plan is not None else 0)
        return super().create_scheduler(left, *args, **options)  # type: ignore[misc]
