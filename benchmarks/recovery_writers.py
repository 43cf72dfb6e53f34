"""What `recovery.py` compares of a decoder that writes: a light run as it is, and with one thing done differently.

Each may win back what a cut costs a small writer: a dense teacher on all tokens, scores of all tokens and in rounds,
whole sub-layers, blocks that are fitted to the dense ones. `docs/writers.md` says what came of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from recovery_arms import AS_IT_IS, FadingEstimator, WithLoss, estimating, pruned, tokens_of, tuned
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from lightpeft.config import RunConfig
from lightpeft.machine import autocast_dtype, autocasting
from lightpeft.models.batches import IGNORED, without_labels
from lightpeft.models.patching import in_mode
from lightpeft.models.unwrap import base_linear, transformers_model
from lightpeft.plans.layout import kept_channels
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import BlockPlan, EstimationRecord, PrunePlan, block_parameters
from lightpeft.plans.structure import BlockSpec
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.masks import UnitMasks
from lightpeft.prune.refit import Batches, Correction, Fit, Refit, _Weights, correction, fit_refit
from lightpeft.runs import pipeline
from lightpeft.runs.pipeline import Workspace
from lightpeft.runs.reproduce import Arm, Call
from lightpeft.saved.light_adapter import load_light
from lightpeft.saved.results import open_peft

KEPT = 64
"""Most probable tokens that a teacher tells; of the others their mass."""
ROWS = 256
"""Training rows that scores are taken on."""
FEW_ROWS = 48
"""The same of sets, which are many."""
TRIED = 5
"""Sub-layers that are tried for each that goes."""


def estimated(work: Workspace) -> PeftModel:
    """The dense model as estimation left it."""
    return open_peft(work.run.estimation / "adapter", work.dense_model().model, is_trainable=True)


def batches(work: Workspace, rows: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Of training rows, drawn by the run's seed."""
    generator = torch.Generator().manual_seed(work.config.seed)
    numbers = torch.randperm(len(work.train_rows), generator=generator)[:rows].tolist()
    for start in range(0, len(numbers), size):
        yield work.collator([work.train_rows[number] for number in numbers[start : start + size]])


