"""`EarlyPruner`: the composable face of Light-PEFT for a model and a training loop of your own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightpeft.compat.accelerate import divide_no_loss
from lightpeft.compat.fsdp import out_of_fsdp
from lightpeft.config import Light, LightConfig, cut_of_writer, override_light
from lightpeft.errors import require
from lightpeft.models.families.registry import block_specs
from lightpeft.models.linears.bitsandbytes import prepare_quantised
from lightpeft.models.unwrap import transformers_model
from lightpeft.models.vocabulary.cutting import vocabulary_of
from lightpeft.peft_kinds.sites.registry import check_peft, leave_experts
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.prune.discovery import ensure_family
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.fingerprint import check_stored
from lightpeft.prune.learning import unlearned_warning
from lightpeft.prune.light_model import LightModel, as_light
from lightpeft.prune.surgery import apply_plan, check_amount
from lightpeft.recipe.settling import can_write, peft_config_of, settings_of_loop
from lightpeft.recipe.wrapping import leave_modules

_log = logging.getLogger(__name__)


class EarlyPruner:
    """Estimate, plan, prune: the three steps around any training loop.

    With a `Trainer`, `LightTrainer` is all of it in one call. With a loop of your own, between `loss.backward()` and
    `optimizer.step()`:

        pruner.start(total_steps)
        while not pruner.finished:
            model(**batch).loss.backward()
            pruner.step()
            optimizer.step(); optimizer.zero_grad()
        light = pruner.prune()          # then make a new optimizer and train on

    What else the settings say is the loop's to do; `advice()` lists it, and it is logged once as a warning.
    """

    def __init__(
        self,
        model: PeftModel,
        light: Light = None,
        estimator: Callable[[PeftModel, LightConfig], Estimator] = Estimator,
    ) -> None:
        """
        Args:
            model: what `peft.get_peft_model` returned. It is pruned in place by `prune`; the blocks that
                `light.remove.depth` leaves out, and the PEFT modules that `light.modules.blocks` does not allow, are
                taken out here.
            light: part of the blocks to remove, such as 0.4, a preset's name, or settings (`LightConfig`, or a mapping
                of its fields); None: a fixed budget that is safe for a model that classifies, and nothing else goes of
                the base, since a loop cannot search as `LightTrainer` does.
            estimator: makes what estimates.

        Raises:
            LightPeftError: an unsupported model family, PEFT type, or quantisation, unknown settings, an amount that
                a quantised layer or the model's depth cannot have, or a vocabulary that should have been cut before.
        """
        self.model = model
        check_stored(model)
        ensure_family(model)
        prepare_quantised(model)
        if isinstance(model, PeftModel):
            leave_experts(model, block_specs(transformers_model(model)))
        check_peft(model)
        self.config = settings_of_loop(light, peft_config_of(model), model)
        check_amount(model, self.config)
        _check_vocabulary(model, self.config)
        leave_modules(model, self.config)
        self.estimator = estimator(model, self.config)

    def advice(self) -> Iterator[str]:
        """What the settings ask of a training loop, one line each."""
        light = self.config
        before, behind, dropout = light.rates.estimation_scale, light.rates.scale, light.rates.base_dropout
        if before == behind != 1:
            yield f"multiply plain PEFT's learning rate by {behind:g}, in both parts of training"
        elif before != behind:
            yield f"multiply plain PEFT's learning rate by {before:g} in estimation, and by {behind:g} behind the cut"
        if dropout is not None:
            yield f"train inside `with lightpeft.accelerated(model, dropout={dropout:g}):`"
        if light.after.keep != "light":
            yield f"call lightpeft.full_width(light) in the end, for keep: {light.after.keep}"

    def callback(self, resume_from: str | Path | None = None) -> EstimationCallback:
        """A `TrainerCallback` that runs the estimation stage and then stops the trainer.

        Args:
            resume_from: a trainer checkpoint of an interrupted stage, the same that `train` resumes from.
        """
        self._say()
        return EstimationCallback(self.estimator, resume_from)

    def start(self, total_steps: int | None = None) -> None:
        """Begin the stage in a loop of your own; a fractional length needs the `total_steps` of the whole run."""
        self._say()
        self.estimator.start(total_steps)

    def _say(self) -> None:
        measured = "light: auto is measured on training rows, which LightTrainer has; give a number, such as light=0.4"
        require(not self.config.is_auto, measured)
        lines = "; ".join(self.advice())
        if lines:
            _log.warning("EarlyPruner leaves to your loop what LightTrainer does by itself: %s", lines)
        if can_write(self.model) and (line := cut_of_writer(self.config)) is not None:
            _log.warning("%s", line)

    def step(self, grad_scale: float = 1.0) -> None:
        """Take in one optimizer step's gradients; `grad_scale` is the scale of a gradient scaler that is still on."""
        self.estimator.step(grad_scale)

    @property
    def finished(self) -> bool:
        """Whether the stage has run its length."""
        return self.estimator.finished

    def record(self) -> EstimationRecord:
        """The scores, to inspect, to save, or to make other plans from."""
        return self.estimator.record()

    def plan(self, light: Light = None) -> PrunePlan:
        """The plan by the pruner's settings, with others on top: a part of the blocks, or settings."""
        return make_plan(self.record(), override_light(self.config, light))

    def prune(self, plan: PrunePlan | None = None) -> LightModel:
        """Cut the model down to the plan, in place; it stays a `PeftModel` and its `save_pretrained` a light adapter.

        Make a new optimizer afterwards: the old one holds the parameters from before.
        """
        if plan is None:
            record = self.record()
            plan = make_plan(record, self.config)
            line = unlearned_warning(record) if plan.removed_of_blocks else None
            if line is not None:
                _log.warning("%s", line)
        self.estimator.stop()
        return cut(self.model, plan)


def _check_vocabulary(model: PeftModel, config: LightConfig) -> None:
    """Refuse to cut a vocabulary here, where no text is; of one that is cut, let PEFT save no embeddings."""
    cut_before = vocabulary_of(transformers_model(model)) is not None
    require(
        cut_before or config.remove.vocabulary == "keep",
        "vocabulary: task needs the task's texts before PEFT is on the model: tokenizer = cut_vocabulary(model, "
        "tokenizer, encoded rows) does it; lightpeft run does it by itself",
    )
    if cut_before:  # PEFT takes embeddings of other sizes than the base's for trained
        model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)


def cut(model: PeftModel, plan: PrunePlan) -> LightModel:
    """Cut a dense model down to a plan, in place, wherever its weights are.

    Raises:
        LightPeftError: the plan does not fit.
    """
    with out_of_fsdp(model):
        apply_plan(model, plan)
        return as_light(model, plan)


class EstimationCallback(TrainerCallback):
    """Runs an `Estimator` inside a `transformers.Trainer` (or TRL's trainers) and stops the run when it is done."""

    def __init__(self, estimator: Estimator, resume_from: str | Path | None = None) -> None:
        self.estimator = estimator
        self.resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the stage, or go on with an interrupted one."""
        divide_no_loss()
        self.estimator.start(state.max_steps)
        if self.resume_from is not None:
            self.estimator.load_state(self.resume_from)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in the step's gradients."""
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        self.estimator.step(scaler.get_scale() if scaler is not None else 1.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the trainer when the stage is done."""
        if self.estimator.finished:
            control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look for divergence where the trainer waits for the device anyway."""
        self.estimator.check_finite()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the stage's state into the trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.estimator.save_state(folder, write=state.is_world_process_zero)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take masks and observers off the model."""
        self.estimator.stop()
