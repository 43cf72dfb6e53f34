"""Checkpoints before and after the cut: files beside the trainer's own, and how training resumes from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import set_seed

from lightpeft.compat.transformers import TRAINER_STATE_NAME
from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_json, read_tensors, replacing_folder, write_json, write_tensors
from lightpeft.models.all_weights import train_all
from lightpeft.models.sharding import is_sharded
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan
from lightpeft.recipe.host import LightHost
from lightpeft.recipe.settings import settings_of_cut
from lightpeft.saving.adapter_files import DESCRIPTION, read_description
from lightpeft.saving.kept_weights import copy_kept, write_kept
from lightpeft.training.resuming import Checkpoints
from lightpeft.training.schedule import pace_of
from lightpeft.training.step_rows import write_step

_CUT = "lightpeft_cut.json"
"""File that marks a checkpoint as written after the cut."""
_JOINED = "lightpeft_joined.json"
"""File that marks a checkpoint of an estimation in which all weights train."""
_OUTSIDE = "lightpeft_outside.safetensors"
"""File of the trained weights outside the PeftModel, for models that wrap one (sentence-transformers)."""


class LightCheckpoints(Checkpoints):
    """Checkpoints of a model that is cut during training."""

    _trainer: LightHost

    def save(self, folder: Path, write: bool) -> None:
        """Add the files that a resumed run needs to a checkpoint that the trainer has written.

        Args:
            folder: the checkpoint.
            write: True in the process that writes files.
        """
        trainer = self._trainer
        if trainer.light_plan is None:
            assert trainer._light_pruner is not None
            trainer._light_pruner.estimator.save_state(folder, write=write)
            if write and trainer._base_joined:
                write_kept(trainer._peft_model, folder)
                write_json(folder / _JOINED, {"step": trainer._base_joined})
        elif write:
            write_json(folder / _CUT, {**trainer.light_report, "estimation_steps": trainer._estimation_steps})
        if write:
            write_step(folder, trainer.args)
        if write and self._wraps_peft_model:
            _save_outside(trainer.model, trainer._peft_model, folder)

    def write_at_cut(self, estimation_steps: int, max_steps: int) -> Path:
        """Write a checkpoint of a light model right after the cut, from which fine-tuning can start.

        Args:
            estimation_steps: optimizer steps of estimation.
            max_steps: optimizer steps of the whole run.

        Returns:
            Folder of the checkpoint, `checkpoint-<estimation_steps>` in `output_dir`.
        """
        trainer, pace = self._trainer, pace_of(self._trainer)
        folder = Path(trainer.args.output_dir) / f"checkpoint-{estimation_steps}"
        state = copy.copy(trainer.state)
        state.global_step, state.max_steps = estimation_steps, max_steps
        state.epoch = estimation_steps / pace.steps_per_epoch if pace is not None else 0.0
        state.train_batch_size = trainer.args.train_batch_size
        state.compute_steps(trainer.args, max_steps)
        if trainer.is_world_process_zero():
            with replacing_folder(folder, last=TRAINER_STATE_NAME) as temporary:
                trainer._peft_model.save_pretrained(temporary)
                write_json(temporary / _CUT, {"estimation_steps": estimation_steps})
                write_step(temporary, trainer.args)
                state.save_to_json(str(temporary / TRAINER_STATE_NAME))
        trainer.accelerator.wait_for_everyone()
        return folder

    def load_weights(self, folder: str, usual: Callable[[], None]) -> None:
        """Cut the model to the checkpoint's plan if it was written after the cut, and load its weights.

        Args:
            folder: the checkpoint.
            usual: loads the weights as the trainer does by itself.
        """
        trainer = self._trainer
        if is_sharded(trainer.model):
            return
        report = read_cut(Path(folder))
        dense = f"{folder} was written before the cut, and this trainer's model is cut already"
        require(report is not None or trainer.light_plan is None, f"{dense}; make a new trainer from the dense model")
        if report is not None:
            trainer.light_report, trainer._estimation_steps = report, int(report["estimation_steps"])
            if trainer._light_pruner is not None and trainer.light_plan is None:
                fingerprint = trainer._light_pruner.estimator.fingerprint
                trainer.light_plan = _cut_to_saved_plan(trainer._peft_model, fingerprint, Path(folder))
                given, stored = settings_of_cut(trainer.light_config), report.get("light", {})
                if changed := ", ".join(f"light.{name}" for name in stored if stored[name] != given.get(name)):
                    trainer._warn(f"{folder} was cut with another {changed}, and stays so; train anew to cut again")
        inside = partial(_load_inside, trainer.model, trainer._peft_model, Path(folder))
        super().load_weights(folder, inside if self._wraps_peft_model else usual)
        if (joined := Path(folder) / _JOINED).is_file():
            with explain_content_errors(joined):
                trainer._base_joined = int(read_json(joined)["step"])
            copy_kept(trainer._peft_model, Path(folder))
            train_all(trainer._peft_model)

    def load_random_state(self, checkpoint: str | None, usual: Callable[[str | None], None]) -> None:
        """Load the random state; a checkpoint made right after the cut has none, and gets the seed of that moment."""
        super().load_random_state(checkpoint, usual)
        unknown = checkpoint is not None and not any(Path(checkpoint).glob("rng_state*"))
        if unknown and self._trainer.state.global_step == self._trainer._estimation_steps:
            set_seed(self._trainer.args.seed + 1)

    def load_best(self, usual: Callable[[], None]) -> None:
        """Load the best model, also where the PeftModel is wrapped in the trainer's model."""
        if self._wraps_peft_model:
            best = Path(self._trainer.state.best_model_checkpoint)
            _load_inside(self._trainer.model, self._trainer._peft_model, best)
        else:
            super().load_best(usual)

    @property
    def _wraps_peft_model(self) -> bool:
        """True if the PeftModel is a part of the trainer's model, which then saves and loads in its own way."""
        return self._trainer._peft_model is not self._trainer.model


