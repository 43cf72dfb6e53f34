"""`EarlyPruner`: Light-PEFT for a model in your own training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightpeft.compat.accelerate import keep_loss_undivided
from lightpeft.compat.fsdp import out_of_fsdp
from lightpeft.config import Light, LightConfig, cut_of_writer, override_light
from lightpeft.errors import require
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.linears.bitsandbytes import prepare_quantized
from lightpeft.models.unwrap import transformers_model
from lightpeft.models.vocabulary.cutting import vocabulary_of
from lightpeft.peft_kinds.sites.live_sites import check_peft, leave_experts
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.planning import check_experts, check_reachable, make_plan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.discovery import ensure_family
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.fingerprint import check_stored
from lightpeft.prune.learning import unlearned_warning
from lightpeft.prune.light_model import LightModel, as_light
from lightpeft.prune.surgery import apply_plan
from lightpeft.recipe.settings import can_write, peft_config_of, settings_of_loop
from lightpeft.recipe.wrapping import check_trainable, remove_disallowed_modules
from lightpeft.training.schedule import name_of_length

_log = logging.getLogger(__name__)
FULL_WIDTH_CALL = "call lightpeft.full_width(light) after training"
"""Way to a full-width model in a loop of one's own, in place of `light.after.keep: both`."""


