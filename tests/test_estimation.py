"""The estimation stage under the regimes that people train in: the scores must not depend on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import telling
from lights import light_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import batch, without_dropout
from torch import Tensor, nn
from torch.nn import functional
from training import StopAt, assert_close, assert_equal, chunks, estimate, inputs, student, trainer
from transformers import BertConfig, BertForMultipleChoice

from lightpeft.errors import LightPeftError
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.planning import make_plan
from lightpeft.prune import length as lengths
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.importance import ModuleObserver
from lightpeft.prune.length import stage_of
from lightpeft.prune.masks import UnitMasks, _Batch
from lightpeft.recipe.pruner import EarlyPruner
from lightpeft.training.prefix import FrozenPrefix


def started(model: PeftModel, total_steps: int | None = None, **config: Any) -> Estimator:
    estimator = Estimator(model, light_of(**config))
    estimator.start(total_steps)
    return estimator


def gradients_of_examples(model: PeftModel, masks: UnitMasks, data: dict[str, Tensor]) -> Tensor:
    """The gradient of every example's own loss by the masks, [examples, units]; what has arrived so far stays."""
    leaves, tally = masks.heads + masks.neurons, masks._tally.clone()
    model.eval()  # nobody counts these tokens
    rows = [torch.cat(torch.autograd.grad(model(**row).loss, leaves)) for row in chunks(data, 1)]
    model.train()
    masks._tally.copy_(tally)
    masks._batch._of_step -= len(rows)
    return torch.stack(rows)


# What a record holds


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "opt"])
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_of_examples_are_told_apart(name: str, parts: int) -> None:
    """In one batch and under accumulation. OPT flattens examples and tokens into one dimension before the FFN."""
    model, data = student(name), inputs(name, padding="none")  # so that the mean over tokens is the mean over rows
    masks = started(model, length=2).masks
    for part in chunks(data, len(data["input_ids"]) // parts):
        (model(**part).loss / parts).backward()
    found = masks.take_gradients()
    of_rows = gradients_of_examples(model, masks, data)
    torch.testing.assert_close(found.mean, of_rows.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.absolute, of_rows.abs().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.squares, of_rows.square().mean(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral"])
def test_flattened_rows_score_as_padded_ones(name: str) -> None:
    """TRL's packing and other padding-free collators put all sequences of a batch into one row."""
    model, padded = student(name), inputs(name)
    real, labels = padded["attention_mask"].bool(), padded["labels"].clone()
    labels[:, 0] = -100  # nothing predicts a first token, also not the sequence before it
    positions = torch.arange(real.shape[1]).expand_as(real)
    flat = {"input_ids": padded["input_ids"], "labels": labels, "position_ids": positions}
    flat = {key: functional.pad(value[real], (0, 3))[None] for key, value in flat.items()}  # to a multiple
    flat["labels"][:, -3:] = -100
    masks = started(model, length=2).masks
    found = []
    for data in (padded, flat):
        model(**data, use_cache=False).loss.backward()  # with a cache, the sequences would attend to each other
        found.append(masks.take_gradients())
        assert masks.examples == len(real)
    for what in ("mean", "absolute", "squares"):
        expected, seen = (getattr(gradients, what) for gradients in found)
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_sequences_of_a_flattened_row_begin_where_positions_fall() -> None:
    batch = _Batch()
    for data in (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0]])},
        {"position_ids": torch.tensor([[2, 3, 4, 2, 3, 2, 2]])},
    ):
        batch(nn.Identity(), (), {"input_ids": torch.ones(1, 7), **data})
        assert batch.owners(torch.arange(7), 7)[0].tolist() == [0, 0, 0, 1, 1, 1, 1] and batch.examples == 2
    assert batch.taken() == 4


