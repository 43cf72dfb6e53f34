"""Checkpoints on both sides of the cut: what they hold beside the trainer's own, and how training goes on from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import set_seed

from lightpeft.compat.transformers import TRAINER_STATE_NAME
from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_json, read_tensors, replacing_folder, write_json, write_tensors
from lightpeft.models.sharding import is_sharded
from lightpeft.plans.records import PrunePlan
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan
from lightpeft.recipe.host import LightHost
from lightpeft.saving.adapter_files import DESCRIPTION, read_description
from lightpeft.training.resuming import Checkpoints
from lightpeft.training.schedule import pace_of
from lightpeft.training.step_rows import write_step

_CUT = "lightpeft_cut.json"
"""What says that a checkpoint lies behind the cut."""
_OUTSIDE = "lightpeft_outside.safetensors"
"""What trains beside the PeftModel, in models that have it inside."""


class LightCheckpoints(Checkpoints):
    """Checkpoints of a model that is cut on the way."""

    _trainer: LightHost

    def save(self, folder: Path, write: bool) -> None:
        """Put what a resumed run needs beside what the trainer has written into a checkpoint."""
        trainer = self._trainer
        if trainer.light_plan is None:
            assert trainer._light_pruner is not None
            trainer._light_pruner.estimator.save_state(folder, write=write)
        elif write:
            write_json(folder / _CUT, {**trainer.light_report, "estimation_steps": trainer._estimation_steps})
        if write:
            write_step(folder, trainer.args)
        if write and self._inside:
            _save_outside(trainer.model, trainer._peft_model, folder)

    def at_cut(self, estimation_steps: int, max_steps: int) -> Path:
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
                trainer._peft_model.save_pretrained(temporary)
                write_json(temporary / _CUT, {"estimation_steps": estimation_steps})
                write_step(temporary, trainer.args)
                state.save_to_json(str(temporary / TRAINER_STATE_NAME))
        trainer.accelerator.wait_for_everyone()
        return folder

    def load_weights(self, folder: str, usual: Callable[[], None]) -> None:
        """Cut the model as the checkpoint's is, and load its weights."""
        trainer = self._trainer
        if is_sharded(trainer.model):
            return
        report = read_cut(Path(folder))
        if report is not None:
            trainer.light_report, trainer._estimation_steps = report, int(report["estimation_steps"])
            if trainer._light_pruner is not None and trainer.light_plan is None:
                dense = trainer._light_pruner.estimator.fingerprint
                trainer.light_plan = _cut_as_saved(trainer._peft_model, dense, Path(folder))
        if self._inside:
            _load_inside(trainer.model, trainer._peft_model, Path(folder))
        else:
            super().load_weights(folder, usual)

    def load_random_state(self, checkpoint: str | None, usual: Callable[[str | None], None]) -> None:
        """Load random numbers; right behind the cut there are none to load, and nobody has drawn any."""
        super().load_random_state(checkpoint, usual)
        unknown = checkpoint is not None and not any(Path(checkpoint).glob("rng_state*"))
        if unknown and self._trainer.state.global_step == self._trainer._estimation_steps:
            set_seed(self._trainer.args.seed + 1)

    def load_best(self, usual: Callable[[], None]) -> None:
        """Load the best model, wherever the PeftModel is."""
        if self._inside:
            best = Path(self._trainer.state.best_model_checkpoint)
            _load_inside(self._trainer.model, self._trainer._peft_model, best)
        else:
            super().load_best(usual)

    @property
    def _inside(self) -> bool:
        """Whether the PeftModel is a part of the trainer's model, which then saves and loads in its own way."""
        return self._trainer._peft_model is not self._trainer.model


def read_cut(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of the cut; None in one from before it."""
    if not (folder / _CUT).is_file():
        return None
    report = read_json(folder / _CUT)
    with explain_content_errors(folder / _CUT):
        int(report["estimation_steps"])
    return report


def _cut_as_saved(model: PeftModel, fingerprint: str, folder: Path) -> PrunePlan:
    """Cut a dense model with this fingerprint, in place, to the plan of a checkpoint, without loading its weights."""
    place = _adapter_folder(folder)
    with explain_content_errors(place / DESCRIPTION):
        plan = PrunePlan.from_dict(read_description(place)["plan"])
    require(plan.fingerprint == fingerprint, f"{folder} was made from another base; give the one that it was made from")
    apply_plan(model, plan)
    as_light(model, plan)
    return plan


def _save_outside(model: nn.Module, inside: PeftModel, folder: Path) -> None:
    """Write what trains of a model beside the PeftModel inside it; nothing where nothing does."""
    trained = {name: p.detach() for name, p in _outside(model, inside).items()}
    if trained:
        write_tensors(folder / _OUTSIDE, trained)


def _load_inside(model: nn.Module, inside: PeftModel, folder: Path) -> None:
    """Load the adapter of a checkpoint into the PeftModel inside a model, and what trains beside it."""
    inside.load_adapter(str(_adapter_folder(folder)), str(inside.active_adapter), is_trainable=True)
    saved = read_tensors(folder / _OUTSIDE) if (folder / _OUTSIDE).is_file() else {}
    with torch.no_grad():
        for name, parameter in _outside(model, inside).items():
            require(name in saved, f"{folder} has no weights for {name}")
            parameter.copy_(saved[name])


def _outside(model: nn.Module, inside: PeftModel) -> dict[str, nn.Parameter]:
    own = {id(p) for p in inside.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}


def _adapter_folder(folder: Path) -> Path:
    """Where in a checkpoint the adapter is: models that have it inside save it in a folder of their own."""
    return next((file.parent for file in sorted(folder.rglob("adapter_config.json"))), folder)