class EarlyPruner:
    """Estimate, plan and prune a PeftModel in your own training loop (Gu et al. 2024, section 3).

    `LightTrainer` does all of this in one call. In a loop, call `step` between `loss.backward()` and
    `optimizer.step()`. It trains one mask m_i for each head, neuron and expert with the L1 penalty lambda * sum |m_i|,
    and accumulates the scores, by default the Fisher score E[(dL/dm_i)^2] over examples.

    Call the model with its labels, also if the loop computes the loss itself: they show how much of the task it has
    learned, and estimation goes on until that is enough.

    The loop also has to apply the settings for learning rate and dropout. `advice()` lists them, and a warning logs
    them once.

    Example:
        ```python
        pruner = EarlyPruner(get_peft_model(base, lora), light=0.4)
        pruner.start(total_steps)
        while not pruner.finished:
            model(**batch).loss.backward()
            pruner.step()
            optimizer.step(); optimizer.zero_grad()
        light = pruner.prune()  # then make a new optimizer and train on
        ```
    """

    def __init__(
        self,
        model: PeftModel,
        light: Light = None,
        estimator: Callable[[PeftModel, LightConfig], Estimator] = Estimator,
    ) -> None:
        """
        Args:
            model: a model from `peft.get_peft_model`. `prune` cuts it in place. The constructor already removes the
                blocks that `light.remove.depth` drops and the PEFT modules that `light.modules.blocks` does not allow.
            light: fraction of the blocks to remove, such as 0.4, a preset's name, or settings (`LightConfig`, or a
                mapping of its fields); None: a fixed budget for a model that classifies, and no cut of the base for
                others, because a loop cannot search for a budget as `LightTrainer` does.
            estimator: function that makes the `Estimator` from the model and its settings.

        Raises:
            LightPeftError: an unsupported model family, PEFT type, or quantization, unknown settings, an amount that
                cannot be removed from this model, or a vocabulary that should have been cut before.
        """
        self.model = model
        check_stored(model)
        ensure_family(model)
        prepare_quantized(model)
        if isinstance(model, PeftModel):
            leave_experts(model, block_specs(transformers_model(model)))
        check_peft(model)
        check_trainable(model)
        self.config = settings_of_loop(light, peft_config_of(model), model)
        for spec in block_specs(transformers_model(model)):
            check_experts(spec, self.config)
        _check_vocabulary(model, self.config)
        remove_disallowed_modules(model, self.config)
        self.estimator = estimator(model, self.config)
        check_reachable(self.estimator.blocks, self.estimator.left_out, self.config)

    def advice(self) -> Iterator[str]:
        """Yield one line for each setting that the training loop has to apply itself, such as the learning rate."""
        light = self.config
        before, behind, dropout = light.rates.estimation_scale, light.rates.scale, light.rates.base_dropout
        if before == behind != 1:
            yield f"multiply plain PEFT's learning rate by {behind:g}, in both parts of training"
        elif before != behind:
            yield f"multiply plain PEFT's learning rate by {before:g} in estimation, and by {behind:g} after the cut"
        if dropout is not None:
            yield f"train inside `with lightpeft.accelerated(model, dropout={dropout:g}):`"
        if light.after.keep != "light":
            yield f"{FULL_WIDTH_CALL}, for keep: {light.after.keep}"

    def callback(self, resume_from: str | Path | None = None) -> EstimationCallback:
        """Return a `TrainerCallback` that runs the estimation stage and then stops the trainer.

        Args:
            resume_from: checkpoint of an interrupted stage, the one that `train` resumes from; None: start from the
                beginning.

        Raises:
            LightPeftError: `light` is auto, which needs `LightTrainer`.
        """
        self._warn_about_loop()
        return EstimationCallback(self.estimator, resume_from)

    def start(self, total_steps: int | None = None) -> None:
        """Begin estimation in your own loop.

        Args:
            total_steps: optimizer steps of the whole run; needed if `light.estimate.length` is a fraction or auto. The
                first step then makes estimation long enough for its scores, by the number of rows that it saw.

        Raises:
            LightPeftError: estimation has started already, `light` is auto, or the length needs `total_steps`.
        """
        self._warn_about_loop()
        self.estimator.start(total_steps, longer="total_steps")

    def _warn_about_loop(self) -> None:
        measured = "light: auto needs LightTrainer, which measures on training rows; pass a number, such as light=0.4"
        require(not self.config.is_auto, measured)
        lines = "; ".join(self.advice())
        if lines:
            _log.warning("EarlyPruner: your loop has to do what LightTrainer does by itself: %s", lines)
        if self.config.idle_tolerance is not None:
            _log.warning("%s", self.config.idle_tolerance)
        if can_write(self.model) and (line := cut_of_writer(self.config, FULL_WIDTH_CALL)) is not None:
            _log.warning("%s", line)

    def step(self, grad_scale: float = 1.0) -> None:
        """Accumulate scores from the gradients of one optimizer step.

        Args:
            grad_scale: factor by which a gradient scaler has multiplied the gradients; 1: none, or unscaled already.

        Raises:
            LightPeftError: estimation has not started, the first step shows that the run is too short for it, or the
                loss or the gradients are NaN or infinite.
        """
        self.estimator.step(grad_scale)

    @property
    def finished(self) -> bool:
        """True if estimation has run its length."""
        return self.estimator.finished

    def record(self) -> EstimationRecord:
        """Return the scores so far, to inspect or save them, or to make other plans from them.

        Raises:
            LightPeftError: estimation has no steps yet, or its scores are not usable.
        """
        return self.estimator.record()

    def plan(self, light: Light = None) -> PrunePlan:
        """Make a plan from the scores so far.

        Args:
            light: fraction of the blocks to remove, or settings that override those of the pruner; None: its settings.

        Raises:
            LightPeftError: estimation has no steps yet, or the amount cannot be removed.
        """
        return make_plan(self.record(), override_light(self.config, light))

    def prune(self, plan: PrunePlan | None = None) -> LightModel:
        """Cut the model in place to the plan; its `save_pretrained` then writes a light adapter.

        Make a new optimizer afterwards: the old one holds the parameters from before.

        Args:
            plan: the units to keep; None: the plan from the scores and the settings of the pruner.

        Returns:
            The same model, now a `LightModel`, which is a `PeftModel`.

        Raises:
            LightPeftError: the plan does not fit the model, or estimation has no steps yet.
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
    """Refuse `remove.vocabulary: task` unless the vocabulary was cut before; keep PEFT from saving cut embeddings."""
    cut_before = vocabulary_of(transformers_model(model)) is not None
    require(
        cut_before or config.remove.vocabulary == "keep",
        "light.remove.vocabulary: task needs the task's texts; call tokenizer = cut_vocabulary(model, tokenizer, "
        "encoded rows) before get_peft_model (lightpeft run does that by itself)",
    )
    if cut_before:  # PEFT takes embeddings of other sizes than the base's for trained
        model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)


def cut(model: PeftModel, plan: PrunePlan) -> LightModel:
    """Cut a dense model in place to a plan, also under FSDP2.

    Raises:
        LightPeftError: the plan does not fit the model.
    """
    with out_of_fsdp(model):
        apply_plan(model, plan)
        return as_light(model, plan)


class EstimationCallback(TrainerCallback):
    """Run an `Estimator` inside a `transformers.Trainer` (or TRL's trainers) and stop training when it is done."""

    def __init__(self, estimator: Estimator, resume_from: str | Path | None = None) -> None:
        self.estimator = estimator
        self.resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin estimation, or resume an interrupted one."""
        keep_loss_undivided()
        self.estimator.start(state.max_steps, longer=name_of_length(args))
        if self.resume_from is not None:
            self.estimator.load_state(self.resume_from)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Accumulate scores from the step's gradients."""
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        self.estimator.step(scaler.get_scale() if scaler is not None else 1.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the trainer when estimation is done."""
        if self.estimator.finished:
            control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check scores for NaN and infinity, at a point where the trainer waits for the device anyway."""
        self.estimator.check_finite()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state of estimation into the trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.estimator.save_state(folder, write=state.is_world_process_zero)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove masks and observers from the model."""
        self.estimator.stop()
