"""What `recovery.py` compares: a light run as it is, and with one thing done differently.

What settings cannot say is done by a function that runs the stages of `lightpeft run` with something of its own in one.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightpeft.config import Budget, LightConfig, RunConfig
from lightpeft.errors import require
from lightpeft.models.patching import in_mode
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.plans.structure import OUTPUT_SLOTS, BlockSpec
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.importance import RealTokens
from lightpeft.prune.refit import Batches, Correction, Fit, Refit, apply_refit, correction, fit_refit
from lightpeft.prune.surgery import apply_plan
from lightpeft.runs import pipeline
from lightpeft.runs.pipeline import Workspace
from lightpeft.runs.reproduce import Arm, Call
from lightpeft.runs.trainers import LightRun
from lightpeft.tasks.respondent import finite_logits

AS_IT_IS = "as it is"
TEMPERATURE = 2.0
"""Of teacher and student in distillation (Hinton et al. 2015)."""
WEIGHT = 0.5
"""Of the distillation loss beside the task's."""


def pruned(work: Workspace, *, fit: Fit = fit_refit) -> Workspace:
    """The run up to its cut."""
    pipeline.estimate(work)
    pipeline.plan(work)
    pipeline.prune(work, fit)
    return work


def tuned(work: Workspace, *callbacks: TrainerCallback, model: PeftModel | None = None) -> None:
    """The run from its cut on.

    Args:
        model: what trains; None: as the cut left it.
    """
    pipeline.train(work, callbacks, model)
    pipeline.evaluate(work)


# -- scores ------------------------------------------------------------------------------------------------------------


def with_scores(config: RunConfig, *, scale: str, **options: float) -> None:
    """Heads, or neurons, of a layer compete by another scale of what each is worth for its parameters."""
    work = pipeline.prepare(config)
    record = rescaled(pipeline.estimate(work), config.light, partial(SCALES[scale], **options))
    with work.run.held():
        make_plan(record, config.light).save(work.run.plan)
    pipeline.prune(work)
    tuned(work)


def rescaled(record: EstimationRecord, budget: Budget, scale: Callable[[Tensor], Tensor]) -> EstimationRecord:
    """The record with `scale` of what each unit of a layer is worth for its parameters: [units] -> [units]."""
    scores = dict(record.scores)
    for spec in record.blocks:
        a_head = spec.head_parameters + spec.kv_parameters / spec.heads_per_kv
        for kind, size in (
            (f"heads/{budget.head_criterion}", a_head),
            (f"neurons/{budget.neuron_criterion}", spec.neuron_parameters),
        ):
            name = f"{kind}/{spec.index}"
            scores[name] = scale(scores[name].double() / size) * size
    return replace(record, scores=scores)


def standardised(values: Tensor) -> Tensor:
    """With mean 0 and standard deviation 1, equal values with 0: [units] -> [units]."""
    return (values - values.mean()) / values.std(correction=0).clamp_min(torch.finfo(values.dtype).tiny)


def by_mean(values: Tensor, power: float = 1.0) -> Tensor:
    """With mean 1, or with a smaller power part of the way there: [units] -> [units]."""
    return values / values.mean() ** power


SCALES: Mapping[str, Callable[..., Tensor]] = {"standardised": standardised, "by_mean": by_mean}


# -- gradual cuts ------------------------------------------------------------------------------------------------------


def gradual(config: RunConfig, *, cuts: int) -> None:
    """Estimation cuts in so many steps."""
    work = pipeline.prepare(config)
    pipeline.estimate(work, cutting(cuts))
    tuned(pruned(work))


def cutting(cuts: int) -> type[LightRun]:
    """The trainer of a light run, whose estimation cuts in so many steps."""
    return estimating(partial(GradualEstimator, cuts=cuts))


def estimating(
    estimator: Callable[[PeftModel, LightConfig], Estimator] = Estimator, *own: TrainerCallback
) -> type[LightRun]:
    """The trainer of a light run that estimates in another way.

    Args:
        estimator: makes what estimates.
        own: callbacks of that.
    """

    class Estimating(LightRun):
        def __init__(self, *args: Any, callbacks: Sequence[TrainerCallback] = (), **options: Any) -> None:
            super().__init__(*args, callbacks=[*callbacks, *own], **options)

        def make_light_estimator(self, model: PeftModel, light: LightConfig) -> Estimator:
            return estimator(model, light)

    return Estimating