def logits(work: Workspace, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of all tokens, computed as in training: [rows, length, vocabulary], float32."""
    with autocasting(batch["input_ids"].device, autocast_dtype(work.config.training)):
        return model(**without_labels(batch), use_cache=False).logits.float()


def real_logits(work: Workspace, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The same of what is no padding: [tokens, vocabulary]."""
    return logits(work, model, batch)[batch["attention_mask"].bool()]


# -- a teacher ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of the next token at each token of a row."""

    values: Tensor
    """Log-probabilities of the most probable tokens: [length, kept]."""
    tokens: Tensor
    """Which these are: [length, kept]."""


def taught(config: RunConfig, *, weight: float, untouched: bool = False, every: int = 1) -> None:
    """The pruned model also learns what the dense one, as estimation left it, says of tokens of prompts and answers.

    It says so once for every row, before the cut; the loss is the task's and `weight` times the KL divergence.

    Args:
        untouched: the base teaches, as it was before estimation.
        every: of the tokens one in so many; those of answers are learned of in any case.
    """
    work = pipeline.prepare(config)
    pipeline.estimate(work)
    lessons = lessons_of(work, work.dense_model().model if untouched else estimated(work))
    tuned(pruned(work), Teaching(lessons, weight, every))


def estimated_near_the_base(config: RunConfig, *, weight: float) -> None:
    """Estimation also learns what the untouched base says of all tokens, so that LoRA stays near what it is put on."""
    work = pipeline.prepare(config)
    lessons = lessons_of(work, work.dense_model().model)
    pipeline.estimate(work, estimating(Estimator, Teaching(lessons, weight)))
    tuned(pruned(work))


def fading(config: RunConfig) -> None:
    """What will go fades out over the second half of estimation."""
    work = pipeline.prepare(config)
    pipeline.estimate(work, estimating(FadingEstimator))
    tuned(pruned(work))


@torch.no_grad()
def lessons_of(work: Workspace, teacher: nn.Module) -> dict[tuple[int, ...], Lesson]:
    """Tokens of a training row -> what the teacher says of it."""
    found = {}
    size = work.config.training.eval_batch_size
    order = sorted(range(len(work.train_rows)), key=work.train_rows["length"][:].__getitem__)
    with in_mode(teacher, training=False):
        for start in range(0, len(order), size):
            batch = work.collator([work.train_rows[number] for number in order[start : start + size]])
            best = most_probable(logits(work, teacher, batch))
            rows = zip(tokens_of(batch), batch["attention_mask"].bool(), best.values, best.indices, strict=True)
            for row, real, values, tokens in rows:
                found[row] = Lesson(values[real].half(), tokens[real].int())
    return found


def most_probable(found: Tensor) -> Any:
    """Log-probabilities of the most probable tokens, and which these are: [..., vocabulary] -> [..., kept] each."""
    return found.log_softmax(-1).topk(min(KEPT, found.shape[-1]), -1)


class Teaching(WithLoss):
    """Learns what a teacher says of every token beside the task."""

    def __init__(self, lessons: Mapping[tuple[int, ...], Lesson], weight: float, every: int = 1) -> None:
        """
        Args:
            weight: of the divergence beside the task's loss.
            every: of the tokens one in so many, and those whose next one is of an answer.
        """
        self.lessons, self.weight, self.every = lessons, weight, every

    def loss(self, own: Tensor, logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        real = inputs["attention_mask"].bool()
        lessons = [self.lessons[row] for row in tokens_of(inputs)]
        # nobody knows what comes after the last token
        students = torch.cat([row[own_tokens][:-1] for row, own_tokens in zip(logits, real, strict=True)])
        values = torch.cat([lesson.values[:-1] for lesson in lessons]).float()
        tokens = torch.cat([lesson.tokens[:-1] for lesson in lessons]).long()
        if self.every > 1:
            answers = [row[own_tokens][1:] != IGNORED for row, own_tokens in zip(inputs["labels"], real, strict=True)]
            some = torch.cat([found | (torch.arange(len(found)) % self.every == 0) for found in answers])
            students, values, tokens = students[some], values[some], tokens[some]
        return own + self.weight * divergence(students, values, tokens).mean()


def divergence(student: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """KL divergence from a teacher of whom some tokens are known, and of the others their mass: [tokens].

    Args:
        student: logits, [tokens, vocabulary].
        values, tokens: as in a `Lesson`.
    """
    own = student.float().log_softmax(-1).gather(-1, tokens)
    told = values.exp()
    rest, own_rest = ((1 - part.sum(-1)).clamp_min(1e-6) for part in (told, own.exp()))
    return (told * (values - own)).sum(-1) + rest * (rest.log() - own_rest.log())


# -- scores ------------------------------------------------------------------------------------------------------------


def scored_anew(config: RunConfig, *, labels: str, rounds: int) -> None:
    """Fisher scores of more rows, of other tokens, and in rounds: what goes in one is gone when the next are taken.

    Args:
        labels: "answers", as in training; "rows": all tokens; "sampled": all, drawn from what the model gives.
    """
    work = pipeline.prepare(config)
    record = pipeline.estimate(work)
    cut_by(work, anew(work, estimated(work), record, labels, rounds))
    tuned(work)


def anew(work: Workspace, model: PeftModel, record: EstimationRecord, labels: str, rounds: int) -> EstimationRecord:
    """The record with such scores."""
    for done in range(rounds):
        record = with_fisher(record, fisher(work, model, record, labels, done / rounds))
    return record


def cut_by(work: Workspace, record: EstimationRecord, fit: Fit = fit_refit, **budget: Any) -> PeftModel | None:
    """Prune by another record than estimation's, which stays; what is left, as of `pipeline.prune`."""
    with work.run.held():
        make_plan(record, replace(work.config.light, **budget)).save(work.run.plan)
    return pipeline.prune(work, fit)


def fisher(work: Workspace, model: PeftModel, record: EstimationRecord, labels: str, gone: float) -> list[Tensor]:
    """Mean squared gradients of the masks, heads of all blocks and then neurons, where a part of the budget is gone."""
    masks = UnitMasks(record.blocks)
    if gone:
        masks.set_plan(
            make_plan(record, replace(work.config.light, blocks=gone * (work.config.light.known_blocks or 0.0)))
        )
    stay, total, rows = masks.values.clone(), torch.zeros_like(masks.values), 0
    masks.attach(model)
    with in_mode(model, training=False):
        for batch in batches(work, ROWS, 8):
            loss_on(work, model, batch, labels).backward()
            taken = masks.take_gradients()
            total += taken.squares * masks.examples
            rows += masks.examples
            model.zero_grad(set_to_none=True)
    masks.detach()
    parts = masks.split(total / rows * (stay if gone else 1))
    return [*parts["heads"], *parts["neurons"]]


def loss_on(work: Workspace, model: PeftModel, batch: Mapping[str, Tensor], labels: str) -> Tensor:
    """Sum over a row's tokens, mean over rows, of the cross-entropy to these labels."""
    found = logits(work, model, batch)[:, :-1]
    real = (batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]).bool()
    if labels == "answers":
        wanted = batch["labels"][:, 1:]
    elif labels == "rows":
        wanted = batch["input_ids"][:, 1:].masked_fill(~real, IGNORED)
    else:
        drawn = torch.multinomial(found.detach().softmax(-1).flatten(0, 1), 1)
        wanted = drawn.view(real.shape).masked_fill(~real, IGNORED)
    return cross_entropy(found.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum") / len(found)


def with_fisher(record: EstimationRecord, scores: Sequence[Tensor]) -> EstimationRecord:
    """The record with other Fisher scores, of the heads of all blocks and then of their neurons."""
    return replace(record, scores={**record.scores, **dict(zip(names_of(record), scores, strict=True))})


def names_of(record: EstimationRecord) -> list[str]:
    """Names of the Fisher scores of the heads of all blocks, and then of their neurons."""
    return [f"{kind}/fisher/{spec.index}" for kind in ("heads", "neurons") for spec in record.blocks]


# -- whole sub-layers --------------------------------------------------------------------------------------------------


def whole_sublayers(config: RunConfig, *, part: float, merged: bool = False) -> None:
    """A part of the budget goes as whole attentions and FFNs, by the divergence that the set of them is measured to
    bring; the rest by width, as it is.

    Args:
        merged: a refit also gives, as well as a linear map can, what those that went gave: the FFN before them does.
    """
    work = pipeline.prepare(config)
    record = pipeline.estimate(work)
    chosen = weakest_sublayers(work, estimated(work), record, part * (config.light.known_blocks or 0.0))
    scores = {
        name: torch.zeros_like(values) if name in chosen else values.clamp_min(torch.finfo(values.dtype).tiny)
        for name, values in record.scores.items()
    }
    cut_by(work, replace(record, scores=scores), merging if merged else fit_refit, min_heads=0, min_neurons=0)
    tuned(work)


@torch.no_grad()
def weakest_sublayers(work: Workspace, model: PeftModel, record: EstimationRecord, part: float) -> list[str]:
    """Names of the Fisher scores of sub-layers that go, one after another, until so much of the blocks is gone.

    The next is the one of a few that brings least for its parameters beside those that are gone; the few are those that
    brought least when they were last tried.
    """
    masks = UnitMasks(record.blocks)
    names = names_of(record)
    leaves = dict(zip(names, [*masks.heads, *masks.neurons], strict=True))
    heads = [spec.heads * spec.head_parameters + spec.kv_heads * spec.kv_parameters for spec in record.blocks]
    neurons = [spec.neurons * spec.neuron_parameters for spec in record.blocks]
    sizes = dict(zip(names, [*heads, *neurons], strict=True))
    whole = sum(map(block_parameters, record.blocks))
    tests = list(batches(work, FEW_ROWS, 16))
    with in_mode(model, training=False):
        told = [most_probable(real_logits(work, model, batch)) for batch in tests]
        masks.attach(model)

        def without(name: str) -> float:
            leaves[name].zero_()
            each = [
                divergence(real_logits(work, model, batch), best.values, best.indices)
                for batch, best in zip(tests, told, strict=True)
            ]
            leaves[name].fill_(1)
            return float(torch.cat(each).mean())

        brings = {name: without(name) for name in names}
        gone: list[str] = []
        reached = 0.0
        while sum(sizes[name] for name in gone) < part * whole:
            few = sorted(brings, key=lambda name: brings[name] / sizes[name])[:TRIED]
            brings |= {name: without(name) - reached for name in few}
            best = min(few, key=lambda name: brings[name] / sizes[name])
            reached += brings.pop(best)
            leaves[best].zero_()
            gone.append(best)
    masks.detach()
    return gone


@torch.no_grad()
def merging(model: PeftModel, plan: PrunePlan, batches: Batches, rank: int) -> Refit:
    """A refit in which an FFN also gives what the sub-layers behind it gave that are gone, up to the next that stays.

    It is the linear map of its neurons that gives this best, beside what it gave itself.
    """
    weights, corrections = _Weights(model, plan), fit_refit(model, plan, batches, rank)
    for spec, kept, gone in gone_behind(plan):
        name = spec.projections["ffn_out"]
        index = kept_channels(spec, kept, "ffn_out")
        index = torch.arange(spec.neurons) if index is None else index
        before = weights.before(name)
        both = torch.cat([before, torch.eye(len(before))], dim=1)  # of its own inputs, and of what the others gave
        moment = moment_beside(model, name, gone, batches)
        corrections[name] = correction(moment, both, weights.after(name, index), index, rank, torch.bfloat16)
    return corrections


def gone_behind(plan: PrunePlan) -> list[tuple[BlockSpec, BlockPlan, list[str]]]:
    """Blocks whose FFN stays, and the output projections of the sub-layers behind it that are gone whole."""
    found: list[tuple[BlockSpec, BlockPlan, list[str]]] = []
    behind: list[str] = []  # of what is before the first FFN nothing takes the place
    for spec, kept in plan.parts:
        if not kept.heads:
            behind.append(spec.projections["o"])
        if kept.neurons:
            behind = []
            found.append((spec, kept, behind))
        else:
            behind.append(spec.projections["ffn_out"])
    return [place for place in found if place[-1]]


def moment_beside(model: PeftModel, name: str, gone: Sequence[str], batches: Batches) -> Tensor:
    """Mean of [x, s, 1] [x, s, 1]^T over tokens, of the inputs x of a projection and the sum s of what others give."""
    inner = transformers_model(model)
    seen: list[Tensor] = []
    handles = [inner.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    handles += [
        inner.get_submodule(other).register_forward_hook(lambda module, args, output: seen.append(output))
        for other in gone
    ]
    total: Any = 0.0
    with in_mode(model, training=False):
        for batch in batches():
            seen.clear()
            model(**batch)
            inputs, *given = (states.float()[batch["attention_mask"].bool()] for states in seen)
            row = torch.cat([inputs, torch.stack(given).sum(0), inputs.new_ones(len(inputs), 1)], dim=1)
            total = total + row.T @ row
    for handle in handles:
        handle.remove()
    return total / total[-1, -1]


# -- blocks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """What a block read and gave for a batch."""

    read: Tensor
    arguments: Mapping[str, Any]
    gave: Tensor
    real: Tensor
    """1 for tokens, 0 for padding: [rows, length]."""


def fitted_to_blocks(config: RunConfig, *, steps: int, rate: float) -> None:
    """Before training goes on, LoRA of each pruned block is fitted to what the dense one gives for what it reads."""
    work = pipeline.prepare(config)
    pipeline.estimate(work)
    seen = passages(work, estimated(work))
    pipeline.plan(work)
    tuned(work, model=fitted(work, pipeline.prune(work), seen, steps, rate))


def fitted(
    work: Workspace, light: PeftModel | None, seen: Sequence[Sequence[Passage]], steps: int, rate: float
) -> PeftModel:
    """A pruned model whose blocks have learned what dense ones read and gave."""
    assert light is not None
    for block, passed in zip(blocks_of(light), seen, strict=True):
        fit_block(work, block, passed, steps, rate)
    return light


def blocks_of(model: PeftModel) -> Sequence[nn.Module]:
    """The blocks of a decoder of Llama's kind."""
    return transformers_model(model).model.layers


def passages(work: Workspace, model: PeftModel, rows: int = 128) -> list[list[Passage]]:
    """What every block reads and gives, batch by batch."""
    found: list[list[Passage]] = [[] for _ in blocks_of(model)]

    def note(place: int, real: Tensor, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "use_cache")}
        states = args[0] if args else given.pop("hidden_states")
        gave = output[0] if isinstance(output, tuple) else output
        found[place].append(Passage(states.detach(), given, gave.detach(), real))

    with in_mode(model, training=False), torch.no_grad():
        for batch in batches(work, rows, 16):
            real = batch["attention_mask"].bool()
            handles = [
                block.register_forward_hook(functools.partial(note, place, real), with_kwargs=True)
                for place, block in enumerate(blocks_of(model))
            ]
            logits(work, model, batch)
            for handle in handles:
                handle.remove()
    return found


def fit_block(work: Workspace, block: nn.Module, passed: Sequence[Passage], steps: int, rate: float) -> None:
    """Adam on the relative squared error of what the block adds to what it reads."""
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for step in range(steps):
        each = passed[step % len(passed)]
        with autocasting(each.read.device, autocast_dtype(work.config.training)):
            given = block(each.read, **each.arguments)
        given = given[0] if isinstance(given, tuple) else given
        error = (given.float() - each.gave.float())[each.real].square().sum(-1).mean()
        added = (each.gave.float() - each.read.float())[each.real].square().sum(-1).mean()
        (error / added).backward()
        optimizer.step()
        optimizer.zero_grad()


# -- biases ------------------------------------------------------------------------------------------------------------


def with_biases(config: RunConfig) -> None:
    """What attentions and FFNs give has biases, as a refit makes them, which train behind the cut."""
    work = pruned(pipeline.prepare(config))
    light = load_light(work.run.pruned, work.dense_model().model, is_trainable=True)
    bases: dict[str, Any] = {name: base_linear(transformers_model(light), name) for name in light.light_refit}
    biases = {name: base.bias for name, base in bases.items()}
    for bias in biases.values():
        bias.requires_grad_()
    tuned(work, KeepBiases(biases), model=light)


class KeepBiases(TrainerCallback):
    """Biases that have trained become those of the refit."""

    def __init__(self, biases: Mapping[str, Tensor]) -> None:
        self.biases = biases

    def on_train_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        """The base had none."""
        for name, bias in self.biases.items():
            model.light_refit[name] = Correction(bias.detach().clone())


# -- placement ---------------------------------------------------------------------------------------------------------


def placed(config: RunConfig, *, lower: float) -> None:
    """Behind the cut the lower part of the blocks has modules on queries and values alone, all others on all."""
    work = pipeline.prepare(config)
    pipeline.estimate(work)
    plan = pipeline.plan(work)
    below = plan.specs[: int(lower * len(plan.specs))]
    gone = {name for spec in below for slot, name in spec.projections.items() if slot not in ("q", "v")}
    with work.run.held():
        replace(plan, sites={name: ranks for name, ranks in plan.sites.items() if name not in gone}).save(work.run.plan)
    pipeline.prune(work)
    tuned(work)


# -- all at once -------------------------------------------------------------------------------------------------------


def together(config: RunConfig, *, rounds: int, steps: int, rate: float, weight: float) -> None:
    """Scores of all tokens in rounds, blocks fitted to the dense ones, and a teacher."""
    work = pipeline.prepare(config)
    record = pipeline.estimate(work)
    dense = estimated(work)
    lessons, seen = lessons_of(work, dense), passages(work, dense)
    light = cut_by(work, anew(work, dense, record, "rows", rounds))
    tuned(work, Teaching(lessons, weight), model=fitted(work, light, seen, steps, rate))


def _calling(function: str, settings: Mapping[str, Any] | None = None, **arguments: Any) -> Arm:
    return Arm(settings or {}, call=Call(f"recovery_writers:{function}", arguments))


SLOW: dict[str, Any] = {"training": {"fast_steps": False}}
"""With logits of all tokens, which the faster steps go without."""
REFIT: dict[str, Any] = {"light": {"refit": "low_rank", "refit_rank": 64}}
"""What attentions and FFNs give is corrected before training."""
ARMS: dict[str, Arm] = {
    AS_IT_IS: Arm({}),
    "taught, weight 1": _calling("taught", SLOW, weight=1.0),
    "taught, weight 4": _calling("taught", SLOW, weight=4.0),
    "taught on answers alone": _calling("taught", SLOW, weight=1.0, every=10**6),
    "taught on a quarter of the prompts": _calling("taught", SLOW, weight=1.0, every=4),
    "taught by the untouched base": _calling("taught", SLOW, weight=1.0, untouched=True),
    "estimated near the base": _calling("estimated_near_the_base", SLOW, weight=1.0),
    "what goes fades out": _calling("fading"),
    "scores of more rows": _calling("scored_anew", labels="answers", rounds=1),
    "scores of all tokens": _calling("scored_anew", labels="rows", rounds=1),
    "scores of sampled tokens": _calling("scored_anew", labels="sampled", rounds=1),
    "scores of all tokens, in four rounds": _calling("scored_anew", labels="rows", rounds=4),
    "half as whole sub-layers": _calling("whole_sublayers", part=0.5),
    "half as whole sub-layers, and a refit": _calling("whole_sublayers", REFIT, part=0.5),
    "the same, merged into the FFNs before": _calling("whole_sublayers", REFIT, part=0.5, merged=True),
    "some of it as whole blocks": Arm({"light": {"depth": 0.25}}),
    "biases that train": _calling("with_biases", {"light": {"refit": "bias"}}),
    "q and v alone in the lower half": _calling("placed", lower=0.5),
    "fitted to blocks": _calling("fitted_to_blocks", steps=24, rate=1e-3),
    "rounds, fitted and taught": _calling("together", SLOW, rounds=4, steps=24, rate=1e-3, weight=1.0),
    "refit: low_rank": Arm(REFIT),
    "twice the rate": Arm({"light": {"learning_rate_scale": 2.0}}),
    "2 ranks": Arm({"lora": {"r": 2, "alpha": 4}}),
    "32 ranks": Arm({"lora": {"r": 32, "alpha": 64}}),
}
