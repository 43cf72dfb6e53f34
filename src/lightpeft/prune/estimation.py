"""The estimation stage: masks and PEFT modules train together while the importance of every unit is summed up.

It works in any training loop. The masks are no parameters of the model: they have their own gradients and their own
optimizer, and the L1 term is added to their gradient directly, so a loop needs one call between backward and
`optimizer.step()`.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from lightpeft.config import LightConfig, fill_defaults
from lightpeft.errors import LightPeftError, require
from lightpeft.files import explain_content_errors, read_json, read_tensors, write_json, write_tensors
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.sharding import whole
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.base import Site
from lightpeft.peft_kinds.sites.live_sites import check_peft, find_sites
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.scoring import Criterion, Facts, MaskGradients, Unit, criteria
from lightpeft.plans.structure import MASKED, MaskedUnit
from lightpeft.profiling.sizes import count_parameters
from lightpeft.profiling.surroundings import versions
from lightpeft.prune.depth import leave_out
from lightpeft.prune.fingerprint import fingerprint
from lightpeft.prune.importance import ModuleObserver, RankObserver, weight_squares
from lightpeft.prune.learning import LossObserver, learned_of
from lightpeft.prune.length import (
    ENOUGH_LEARNED,
    NOTHING_LEARNED,
    StageLength,
    check_examples,
    few_examples,
    fit_stage,
    stage_of,
)
from lightpeft.prune.masks import UnitMasks
from lightpeft.training.schedule import Pace, scored_steps

_log = logging.getLogger(__name__)
MASK_PENALTY = 1e-4
"""Weight of the L1 penalty on the masks (lambda in Gu et al. 2024)."""
RATIO_EVERY = 16
"""Interval of the steps that measure the modules' ratios; in all other steps the modules are computed faster."""
_STATE_FILE = "lightpeft_estimation.safetensors"
_STEPS_FILE = "lightpeft_estimation.json"


def _step_criteria(kind: str, *units: Unit) -> dict[str, Criterion]:
    return {f"{kind}/{name}": criterion for name, criterion in criteria(*units).items() if criterion.every_step}


_SUMMED = _step_criteria("masks", *MASKED) | _step_criteria("ranks", "ranks")
"""Name of a sum over steps, of all units that have masks or of all ranks -> its criterion."""


