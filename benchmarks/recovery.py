"""What might help a model to recover from the cut, or to be cut better: variants of one light run, over seeds.

    python benchmarks/recovery.py configs/movie_reviews/minilm_short.yaml --seeds 0 1 2

Every (variant, seed) is a run of its own below the output folder; finished ones are not repeated. Prints and writes a
table of differences to the run as it is, paired by seed. Paths inside the config are relative to the current folder.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import publishing
import torch
from peer_methods import with_settings
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import Trainer

from lightpeft.cli.command import quiet
from lightpeft.config import LightConfig, RunConfig, load_config
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json
from lightpeft.models.patching import in_mode
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import PrunePlan
from lightpeft.plans.selection import Layer, weakest_first
from lightpeft.plans.structure import OUTPUT_SLOTS, BlockSpec
from lightpeft.profiling import hardware
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.importance import RealTokens
from lightpeft.prune.refit import Batches, Correction, Refit, apply_refit, correction
from lightpeft.prune.surgery import apply_plan
from lightpeft.recipe import pruner
from lightpeft.runs import pipeline
from lightpeft.runs.pipeline import Workspace
from lightpeft.runs.reproduce.grid import slug
from lightpeft.runs.reproduce.summary import Report, Results, row
from lightpeft.runs.reproduce.tables import markdown_table
from lightpeft.tasks.respondent import finite_logits

AS_IT_IS = "as it is"
REPORT = "recovery.json"
"""In each run's folder: its metrics, with the seconds of what the variant adds."""
TEMPERATURE = 2.0
"""Of teacher and student in distillation (Hinton et al. 2015)."""
WEIGHT = 0.5
"""Of the distillation loss beside the task's."""


@dataclass(frozen=True)
class Variant:
    """One thing done differently."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run by dotted name."""
    around: Callable[[Workspace], AbstractContextManager[Any]] = lambda work: nullcontext()
    """The stages of the run are inside this context."""


# -- scores ------------------------------------------------------------------------------------------------------------


def rescaled(scale: Callable[[Tensor], Tensor], work: Workspace | None = None) -> AbstractContextManager[Any]:
    """Heads, or neurons, of a layer compete by `scale` of what each is worth for its parameters: [units] -> [units]."""

    def order(layers: Sequence[Layer]) -> Tensor:
        return weakest_first([replace(x, scores=scale(x.scores / x.cost) * x.cost) for x in layers])

    return mock.patch.object(pipeline, "make_plan", partial(make_plan, order=order))


def standardised(values: Tensor) -> Tensor:
    """With mean 0 and standard deviation 1, equal values with 0: [units] -> [units]."""
    return (values - values.mean()) / values.std(correction=0).clamp_min(torch.finfo(values.dtype).tiny)


def by_mean(values: Tensor, power: float = 1.0) -> Tensor:
    """With mean 1, or with a smaller power part of the way there: [units] -> [units]."""
    return values / values.mean() ** power