class GradualEstimator(Estimator):
    """Estimation that cuts in equal steps: at each, masks of the weakest units become zero, and stay so.

    The last cut is the plan's. Units that went before have score zero in its record.
    """

    def __init__(self, model: PeftModel, config: LightConfig, cuts: int) -> None:
        """
        Raises:
            LightPeftError: `config.blocks`, the budget that is divided into steps, is unset.
        """
        super().__init__(model, config)
        require(config.blocks is not None, "gradual cuts divide light.blocks; set it")
        self.cuts = cuts
        self.stays: Tensor | None = None

    def step(self, grad_scale: float = 1.0) -> None:
        super().step(grad_scale)
        if self.stays is not None:
            with torch.no_grad():
                self._hold(self.stays)

    def _hold(self, stays: Tensor) -> None:
        """What goes is masked; `stays` is 1 for all else, flat like the masks."""
        self.masks.values.mul_(stays)

    def _at_boundary(self) -> bool:
        return self.steps in [round(self.length * cut / self.cuts) for cut in range(1, self.cuts + 1)]

    def _close_window(self) -> None:
        super()._close_window()
        if self.steps < self.length:
            self.stays = self._flags(make_plan(self._record(), self._budget()))

    def _budget(self) -> LightConfig:
        """What goes at this cut."""
        return replace(self.config, blocks=(self.config.known_blocks or 0.0) * self.steps / self.length)

    def _unit_scores(self, sums: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
        scores = super()._unit_scores(sums, steps)
        if self.stays is None:
            return scores
        of_kinds: dict[str, list[Tensor]] = dict(self.masks.split(self.stays.cpu()).items())
        parts = {name: name.split("/") for name in scores}
        return {name: scores[name] * of_kinds[kind][int(index)] for name, (kind, _, index) in parts.items()}

    def _flags(self, plan: PrunePlan) -> Tensor:
        """1 for the units that the plan keeps, flat like the masks."""
        flags = torch.zeros_like(self.masks.values)
        for kind, parts in self.masks.split(flags).items():
            for kept, part in zip(plan.blocks, parts, strict=True):
                part[list(getattr(kept, kind))] = 1.0
        return flags


class FadingEstimator(GradualEstimator):
    """Estimation over whose second half the masks of what will go fall to zero, on a line; the first half says what."""

    def __init__(self, model: PeftModel, config: LightConfig) -> None:
        super().__init__(model, config, cuts=2)

    def _hold(self, stays: Tensor) -> None:
        first = self._windows[0].end
        left = 1 - (self.steps - first) / (self.length - first)
        self.masks.values.copy_(stays + (1 - stays) * left)

    def _budget(self) -> LightConfig:
        return self.config


# -- refit -------------------------------------------------------------------------------------------------------------


def in_order(config: RunConfig) -> None:
    """The refit goes from projection to projection."""
    tuned(pruned(pipeline.prepare(config), fit=refit_in_order))


def refit_in_order(model: PeftModel, plan: PrunePlan, batches: Batches, rank: int) -> Refit:
    """Like `fit_refit`, projection after projection: each is corrected for what reaches it in the pruned model, with
    the corrections before it in place, to give what the dense model gives there."""
    pruned = copy.deepcopy(model)
    apply_plan(pruned, plan)
    result: Refit = {}
    for spec, slot in [(spec, slot) for spec in plan.specs for slot in OUTPUT_SLOTS if slot in spec.projections]:
        _, wanted = states_at(model, spec, slot, batches)
        inputs, outputs = states_at(pruned, spec, slot, batches)
        fitted = map_to(inputs, wanted - outputs, rank)
        apply_refit(pruned, {spec.projections[slot]: fitted})
        result[spec.projections[slot]] = fitted
    return result


def map_to(inputs: Tensor, outputs: Tensor, rank: int) -> Correction:
    """The correction that, read from inputs [tokens, in], is nearest to outputs [tokens, out]."""
    (tokens, width), out = inputs.shape, outputs.shape[1]
    pairs = torch.cat([inputs, outputs, inputs.new_ones(tokens, 1)], dim=1)
    second_half = torch.cat([inputs.new_zeros(out, width), torch.eye(out, device=inputs.device)], dim=1)
    index = torch.arange(width, device=inputs.device)
    return correction(pairs.T @ pairs / tokens, second_half, inputs.new_zeros(out, width), index, rank, torch.bfloat16)


@torch.no_grad()
def states_at(model: PeftModel, spec: BlockSpec, slot: str, batches: Batches) -> tuple[Tensor, Tensor]:
    """What a projection reads and gives, [tokens, width] each, at all real tokens."""
    seen: list[tuple[Tensor, Tensor]] = []
    real = RealTokens(model)

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append((real.select(args[0], spec, slot).float(), real.select(output, spec, slot).float()))

    handle = transformers_model(model).get_submodule(spec.projections[slot]).register_forward_hook(note)
    with in_mode(model, training=False):
        for batch in batches():
            model(**batch)
    handle.remove()
    real.remove()
    inputs, outputs = zip(*seen, strict=True)
    return torch.cat(inputs), torch.cat(outputs)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def at_full_rate(config: RunConfig) -> None:
    """The learning rate does not rise again after the cut."""
    work = pruned(pipeline.prepare(config))
    training = replace(work.config.training, warmup=0.0)
    tuned(replace(work, config=replace(work.config, training=training)))


def distilled(config: RunConfig) -> None:
    """The pruned model also learns the class probabilities of the dense one, as estimation left it.

    They are computed once for every training row; there is no teacher in memory while the pruned model trains.
    """
    work = pruned(pipeline.prepare(config))
    started = time.perf_counter()
    taught = dict(zip(map(tuple, work.train_rows["input_ids"]), teacher_logits(work), strict=True))
    work.run.finish_stage("teacher", time.perf_counter() - started, save=lambda: None)
    tuned(work, Distillation(taught))


def teacher_logits(work: Workspace) -> list[Tensor]:
    """Logits of the dense model at the end of estimation for every training row."""
    model = PeftModel.from_pretrained(work.dense_model().model, str(work.run.estimation / "adapter"))
    return list(finite_logits(work.asking(model), work.train_rows))


class WithLoss(TrainerCallback, ABC):
    """While the model trains, its loss has another one in it."""

    @abstractmethod
    def loss(self, own: Tensor, logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """What is trained for.

        Args:
            own: the model's loss.
            logits: that it is of.
            inputs: of the model.
        """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.handle = kwargs["model"].register_forward_hook(self._replace_loss, with_kwargs=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.handle.remove()

    def _replace_loss(self, model: nn.Module, args: Any, inputs: Mapping[str, Tensor], outputs: Any) -> None:
        outputs["loss"] = self.loss(outputs["loss"], outputs["logits"], inputs)


def tokens_of(inputs: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """Each row's tokens, padding left out."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [tuple(ids[real].tolist()) for ids, real in rows]


class Distillation(WithLoss):
    """Learns a teacher's class probabilities beside the labels."""

    def __init__(self, teacher: Mapping[tuple[int, ...], Tensor]) -> None:
        """
        Args:
            teacher: logits [classes] of each training row, by its tokens.
        """
        self.teacher = teacher

    def loss(self, own: Tensor, logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        teacher = torch.stack([self.teacher[row] for row in tokens_of(inputs)])
        return (1 - WEIGHT) * own + WEIGHT * distillation(logits, teacher.to(logits.device))


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy to the teacher's softened probabilities, less their entropy: [rows, classes] each -> scalar."""
    of_student, of_teacher = (log_softmax(logits.float() / TEMPERATURE, dim=-1) for logits in (student, teacher))
    return kl_div(of_student, of_teacher, log_target=True, reduction="batchmean") * TEMPERATURE**2


def _calling(function: str, settings: Mapping[str, Any] | None = None, **arguments: Any) -> Arm:
    return Arm(settings or {}, call=Call(f"recovery_arms:{function}", arguments))


WHOLE = {"light": {"refit": "low_rank", "refit_rank": 1536, "refit_rows": 512}}
"""A refit whose matrices have as many ranks as there are."""
ARMS: dict[str, Arm] = {
    AS_IT_IS: Arm({}),
    "scores standardised in each layer": _calling("with_scores", scale="standardised"),
    "scores divided by their layer's mean": _calling("with_scores", scale="by_mean"),
    "scores divided by its square root": _calling("with_scores", scale="by_mean", power=0.5),
    "cut in two steps": _calling("gradual", cuts=2),
    "cut in four steps": _calling("gradual", cuts=4),
    "distilled from the dense model": _calling("distilled"),
    "refit: low_rank": Arm({"light": {"refit": "low_rank"}}),
    "refit by whole matrices": Arm(WHOLE),
    "refit by whole matrices, in order": _calling("in_order", WHOLE),
    # one start for all seeds
    "modules start anew": Arm({"light": {"restart": True, "seed": 0}}),
    "no warmup after the cut": _calling("at_full_rate"),
}