def read_cut(folder: Path) -> dict[str, Any] | None:
    """Read the report on the cut from a checkpoint.

    Returns:
        The report; None if the checkpoint was written before the cut.

    Raises:
        LightPeftError: the file is damaged.
    """
    if not (folder / _CUT).is_file():
        return None
    report = read_json(folder / _CUT)
    with explain_content_errors(folder / _CUT):
        int(report["estimation_steps"])
    return report


def _cut_to_saved_plan(model: PeftModel, fingerprint: str, folder: Path) -> PrunePlan:
    """Cut a dense model in place to the plan of a checkpoint, without loading its weights.

    Raises:
        LightPeftError: the checkpoint was made from a base with another fingerprint.
    """
    place = _adapter_folder(folder)
    with explain_content_errors(place / DESCRIPTION):
        plan = PrunePlan.from_dict(read_description(place)["plan"])
    require(
        plan.fingerprint == fingerprint, f"{folder} was made from another base; pass the base that it was made from"
    )
    apply_plan(model, plan)
    as_light(model, plan)
    return plan


def _save_outside(model: nn.Module, inside: PeftModel, folder: Path) -> None:
    """Write the trained weights of a model that lie outside the PeftModel inside it; no file if there are none."""
    trained = {name: p.detach() for name, p in _parameters_outside(model, inside).items()}
    if trained:
        write_tensors(folder / _OUTSIDE, trained)


def _load_inside(model: nn.Module, inside: PeftModel, folder: Path) -> None:
    """Load a checkpoint's adapter into the PeftModel inside a model, and the trained weights outside that."""
    inside.load_adapter(str(_adapter_folder(folder)), str(inside.active_adapter), is_trainable=True)
    saved = read_tensors(folder / _OUTSIDE) if (folder / _OUTSIDE).is_file() else {}
    with torch.no_grad():
        for name, parameter in _parameters_outside(model, inside).items():
            require(name in saved, f"{folder} has no weights for {name}; resume from a checkpoint of the same model")
            parameter.copy_(saved[name])


def _parameters_outside(model: nn.Module, inside: PeftModel) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model that lie outside the PeftModel inside it, by name."""
    own = {id(p) for p in inside.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}


def _adapter_folder(folder: Path) -> Path:
    """Return the folder of the adapter in a checkpoint: models that wrap a PeftModel save it in a subfolder."""
    return next((file.parent for file in sorted(folder.rglob("adapter_config.json"))), folder)
