"""Checkpoints on both sides of the cut: what they hold beside the trainer's own, and how training goes on from them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import set_seed

from lightpeft.compat.transformers import TRAINER_STATE_NAME
from lightpeft.files import replacing_folder
from lightpeft.models.sharding import is_sharded
from lightpeft.plans.records import PrunePlan
from lightpeft.recipe.pruner import EarlyPruner
from lightpeft.recipe.resuming import cut_as_saved, load_inside, read_cut, save_outside, write_cut
from lightpeft.training.resuming import ResumingMixin
from lightpeft.training.schedule import pace_of
from lightpeft.training.step_rows import write_step


class CheckpointsMixin(ResumingMixin):
    """Mixin of `LightTraining`: checkpoints of a model that is cut on the way."""

    light_plan: PrunePlan | None
    light_report: dict[str, Any]
    _peft_model: PeftModel
    _light_pruner: EarlyPruner | None
    _estimation_steps: int
    _trainer: Any

    def _save_course(self, folder: Path, write: bool) -> None:
        """Put what a resumed run needs beside what the trainer has written into a checkpoint."""
        if self.light_plan is None:
            assert self._light_pruner is not None
            self._light_pruner.estimator.save_state(folder, write=write)
        elif write:
            write_cut(folder, {**self.light_report, "estimation_steps": self._estimation_steps})
        if write:
            write_step(folder, self._trainer.args)
        if write and self._holds_peft_model:
            save_outside(self._trainer.model, self._peft_model, folder)

    def checkpoint_at_cut(self, estimation_steps: int, max_steps: int) -> Path:
        """Write a checkpoint of a light model from which training goes on behind the cut, and nothing happened since.

        Args:
            estimation_steps: steps that estimation has taken.
            max_steps: of the whole run.

        Returns:
            The checkpoint, among the trainer's own.
        """
        trainer, pace = self._trainer, pace_of(self._trainer)
        folder = Path(trainer.args.output_dir) / f"checkpoint-{estimation_steps}"
        state = copy.copy(trainer.state)
        state.global_step, state.max_steps = estimation_steps, max_steps
        state.epoch = estimation_steps / pace.steps_an_epoch if pace is not None else 0.0
        state.train_batch_size = trainer.args.train_batch_size
        state.compute_steps(trainer.args, max_steps)
        if trainer.is_world_process_zero():
            with replacing_folder(folder, last=TRAINER_STATE_NAME) as temporary:
                self._peft_model.save_pretrained(temporary)
                write_cut(temporary, {"estimation_steps": estimation_steps})
                write_step(temporary, trainer.args)
                state.save_to_json(str(temporary / TRAINER_STATE_NAME))
        trainer.accelerator.wait_for_everyone()
        return folder

    def _load_from_checkpoint(self, folder: str, *args: Any, **options: Any) -> None:
        if is_sharded(self._trainer.model):  # `train` did it before
            return
        report = read_cut(Path(folder))
        if report is not None:
            self.light_report, self._estimation_steps = report, int(report["estimation_steps"])
            if self._light_pruner is not None and self.light_plan is None:
                self.light_plan = cut_as_saved(self._peft_model, self._light_pruner.estimator.fingerprint, Path(folder))
        if self._holds_peft_model:
            load_inside(self._trainer.model, self._peft_model, Path(folder))
        else:
            super()._load_from_checkpoint(folder, *args, **options)

    def _load_best_model(self) -> None:
        if self._holds_peft_model:
            load_inside(self._trainer.model, self._peft_model, Path(self._trainer.state.best_model_checkpoint))
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        unknown = checkpoint is not None and not any(Path(checkpoint).glob("rng_state*"))
        if unknown and self._trainer.state.global_step == self._estimation_steps:  # nobody has drawn a number since
            set_seed(self._trainer.args.seed + 1)

    @property
    def _holds_peft_model(self) -> bool:
        """Whether the PeftModel is a part of the trainer's model, which then saves and loads in its own way."""
        return self._peft_model is not self._trainer.model