class Estimator:
    """Estimation on one PeftModel: masks, importance sums, and the length of the stage.

    The constructor drops the blocks that `config.remove.depth` removes.
    """

    def __init__(self, model: PeftModel, config: LightConfig) -> None:
        """
        Raises:
            LightPeftError: the model cannot be pruned (see `check_peft`, `block_specs`, `find_sites`, `leave_out`).
        """
        check_peft(model)
        self.model, self.config = model, fill_defaults(config)
        dense = block_specs(transformers_model(model))
        self.base_parameters = count_parameters(model).base
        self.fingerprint = fingerprint(model, dense)
        stay = self.config.blocks_left(len(dense))
        self.blocks, self.left_out = dense[:stay], dense[stay:]
        if self.left_out:
            leave_out(model, stay)
        self.sites = find_sites(model, self.blocks)
        self.steps = 0
        self.length = self._first_length = self._longest = 0
        self._windows: list[_Window] = []
        self._started = self._attached = self._fitted = False

    def start(self, total_steps: int | None, stage: StageLength | None = None, longer: str = "training.epochs") -> None:
        """Attach masks and observers. A stage whose settings remove nothing has no steps, and is finished at once.

        Args:
            total_steps: optimizer steps of the whole run, which a fractional length refers to.
            stage: length of the stage, fitted to the rows of a step; None: the length in the settings, which the first
                step fits to its rows if it is no number of steps.
            longer: name of the setting that makes training longer, for error messages.

        Raises:
            LightPeftError: the length needs `total_steps`, or is longer than the run.
        """
        require(not self._attached, "the estimation stage has started already; call start once")
        self._total, self._fitted, self._longer = total_steps, stage is not None, longer
        self._set_length(stage or stage_of(self.config, total_steps))
        self._started = True
        device = self.sites[0].device
        if not self.steps:
            self.masks = UnitMasks(self.blocks, device)
            self._optimizer = torch.optim.Adam([self.masks.values], lr=self.config.estimate.mask_learning_rate or 0.0)
            self._nonfinite = torch.zeros((), dtype=torch.bool, device=device)
            self._overflowed = torch.zeros((), dtype=torch.bool, device=device)
        self._losses = LossObserver(self.model, device)
        if not self.steps:
            self._sums = self._zero_sums()
        self.masks.attach(self.model)
        self._ranks = RankObserver(self.sites)
        self._modules = ModuleObserver(self.model, self.sites, self.blocks, device, self._ratios_due)
        self._attached = True

    def _set_length(self, stage: StageLength) -> None:
        self.length = self._first_length = stage.steps
        self._longest = stage.longest

    def _fit_length(self) -> None:
        """Fit the length to the rows of the first step, as trainers do before training; a number of steps stays."""
        if self._fitted or self._total is None or isinstance(self.config.estimate.length, int):
            return
        rows = int(_sum_over_processes(self.masks.values.new_full((1,), self.masks.examples)))
        pace = Pace(max(rows, 1) * self._total, max(rows, 1))
        self._set_length(fit_stage(self.config, pace, self._total, longer=self._longer))
        self._fitted = True

    def stop(self) -> None:
        """Remove masks and observers from the model, which is then an ordinary PeftModel again."""
        if self._attached:
            self.masks.detach()
            self._ranks.detach()
            self._modules.detach()
            self._losses.detach()
            self._attached = False

    @property
    def finished(self) -> bool:
        """True if the stage has started and run all of its steps."""
        return self._started and self.steps >= self.length

    @property
    def learns_nothing(self) -> bool:
        """True if the stage is extended to two thirds of its maximum, and the model has still learned nothing."""
        late = self.length > self._first_length and 3 * self.steps >= 2 * self._longest
        return late and self.learned is not None and self.learned < NOTHING_LEARNED

    def see_labels(self, labels: Any) -> None:
        """Note the labels of the model's next call, for a loop that computes the loss itself and keeps them back.

        They tell how much the model has learned. A model that is called with its labels needs no such note.
        """
        if self._attached:
            self._losses.expect(labels)

    @torch.no_grad()
    def step(self, grad_scale: float = 1.0) -> None:
        """Add the gradients of one optimizer step to the sums and train the masks; call it after the last backward.

        Args:
            grad_scale: factor that a gradient scaler multiplied the loss with; it is divided out here.

        Raises:
            LightPeftError: the stage has not started, or the first step shows that the run is too short for it.
        """
        require(self._attached, "the estimation stage has not started; call start(total_steps) first")
        if self.finished:
            return
        taken = self.masks.take_gradients()
        if not self.steps:
            self._fit_length()
        examples = taken.mean.new_full((1,), self.masks.examples)  # filled on the device: no copy from the host
        parts = [taken.mean, taken.absolute, taken.squares, self._ranks.take_terms(), examples]
        parts.append(self._losses.take())
        values = _mean_over_processes(torch.cat(parts))
        finite = torch.isfinite(values).all()
        # a gradient scaler overflows on purpose and skips the step itself
        seen = self._nonfinite if grad_scale == 1.0 else self._overflowed
        seen |= ~finite
        values = torch.where(finite, values, 0.0)
        mean, absolute, squares, ranks, examples, losses = values.split([len(part) for part in parts])
        gradients = MaskGradients(mean / grad_scale, absolute / grad_scale, squares / grad_scale**2)
        down_terms, up_terms = (ranks / grad_scale).chunk(2)
        facts: Facts = {"masks": self.masks.values, "gradients": gradients}
        facts |= {"down_terms": down_terms, "up_terms": up_terms}
        for name, criterion in self._summed.items():
            self._sums[name] += criterion(facts)
        self._sums["examples"] += examples * _processes()
        self._sums["losses"] += losses * _processes()
        self.masks.values.grad = gradients.mean + MASK_PENALTY * self.masks.values.sign()
        self._optimizer.step()
        self.steps += 1
        if self._at_boundary():
            self._close_window()
            self._extend_to_learn()

    def check_finite(self) -> None:
        """Check that all gradients so far were finite, by one copy to the host.

        Raises:
            LightPeftError: a gradient was not finite.
        """
        if bool(self._nonfinite):
            raise LightPeftError(
                f"loss or gradients became NaN or infinite within the first {self.steps} steps of estimation; "
                "lower the learning rate, or use bfloat16 or float32 instead of float16"
            )

    def record(self) -> EstimationRecord:
        """Return the scores of every unit under every criterion, from the second half of the stage.

        All scores are zero if the settings remove nothing.

        Raises:
            LightPeftError: the stage has no steps yet, or diverged, or scored too few examples, or some blocks had no
                gradients.
        """
        some = self.finished or self.steps > 0
        require(some, "the estimation stage has no steps yet; train with the callback, or call step()")
        self.check_finite()
        if not self._windows or self._windows[-1].end < self.steps:
            self._close_window()
        record = self._record()
        examples = record.meta["scored_examples"]
        if not (self._fitted and self.finished):  # a run whose rows sufficed before training does not end here
            check_examples(self.config, examples, self._longer)
        if (line := few_examples(self.config, examples)) is not None:
            _log.warning("%s", line)
        self._check_gradients(record)
        return record

    def _check_gradients(self, record: EstimationRecord) -> None:
        """Raise `LightPeftError` if some blocks had no gradients, since a plan would remove them without evidence."""
        parts = zip(*(record.block_scores(kind, "fisher") for kind in MASKED), strict=True)
        reached = [any(bool(scores.any()) for scores in of_block) for of_block in parts]
        require(
            any(reached) or not bool(self._overflowed),
            f"all {self.steps} steps of estimation overflowed, as the first steps of a gradient scaler in float16 do; "
            "raise light.estimate.length",
        )
        missed = [
            block.label or str(block.index) for block, found in zip(self.blocks, reached, strict=True) if not found
        ]
        require(
            not missed or not any(reached),
            f"the masks of block {', '.join(missed)} got no gradient; estimation needs all blocks in the graph, so run "
            "it without FrozenPrefix and without torch.no_grad around them",
        )

    # -- sums over windows of steps ------------------------------------------------------------------------------

    @functools.cached_property
    def _units(self) -> tuple[MaskedUnit, ...]:
        """Kinds of masked units that the model has; heads and neurons are always among them."""
        routed = any(block.experts for block in self.blocks)
        return MASKED if routed else ("heads", "neurons")

    @functools.cached_property
    def _summed(self) -> dict[str, Criterion]:
        """Entries of `_SUMMED` whose criteria score units that the model has."""
        there = {*self._units, "ranks"}
        return {key: criterion for key, criterion in _SUMMED.items() if not there.isdisjoint(criterion.units)}

    def _at_boundary(self) -> bool:
        return self.steps in (self._first_length // 2, self.length)

    def _extend_to_learn(self) -> None:
        """Extend the stage by the steps of its scored half if it would end before the model has learned enough."""
        longer = self.length + scored_steps(self._first_length)
        if self.steps == self.length and longer <= self._longest and not self._has_learned:
            self.length = longer

    @property
    def learned(self) -> float | None:
        """Fraction of the baseline loss that was gone in the last window of steps (`learned_of`); None: not known."""
        return learned_of(self._windows[-1].sums["losses"]) if self._windows else None

    @property
    def _has_learned(self) -> bool:
        return self.learned is None or self.learned >= ENOUGH_LEARNED

    def _ratios_due(self) -> bool:
        """Return whether the current step measures the modules' ratios; the first step of each window does."""
        return (self.steps - self._window_start) % RATIO_EVERY == 0

    @property
    def _window_start(self) -> int:
        return self._windows[-1].end if self._windows else 0

    def _zero_sums(self) -> dict[str, Tensor]:
        sizes = {"masks": len(self.masks.values), "ranks": sum(site.spec.rank for site in self.sites)}
        counts = {key: sizes[key.partition("/")[0]] for key in self._summed} | {"examples": 1}
        counts["losses"] = self._losses.size
        return {key: torch.zeros(count, device=self.masks.values.device) for key, count in counts.items()}

    def _close_window(self) -> None:
        """Move the sums since the last boundary to the host."""
        self.check_finite()
        modules = _sum_over_processes(self._modules.sums.clone())
        sums = {name: value.cpu() for name, value in {**self._sums, "modules": modules}.items()}
        self._windows.append(_Window(self._window_start, self.steps, sums))
        self._sums = self._zero_sums()
        self._modules.sums.zero_()

    def _record(self) -> EstimationRecord:
        late = [window for window in self._windows if window.start >= self.steps // 2] or self._windows[-1:]
        steps = sum(window.end - window.start for window in late)
        sums = {name: torch.stack([window.sums[name] for window in late]).sum(0) for name in late[0].sums}
        scores = self._unit_scores(sums, max(steps, 1)) | self._site_scores(sums, max(steps, 1))
        return EstimationRecord(
            blocks=self.blocks,
            sites=[site.spec for site in self.sites],
            scores=scores,
            base_parameters=self.base_parameters,
            fingerprint=self.fingerprint,
            meta=self._meta(steps, int(sums["examples"]), int(sums["modules"][1].max())),
            left_out=self.left_out,
        )

    def _unit_scores(self, sums: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
        """Compute the scores of heads, neurons and experts by every criterion, with keys as in `EstimationRecord`."""
        facts: Facts = {"masks": self.masks.values.detach().cpu(), "squares": self._squares}
        facts |= {"count": len(self.masks.values), "generator": torch.Generator().manual_seed(0)}
        scores: dict[str, Tensor] = {}
        for name, criterion in criteria(*self._units).items():
            flat = sums[f"masks/{name}"] / steps if criterion.every_step else criterion(facts)
            for unit, parts in self.masks.split(flat).items():
                if unit in criterion.units and unit in self._units:
                    scores |= {f"{unit}/{name}/{index}": part.clone() for index, part in enumerate(parts)}
        return scores

    def _site_scores(self, sums: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
        """Compute the scores of PEFT modules and ranks under every criterion, with keys as in `EstimationRecord`."""
        sizes, random = [site.spec.rank for site in self.sites], torch.Generator().manual_seed(0)
        means = {key: (sums[key] / steps).split(sizes) for key in self._summed if key.startswith("ranks/")}
        facts: Facts = {"ratios": sums["modules"], "rank_taylor": means["ranks/taylor"]}
        facts |= {"count": len(self.sites), "generator": random}
        scores = {f"modules/{name}": criterion(facts) for name, criterion in criteria("modules").items()}
        for index, site in enumerate(self.sites):
            facts = {**_matrices(site), "count": site.spec.rank, "generator": random}
            for name, criterion in criteria("ranks").items():
                of_site = means[f"ranks/{name}"][index].clone() if criterion.every_step else criterion(facts).cpu()
                scores[f"ranks/{name}/{index}"] = of_site
        return scores

    @functools.cached_property
    @torch.no_grad()
    def _squares(self) -> Tensor:
        """Sums of squared weights of all units, flat like the masks; computed once, because the base is frozen."""
        parts = [weight_squares(self.model, block) for block in self.blocks]
        return torch.cat([of_block[place] for place in range(len(MASKED)) for of_block in parts])

    def _meta(self, scored_steps: int, examples: int, tokens: int) -> dict[str, Any]:
        config = self.config
        return {
            "steps": self.steps,
            "scored_steps": scored_steps,
            "scored_examples": examples,
            "ratio_tokens": tokens,
            "length": config.estimate.length,
            "max_steps": self.length,
            "planned_steps": self._first_length,
            "learned": self.learned,
            "mask_penalty": MASK_PENALTY,
            "mask_learning_rate": config.estimate.mask_learning_rate,
            "seed": torch.initial_seed(),
            "processes": _processes(),
            "versions": versions(),
        }

    # -- resuming ------------------------------------------------------------------------------------------------

    def save_state(self, folder: str | Path, write: bool = True) -> None:
        """Write the state of the stage into a trainer's checkpoint folder; call it in every process.

        Args:
            folder: an existing checkpoint; its other files stay.
            write: True in one process; the others only take part in sums over processes.

        Raises:
            LightPeftError: the folder cannot be written.
        """
        modules = _sum_over_processes(self._modules.sums.clone())
        if not write:
            return
        tensors = {"values": self.masks.values, "modules": modules}
        tensors |= {f"sums/{name}": value for name, value in self._sums.items()}
        adam = self._optimizer.state[self.masks.values]
        tensors |= {f"adam/{name}": value.reshape(-1) for name, value in adam.items()}
        for index, window in enumerate(self._windows):
            tensors |= {f"window/{index}/{name}": value for name, value in window.sums.items()}
        state = {
            "steps": self.steps,
            "length": self.length,
            "fitted": [self._fitted, self._first_length, self._longest],
            "windows": [[window.start, window.end] for window in self._windows],
        }
        write_tensors(Path(folder) / _STATE_FILE, tensors)
        write_json(Path(folder) / _STEPS_FILE, state)

    def load_state(self, folder: str | Path) -> None:
        """Load a state that `save_state` wrote; call it after `start`, in every process.

        Raises:
            LightPeftError: the folder holds no estimation state, or the state of another model.
        """
        state = read_json(Path(folder) / _STEPS_FILE)
        tensors = read_tensors(Path(folder) / _STATE_FILE)
        with explain_content_errors(folder):
            self._restore_state(state, tensors, folder)

    def _restore_state(self, state: dict[str, Any], tensors: dict[str, Tensor], folder: str | Path) -> None:
        same = tensors["values"].shape == self.masks.values.shape and tensors["modules"].shape[1] == len(self.sites)
        require(same, f"{folder} holds the estimation state of another model; give a checkpoint of this one")
        with torch.no_grad():
            self.masks.values.copy_(tensors["values"])
        self._modules.sums.copy_(tensors["modules"] / _processes())
        for name, value in self._sums.items():
            value.copy_(tensors[f"sums/{name}"])
        adam = {name.removeprefix("adam/"): t for name, t in tensors.items() if name.startswith("adam/")}
        adam["step"] = adam["step"].reshape(())
        self._optimizer.state[self.masks.values] = {
            name: t if name == "step" else t.to(self.masks.values.device) for name, t in adam.items()
        }
        self._fitted, self._first_length, self._longest = state["fitted"]
        self.steps, self.length = state["steps"], state["length"]
        names = [*self._sums, "modules"]
        self._windows = [
            _Window(start, end, {name: tensors[f"window/{index}/{name}"] for name in names})
            for index, (start, end) in enumerate(state["windows"])
        ]


class _Window:
    """Importance sums over the steps from `start` to `end`, on the CPU."""

    def __init__(self, start: int, end: int, sums: dict[str, Tensor]) -> None:
        self.start, self.end, self.sums = start, end, sums


def _matrices(site: Site) -> Facts:
    """Return A and B of a PEFT module; for a kind without them, ones, so that all ranks score alike."""
    if site.down is None or site.up is None:
        return {"down": torch.ones(site.spec.rank, 1), "up": torch.ones(1, site.spec.rank)}
    return {"down": whole(site.down), "up": whole(site.up)}


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_processes(value: Tensor) -> Tensor:
    if _processes() > 1:
        dist.all_reduce(value)
    return value


def _mean_over_processes(value: Tensor) -> Tensor:
    return _sum_over_processes(value) / _processes()