def test_the_options_of_a_question_are_one_example() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    base = without_dropout(BertForMultipleChoice(BertConfig(vocab_size=67, **sizes)))
    model = get_peft_model(base, LoraConfig(target_modules=["query", "value"])).train()
    data = {"input_ids": torch.randint(3, 67, (2, 3, 7)), "labels": torch.tensor([0, 2])}
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    masks = started(model, length=2).masks
    model(**data).loss.backward()
    found, of_rows = masks.take_gradients(), gradients_of_examples(model, masks, data)
    torch.testing.assert_close(found.absolute, of_rows.abs().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.squares, of_rows.square().mean(0), rtol=1e-4, atol=1e-7)


def test_scores_equal_the_definitions() -> None:
    """Two steps, of which the second half is scored: the second step alone."""
    model = student()
    estimator = started(model, length=2)
    for seed in (1, 2):
        model.zero_grad()
        model(**inputs(seed=seed)).loss.backward()
        masks = estimator.masks.values.clone()
        if seed == 2:
            gradients = gradients_of_examples(model, estimator.masks, inputs(seed=seed))
        estimator.step()
    record = estimator.record()
    taylor, fisher, mask = (
        torch.cat(record.block_scores("heads", name) + record.block_scores("neurons", name))
        for name in ("taylor", "fisher", "mask")
    )
    torch.testing.assert_close(taylor, (masks * gradients).abs().mean(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(fisher, gradients.square().mean(0), rtol=1e-4, atol=1e-9)
    assert mask.equal(estimator.masks.values.abs())
    for site, scores in zip(estimator.sites, record.rank_scores("taylor"), strict=True):
        down, up = site.down * site.down.grad, site.up * site.up.grad
        torch.testing.assert_close(scores, (down.mean(1).abs() + up.mean(0).abs()).detach())
    for site, scores in zip(estimator.sites, record.rank_scores("magnitude"), strict=True):
        torch.testing.assert_close(scores, (site.down.norm(dim=1) * site.up.norm(dim=0)).detach())
    assert record.meta["steps"] == 2
    assert record.meta["scored_steps"] == 1
    assert record.meta["ratio_tokens"] == int(inputs(seed=2)["attention_mask"].sum())


def test_scores_are_means_over_steps_of_the_second_half() -> None:
    """With masks that stand still and weights that do too, four steps score the mean of the last two."""
    still = {"learning_rate": 0.0, "mask_learning_rate": 1e-30}
    whole = estimate(student(), steps=4, **still).record()
    model = student()
    estimator = started(model, length=10, mask_learning_rate=1e-30)
    sums = torch.zeros_like(estimator.masks.values)
    for seed in (2, 3):
        model(**batch(rows=8, length=20, seed=seed, labels=True)).loss.backward()
        sums += estimator.masks.take_gradients().absolute
    scores = torch.cat(whole.block_scores("heads", "taylor") + whole.block_scores("neurons", "taylor"))
    torch.testing.assert_close(scores, sums / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("every", "due"), [(1, [4, 5, 6, 7]), (3, [4, 7]), (100, [4])])
def test_ratios_are_measured_every_so_many_steps(monkeypatch: pytest.MonkeyPatch, every: int, due: list[int]) -> None:
    """Counted from the beginning of each half, so that what is scored has been measured."""
    monkeypatch.setattr("lightpeft.prune.estimation.RATIO_EVERY", every)
    model = student()
    estimator = started(model, length=8, mask_learning_rate=1e-30)
    batches = [inputs(seed=seed, rows=4, padding="right") for seed in range(8)]
    for data in batches:  # weights stand still
        model(**data).loss.backward()
        estimator.step()
    found = estimator.record()
    observer = ModuleObserver(model, estimator.sites, estimator.blocks, torch.device("cpu"))
    for step in due:
        model(**batches[step])
    ratios, tokens = observer.sums
    torch.testing.assert_close(found.module_scores("ratio"), ratios / tokens, rtol=1e-4, atol=0)
    assert found.meta["ratio_tokens"] == tokens.max()


# Training regimes


def test_gradient_accumulation() -> None:
    whole, parts = estimate(student(), steps=3), estimate(student(), steps=3, parts=4)
    assert_close(parts.record(), whole.record())
    torch.testing.assert_close(parts.masks.values, whole.masks.values, rtol=0, atol=1e-4)


def test_gradient_accumulation_in_a_trainer(tmp_path: Path) -> None:
    """A language model: its loss is the one that the trainer divides by the tokens of the whole step."""
    records = []
    for rows, parts in ((8, 1), (2, 4)):
        pruner = EarlyPruner(student("llama-gqa"), light_of(length=4))
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
        trainer(pruner.model, tmp_path, pruner.callback(), **settings).train()
        records.append(pruner.record())
    assert records[1].meta["steps"] == 4
    assert_close(records[1], records[0])


def test_a_stage_of_overflows_alone_is_refused() -> None:
    model = student()
    estimator = started(model, length=2)
    for step in range(2):
        (model(**inputs(seed=step)).loss * math.inf).backward()
        estimator.step(grad_scale=2.0**16)
        model.zero_grad()
    with pytest.raises(LightPeftError, match="all 2 steps of estimation overflowed"):
        estimator.record()


def test_bfloat16_autocast_is_close_to_float32() -> None:
    records = []
    for enabled in (False, True):
        model = student()
        estimator = started(model, length=2)
        for step in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(**inputs(rows=8, length=20, seed=step)).loss
            loss.backward()
            estimator.step()
        records.append(estimator.record())
    for kind, criterion in (("heads", "taylor"), ("neurons", "taylor")):
        a, b = (torch.cat(record.block_scores(kind, criterion)) for record in records)
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.98
    torch.testing.assert_close(*(r.module_scores("ratio") for r in records), rtol=0.05, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    records = []
    for settings in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        pruner = EarlyPruner(student(), light_of(length=3))
        trainer(pruner.model, tmp_path, pruner.callback(), **settings).train()
        records.append(pruner.record())
    assert_close(records[1], records[0])
    assert records[1].meta["ratio_tokens"] == records[0].meta["ratio_tokens"]


def test_evaluation_in_between_leaves_the_scores(tmp_path: Path) -> None:
    records = []
    for strategy in ("no", "steps"):
        pruner = EarlyPruner(student(), light_of(length=3))
        run = trainer(pruner.model, tmp_path, pruner.callback(), eval_strategy="no")
        run.eval_dataset = run.train_dataset
        run.args.eval_strategy, run.args.eval_steps = strategy, 1
        run.train()
        records.append(pruner.record())
    assert_equal(*records)


# Divergence


def diverging() -> PeftModel:
    model = student()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad).fill_(math.nan)
    return model


def assert_diverged(error: pytest.ExceptionInfo[LightPeftError]) -> None:
    assert "NaN or infinite" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", [1, 2])
def test_divergence_stops_a_loop(steps: int) -> None:
    model = diverging()
    estimator = started(model, length=4)
    with pytest.raises(LightPeftError) as error:
        for _ in range(steps):
            model(**inputs()).loss.backward()
            estimator.step()
        estimator.record()
    assert_diverged(error)


# Lengths


@pytest.mark.parametrize(("length", "total", "steps"), [(5, None, 5), (5, 100, 5), (0.1, 200, 20), (0.1, 5, 2)])
def test_stage_length(length: Any, total: int | None, steps: int) -> None:
    assert stage_of(light_of(length=length), total).steps == steps


@pytest.mark.parametrize(("total", "steps"), [(1000, 75), (200, 32), (60, 18), (4, 2)])
def test_a_short_run_has_its_least_steps(total: int, steps: int) -> None:
    """7.5% of the run, 32 steps at least, three tenths of the run at most."""
    assert stage_of(light_of(length="auto"), total).steps == steps


def test_a_stage_longer_than_the_run(tmp_path: Path) -> None:
    with pytest.raises(LightPeftError, match="estimation of 50 steps is longer than the run of 10"):
        started(student(), total_steps=10, length=50)
    pruner = EarlyPruner(student(), light_of(length=50))
    with pytest.raises(LightPeftError, match="estimation of 50 steps is longer than the run of 40"):
        trainer(pruner.model, tmp_path, pruner.callback()).train()


@pytest.mark.parametrize(("length", "steps"), [(7, 7), (0.25, 10)])
def test_a_trainer_stops_when_the_stage_is_done(tmp_path: Path, length: Any, steps: int) -> None:
    pruner = EarlyPruner(student(), light_of(length=length))
    run = trainer(pruner.model, tmp_path, pruner.callback())
    run.train()
    assert run.state.global_step == pruner.estimator.steps == steps
    assert pruner.finished
    meta = pruner.record().meta
    assert meta["scored_steps"] == steps - steps // 2


# Going on until something is learned


def auto(monkeypatch: pytest.MonkeyPatch, learned: float, most: float = 0.3, part: float = 0.1) -> dict[str, Any]:
    """A length that is found, of other numbers than the usual ones."""
    monkeypatch.setattr(lengths, "AUTO_PART", part)
    monkeypatch.setattr(lengths, "LEAST_STEPS", 2)
    monkeypatch.setattr(lengths, "MOST_PART", most)
    monkeypatch.setattr("lightpeft.prune.estimation.ENOUGH_LEARNED", learned)
    return {"length": "auto"}


@pytest.mark.parametrize(
    ("found", "light", "steps"),
    [
        ({"learned": 0.9}, {"length": 0.1}, 4),
        ({"learned": 0.2}, {}, 4),
        ({"learned": 0.35}, {}, 8),
        ({"learned": 0.9}, {}, 12),
        ({"learned": 0.9, "most": 0.29}, {}, 12),
        ({"learned": 0.9, "most": 0.27}, {}, 10),
        ({"learned": 0.9}, {"full_width_steps": 0.75, "keep": "full"}, 8),
        ({"learned": 0.9}, {"length": 4}, 4),
        ({"learned": 0.9, "part": 0.125}, {}, 11),
    ],
    ids=["a part", "learned", "a while", "at most", "of 11.6", "of 10.8", "steps left", "steps given", "odd"],
)
def test_a_stage_goes_on_until_something_is_learned(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], light: dict[str, Any], steps: int
) -> None:
    """By halves of its length, of which the last ones are what is scored; a tenth of the loss goes in each of them."""
    monkeypatch.setattr(Estimator, "learned", property(lambda self: 0.1 * len(self._windows)))
    config = light_of(**{**auto(monkeypatch, **found), **light})
    estimator, row = Estimator(student(), config), next(chunks(inputs(), 1))
    estimator.start(40)
    while not estimator.finished:
        estimator.model(**row).loss.backward()
        estimator.step()
    assert estimator.steps == steps
    meta = estimator._record().meta
    assert meta["planned_steps"] == stage_of(config, 40).steps
    assert meta["scored_steps"] >= meta["planned_steps"] // 2


@pytest.fixture
def few_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a handful of rows say what was learned."""
    monkeypatch.setattr("lightpeft.prune.learning.FEWEST_TELLING", 1)


@pytest.mark.usefixtures("few_tell")
def test_a_longer_stage_is_one_of_that_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[EstimationRecord] = []
    monkeypatch.setattr("lightpeft.prune.estimation.RATIO_EVERY", 1)  # counted from the beginning of each part
    stages = (auto(monkeypatch, learned=0.5, most=0.2), {"length": 8})
    for number, light in enumerate(stages):
        pruner = EarlyPruner(student(), light_of(**light))
        trainer(pruner.model, tmp_path / str(number), pruner.callback()).train()
        records.append(pruner.record())
    assert_close(*records)
    assert [record.meta["steps"] for record in records] == [8, 8]
    assert make_plan(records[0], light_of()) == make_plan(records[1], light_of())


def test_a_model_that_gives_no_classes_has_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = EarlyPruner(student("llama-gqa"), light_of(**auto(monkeypatch, learned=0.5)))
    trainer(pruner.model, tmp_path, pruner.callback()).train()
    meta = pruner.record().meta
    assert (meta["steps"], meta["learned"]) == (4, None)


def test_steps_after_the_end_do_nothing() -> None:
    estimator = estimate(student(), steps=2)
    record = estimator.record()
    estimator.start(total_steps=None)
    estimator.model(**inputs()).loss.backward()
    estimator.step()
    assert estimator.steps == 2
    assert_equal(estimator.record(), record)


def test_steps_out_of_place() -> None:
    estimator = Estimator(student(), light_of(length=2))
    with pytest.raises(LightPeftError, match="has not started"):
        estimator.step()
    with pytest.raises(LightPeftError, match="has no steps yet"):
        estimator.record()
    estimator.start(None)
    with pytest.raises(LightPeftError, match="has started already"):
        estimator.start(None)


# Resuming


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.usefixtures("few_tell")
@telling("stop", [5, 6, 8], [6, 8])
def test_a_resumed_stage_gives_the_record_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learning: bool, stop: int
) -> None:
    config = auto(monkeypatch, learned=0.5, part=0.15) if learning else {"length": 12}

    def pruner() -> EarlyPruner:
        return EarlyPruner(student(lora_dropout=0.1), light_of(**config))

    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": stop}
    whole = pruner()
    trainer(whole.model, tmp_path / "whole", whole.callback(), **settings).train()
    first = pruner()
    trainer(first.model, tmp_path / "parts", first.callback(), StopAt(stop), **settings).train()
    assert first.estimator.steps == stop
    second, checkpoint = pruner(), tmp_path / "parts" / f"checkpoint-{stop}"
    resumed = trainer(second.model, tmp_path / "parts", second.callback(resume_from=checkpoint), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert second.estimator.steps == 12
    assert_equal(second.record(), whole.record())
    assert second.record().meta == whole.record().meta
    assert second.plan() == whole.plan()


def test_resuming_with_another_model(tmp_path: Path) -> None:
    estimator = started(student(), length=4)
    estimator.model(**inputs()).loss.backward()
    estimator.step()
    estimator.save_state(tmp_path)
    with pytest.raises(LightPeftError, match="of another model"):
        started(student("llama-gqa"), length=4).load_state(tmp_path)
    with pytest.raises(LightPeftError, match="of another model"):
        started(student(target_modules=["query"]), length=4).load_state(tmp_path)


def test_blocks_that_the_loss_does_not_reach() -> None:
    """As under a frozen prefix, which is right in fine-tuning: their units would look as if nobody needed them."""
    model = student(target_modules=["layer.2.attention.self.query", "layer.2.attention.self.value"])
    estimator = started(model, length=2)
    with FrozenPrefix(model).attached():
        for seed in (1, 2):
            model(**inputs(seed=seed)).loss.backward()
            estimator.step()
    with pytest.raises(LightPeftError, match=r"masks of .* got no gradient; .* without FrozenPrefix"):
        estimator.record()


# Where nothing is to go


def test_a_budget_that_takes_nothing_needs_no_step() -> None:
    nothing = light_of(heads=0, neurons=0, experts=0, modules=0, ranks=0, depth=0.5)
    assert stage_of(nothing, 100).steps == 0
    model = student("llama-gqa")
    pruner = EarlyPruner(model, nothing)
    assert not pruner.finished
    pruner.start()
    assert pruner.finished, "a loop that asks first makes no step"
    record = pruner.record()
    plan = make_plan(record, nothing)
    assert [len(block.heads) for block in plan.blocks] == [spec.heads for spec in record.blocks]
    assert len(plan.sites) == len(record.sites)
    for budget in (light_of(blocks=0.2), light_of(blocks="auto", ranks=0, modules=0)):
        with pytest.raises(LightPeftError, match="since its settings removed nothing"):
            record.check_scored(budget)
    light = pruner.prune()
    assert light.light_plan == plan and not any(module._forward_pre_hooks for module in light.modules())