# -- gradual cuts ------------------------------------------------------------------------------------------------------


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
                self.masks.values.mul_(self.stays)

    def _at_boundary(self) -> bool:
        return self.steps in [round(self.length * cut / self.cuts) for cut in range(1, self.cuts + 1)]

    def _close_window(self) -> None:
        super()._close_window()
        if self.steps < self.length:
            part = (self.config.blocks or 0.0) * self.steps / self.length
            self.stays = self._flags(make_plan(self._record(), replace(self.config, blocks=part)))

    def _unit_scores(self, sums: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
        scores = super()._unit_scores(sums, steps)
        if self.stays is None:
            return scores
        of_kinds = dict(zip(("heads", "neurons"), self.masks.split(self.stays.cpu()), strict=True))
        parts = {name: name.split("/") for name in scores}
        return {name: scores[name] * of_kinds[kind][int(index)] for name, (kind, _, index) in parts.items()}

    def _flags(self, plan: PrunePlan) -> Tensor:
        """1 for the units that the plan keeps, flat like the masks."""
        flags = torch.zeros_like(self.masks.values)
        for kept, heads, neurons in zip(plan.blocks, *self.masks.split(flags), strict=True):
            heads[list(kept.heads)] = neurons[list(kept.neurons)] = 1.0
        return flags


def cutting(cuts: int, work: Workspace) -> AbstractContextManager[Any]:
    """Estimation cuts in so many steps."""
    return mock.patch.object(pruner, "Estimator", partial(GradualEstimator, cuts=cuts))


# -- refit -------------------------------------------------------------------------------------------------------------


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


def in_order(work: Workspace) -> AbstractContextManager[Any]:
    """The refit goes from projection to projection."""
    return mock.patch.object(pruner, "fit_refit", refit_in_order)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def training(change: Callable[..., Trainer]) -> AbstractContextManager[Any]:
    """Fine-tuning uses the trainer of `change`, which takes the usual maker and its arguments."""
    make = vars(pipeline)["make_trainer"]

    def changed(*arguments: Any, **options: Any) -> Trainer:
        usual = options["stage"] != "train"
        return make(*arguments, **options) if usual else change(make, *arguments, **options)

    return mock.patch.object(pipeline, "make_trainer", changed)


def at_full_rate(work: Workspace) -> AbstractContextManager[Any]:
    """The learning rate does not rise again after the cut."""

    def change(make: Any, model: nn.Module, rows: Any, collator: Any, config: Any, **options: Any) -> Trainer:
        return make(model, rows, collator, replace(config, warmup=0.0), **options)

    return training(change)


def distilled(work: Workspace) -> AbstractContextManager[Any]:
    """The pruned model also learns the class probabilities of the dense one, as estimation left it.

    They are computed once for every training row; there is no teacher in memory while the pruned model trains.
    """

    def change(make: Any, model: nn.Module, rows: Any, collator: Any, config: Any, **options: Any) -> Trainer:
        started = time.perf_counter()
        taught = rows.add_column("teacher", [logits.float().tolist() for logits in teacher_logits(work)])
        work.run.path.joinpath("teacher_seconds").write_text(str(time.perf_counter() - started))
        return with_teacher(make(model, taught, partial(collated, collator), config, **options))

    return training(change)


def teacher_logits(work: Workspace) -> list[Tensor]:
    """Logits of the dense model at the end of estimation for every training row."""
    model = PeftModel.from_pretrained(pipeline.dense_model(work).model, str(work.run.estimation / "adapter"))
    return list(finite_logits(work.asking(model), work.train_rows))


def collated(collator: Callable[..., dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch with the teacher's logits, [rows, classes]."""
    teacher = torch.tensor([row["teacher"] for row in rows])
    batch = collator([{name: value for name, value in row.items() if name != "teacher"} for row in rows])
    return {**batch, "teacher": teacher}


def with_teacher(trainer: Trainer) -> Trainer:
    """The trainer, with the distillation loss in its loss."""
    own = trainer.compute_loss

    def compute_loss(model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        teacher = inputs.pop("teacher")
        loss, outputs = own(model, inputs, return_outputs=True, **options)
        loss = (1 - WEIGHT) * loss + WEIGHT * distillation(outputs["logits"], teacher)
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss
    return trainer


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy to the teacher's softened probabilities, less their entropy: [rows, classes] each -> scalar."""
    of_student, of_teacher = (log_softmax(logits.float() / TEMPERATURE, dim=-1) for logits in (student, teacher))
    return kl_div(of_student, of_teacher, log_target=True, reduction="batchmean") * TEMPERATURE**2


WHOLE = {"light.refit": "low_rank", "light.refit_rank": 1536, "light.refit_rows": 512}
"""A refit whose matrices have as many ranks as there are."""
VARIANTS: dict[str, Variant] = {
    AS_IT_IS: Variant(),
    "scores standardised in each layer": Variant(around=partial(rescaled, standardised)),
    "scores divided by their layer's mean": Variant(around=partial(rescaled, by_mean)),
    "scores divided by its square root": Variant(around=partial(rescaled, partial(by_mean, power=0.5))),
    "cut in two steps": Variant(around=partial(cutting, 2)),
    "cut in four steps": Variant(around=partial(cutting, 4)),
    "distilled from the dense model": Variant(around=distilled),
    "refit: low_rank": Variant({"light.refit": "low_rank"}),
    "refit by whole matrices": Variant(WHOLE),
    "refit by whole matrices, in order": Variant(WHOLE, in_order),
    "modules start anew": Variant({"light.restart": True}),
    "no warmup after the cut": Variant(around=at_full_rate),
}


# -- runs --------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run what is not done, and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="folder of runs (default: runs/recovery/<config's name>)")
    publishing.add_option(parser)
    given = parser.parse_args(arguments)
    out = given.out or Path("runs") / "recovery" / given.config.stem
    quiet()
    try:
        config = replace(load_config(given.config), method="light")
        found = {(name, seed): report(config, name, seed, out) for seed in given.seeds for name in VARIANTS}
        results = summarize(found, given.config.stem, config.data.task)
        write_json(out / "results.json", as_data(results))
        if given.write_readme:
            publish(results, given.config.stem, out)
    except LightPeftError as error:
        Console(stderr=True, soft_wrap=True).print(f"recovery: {error}", markup=False)
        return 2
    Console(width=160).print(markdown_table(results), markup=False)
    return 0


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where a variant's run is."""
    return out / f"{slug(name)}-{seed}"


def report(config: RunConfig, name: str, seed: int, out: Path) -> Report:
    """Run a variant, unless it is done; what was cut short starts again."""
    folder, variant = folder_of(out, name, seed), VARIANTS[name]
    if not (folder / REPORT).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        Console(stderr=True).print(f"{name}, seed {seed}", markup=False)
        config = with_settings(config, {**variant.settings, "seed": seed, "output": str(folder)})
        with variant.around(pipeline.prepare(config)):
            metrics = pipeline.run(config)
        extra = folder / "teacher_seconds"
        seconds = {**metrics["seconds"], **({"teacher": float(extra.read_text())} if extra.is_file() else {})}
        write_json(folder / REPORT, {**metrics, "seconds": seconds})
    return read_json(folder / REPORT)


def summarize(found: Mapping[tuple[str, int], Report], config: str, task: str) -> Results:
    """One row a variant."""
    of = {name: {seed: report for (variant, seed), report in found.items() if variant == name} for name in VARIANTS}
    rows = [row((config, task, name), reports, of[AS_IT_IS], AS_IT_IS) for name, reports in of.items()]
    reports = {f"{name}/{seed}": report for (name, seed), report in found.items()}
    return Results(rows, AS_IT_IS, len(found), reports)


def as_data(results: Results) -> dict[str, Any]:
    """The results as plain data."""
    return {**asdict(results), "hardware": hardware()}


def publish(results: Results, config: str, out: Path) -> None:
    """Numbers and logs beside README.md, and the table in it."""
    logs = publishing.beside(f"{config}.recovery.logs")
    logs.mkdir(exist_ok=True)
    for name in results.reports:
        variant, _, seed = name.rpartition("/")
        shutil.copy(folder_of(out, variant, int(seed)) / "log.jsonl", logs / f"{slug(variant)}-{seed}.jsonl")
    numbers = f"{config}.recovery.json"
    text = f"{markdown_table(results)}\nEvery number: [{numbers}]({numbers})."
    publishing.publish(f"recovery {config}", text, numbers, as_data(results))


if __name__ == "__main__":
    sys.exit(main())
