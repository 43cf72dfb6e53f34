"""`light: auto`: the search, what it asks, what points are worth, and runs and trainers that take it."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from lights import but, light_of, preset
from tiny import inputs_for, make, random_record, refusal, with_lora
from torch import Tensor
from transformers import TrainingArguments
from workbench import Workbench, comparable, completions, labeled, lightpeft, read, write_rows

from lightpeft import EarlyPruner, LightConfig, LightTrainer
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.folders.stored_config import to_yaml
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.report.facts import read_run
from lightpeft.app.runs.report.page import page
from lightpeft.app.runs.trainers import LightRun
from lightpeft.app.tasks.answers import Answers
from lightpeft.app.tasks.kinds.classification import ClassificationTask
from lightpeft.app.tasks.metrics import METRICS
from lightpeft.app.tasks.worth import points_per_nat
from lightpeft.budget import finding
from lightpeft.budget import room as searching_room
from lightpeft.budget.finding import find_budget
from lightpeft.budget.found import SHORT, FoundBudget, cost_in_words, tolerance_in_words
from lightpeft.budget.probes import Probe
from lightpeft.budget.room import SEARCH_BUDGETS, SearchRoom, sizes_of, why_unmeasured
from lightpeft.budget.search import BudgetSearch
from lightpeft.config import Tolerance, load_config
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.plans.planning import make_plan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.live import losses_of
from lightpeft.prune.learning import LEAST_LEARNED
from lightpeft.prune.surgery import cut_copy
from lightpeft.training.rows import rows_of_steps

FISHER = {"light.estimate.criterion": "fisher"}
AUTO = {**FISHER, "light.remove.blocks": "auto"}
LIGHT = light_of(
    blocks="auto",
    length=30,
    criterion="fisher",
    scale=1.0,
)


@pytest.fixture(scope="module", autouse=True)
def free() -> Iterator[None]:
    """A search may take as long as it likes, of trainings that are hardly longer than a probe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching_room, "SEARCH_FRACTION", 100.0)
        yield


@pytest.fixture
def not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search may take as long as usual."""
    monkeypatch.setattr(searching_room, "SEARCH_FRACTION", 0.15)


HALF = Tolerance(0.5, "nats")

# -- the search ----------------------------------------------------------------------------------------------------

PLACES = (0.1, 0.2, 0.4, 0.6, 0.8)


def rises(mean: float, error: float = 0.0, count: int = 64) -> Tensor:
    """By batch, with this mean and standard error of it."""
    spread = torch.linspace(-1, 1, count, dtype=torch.float64)
    return mean + spread / spread.std() * error * math.sqrt(count)


def search(before: float, recovery: float, tolerance: float, power: float = 2.0, error: float = 0.0) -> BudgetSearch:
    """Of a model whose loss rises by before * blocks^power, of which a probe leaves a part."""
    found = BudgetSearch({blocks: before * blocks**power for blocks in PLACES}, tolerance)
    found.run(lambda blocks: rises(before * blocks**power * recovery, error))
    return found


def test_what_recovers_is_cut_and_what_does_not_is_left_alone() -> None:
    encoder = search(before=0.5, recovery=0.1, tolerance=0.02)
    assert encoder.found == pytest.approx(0.6, abs=0.051)  # 0.5 * 0.6^2 * 0.1 = 0.018, and more in between, on a line
    assert encoder.expected(0.6).left == pytest.approx(0.5 * 0.36 * 0.1, rel=0.1)
    assert search(before=11.0, recovery=0.7, tolerance=0.08).found == 0.1
    assert search(before=11.0, recovery=0.7, tolerance=0.005).found == 0.0
    assert search(before=0.01, recovery=0.1, tolerance=0.05).found == 0.6, "more was never seen to be within a point"


@pytest.mark.parametrize(
    ("costs", "found"),
    [
        ({0.3: 0.006, 0.5: 0.01, 0.6: 0.012}, 0.6),  # always within, and further each time
        ({0.3: 0.001, 0.5: 0.1, 0.4: 0.012}, 0.4),  # half way between
        ({0.3: 0.001, 0.5: 0.1, 0.4: 0.1}, 0.3),
        ({0.3: 0.03, 0.2: 0.012}, 0.25),  # hardly anything lies between
        ({0.3: 0.09, 0.1: 0.03, 0.05: 0.015}, 0.05),
        ({0.3: 0.3, 0.05: 0.05}, 0.0),  # nothing is within
    ],
)
def test_which_budgets_are_probed(costs: dict[float, float], found: float) -> None:
    """One after another; before anything trains all budgets cost a fifth of what goes."""
    search, asked = BudgetSearch({place: 0.2 * place for place in PLACES}, 0.02), []

    def probe(blocks: float) -> Tensor:
        asked.append(blocks)
        return rises(costs[blocks])

    assert (search.run(probe), asked) == (found, list(costs))


def test_a_search_behind_a_depth_is_one_of_the_rest() -> None:
    """What is gone in front costs nothing more, and the budgets behind it are parts of what it left."""
    before = {0.35: 0.02, 0.4: 0.03, 0.5: 0.08, 0.6: 0.15}
    search = BudgetSearch(before, 0.02, gone=0.3)
    whole = BudgetSearch({(part - 0.3) / 0.7: rise for part, rise in before.items()}, 0.02)
    search._add_probe(0.4, rises(0.01, 0.003))
    whole._add_probe((0.4 - 0.3) / 0.7, rises(0.01, 0.003))
    for part in (0.35, 0.4, 0.5):
        own, same = search._likely(part), whole._likely((part - 0.3) / 0.7)
        assert (own.left, own.upper) == pytest.approx((same.left, same.upper))


@given(
    order=st.permutations([0.15, 0.3, 0.45]),
    costs=st.lists(st.floats(-0.05, 0.3), min_size=3, max_size=3),
    slope=st.floats(-0.1, 0.5),
)
def test_what_is_known_does_not_hang_on_the_order_of_probes(
    order: list[float], costs: list[float], slope: float
) -> None:
    known = dict(zip([0.15, 0.3, 0.45], costs, strict=True))
    first, other = (BudgetSearch({place: slope * place for place in PLACES}, 0.02) for _ in range(2))
    for blocks in known:
        first._add_probe(blocks, rises(known[blocks], 0.01))
    for blocks in order:
        other._add_probe(blocks, rises(known[blocks], 0.01))
    for blocks in PLACES:
        assert first.expected(blocks) == other.expected(blocks)
    for blocks, cost in known.items():
        assert first.expected(blocks).left == pytest.approx(max(0.0, cost), abs=1e-6), "what its probe said"


def test_what_is_not_sure_is_not_cut() -> None:
    sure, unsure = search(0.5, 0.25, 0.015), search(0.5, 0.25, 0.015, error=0.02)
    assert unsure.found < sure.found
    assert unsure.expected(0.4).left == pytest.approx(sure.expected(0.4).left, rel=0.2)
    assert unsure.expected(0.4).upper > unsure.expected(0.4).left


@given(
    before=st.floats(1e-3, 20),
    recovery=st.floats(-0.2, 1.5),
    tolerance=st.floats(1e-3, 2),
    power=st.floats(0.5, 4),
    error=st.floats(0, 0.2),
)
def test_what_is_found_is_within_the_tolerance(
    before: float, recovery: float, tolerance: float, power: float, error: float
) -> None:
    found = search(before, recovery, tolerance, power, error)
    assert 1 <= len(found.probed) <= 3
    assert found.found <= max(each.blocks for each in found.probed)
    if found.found:
        expected = found.expected(found.found)
        assert 0 <= expected.left <= expected.upper <= tolerance
    more = search(before, recovery, 4 * tolerance, power, error)
    assert more.tolerance > found.tolerance and max(p.blocks for p in more.probed) >= min(
        p.blocks for p in found.probed
    )


def test_a_cut_that_seemed_free_and_was_not() -> None:
    found = BudgetSearch(dict.fromkeys(PLACES, -0.01), 0.02)  # few rows, by which every cut is a gain
    assert found.run(lambda blocks: rises(0.1 * blocks)) < 0.8
    assert all(each.before >= each.after for each in found.probed)
    found = BudgetSearch(dict.fromkeys(PLACES, -0.01), 0.02)
    assert found.run(lambda blocks: rises(1.0)) == 0.0, "not even a little of it is believed to be free"


def test_depth_that_is_gone_counts_for_nothing() -> None:
    assert BudgetSearch({0.7: 0.1, 0.8: 0.4}, 0.05, gone=0.65).grid == [0.7], "a little more may be tried"
    found = BudgetSearch({0.6: 0.1, 0.8: 0.4}, 0.05, gone=0.5)
    assert found.grid == [0.55, 0.6] and found.rise(0.5) <= 1e-6 and found.rise(0.55) == pytest.approx(0.05)


# -- the tolerance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount", "unit"), [("1 point", 1, "points"), (" 0.5 points", 0.5, "points"), ("5e-2 nats", 0.05, "nats")]
)
def test_tolerances(text: str, amount: float, unit: str) -> None:
    found = Tolerance.read(text)
    assert found == Tolerance(amount, unit) and Tolerance.read(str(found)) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["-1 points", "nan nats", "inf nats", "0 nats", "one point", "1 percent", "", 0.5, "1point"]
)
def test_no_tolerances(text: str | float) -> None:
    line = refusal(lambda: light_of(tolerance=text))
    assert "light.remove.tolerance" in line and "\n" not in line and ("for example" in line or text == 0.5)


def test_no_word_but_auto() -> None:
    assert "auto" in refusal(lambda: light_of(blocks="some"))  # type: ignore[arg-type]


def test_a_plan_needs_a_number() -> None:
    record = random_record(with_lora(make("bert")))
    assert "light.remove.blocks is auto" in refusal(lambda: make_plan(record, LIGHT))


# -- what points are worth -----------------------------------------------------------------------------------------


def answers(counts: list[list[int]]) -> Answers:
    """With this confusion matrix [right class, answered class]."""
    pairs = [(right, told) for right, row in enumerate(counts) for told, count in enumerate(row) for _ in range(count)]
    return Answers([told for _, told in pairs], [right for right, _ in pairs])


def task_of(metric: str) -> Any:
    made = ClassificationTask.__new__(ClassificationTask)
    made.entry = type("Entry", (), {"metrics": [metric]})()
    return made


def test_points_of_accuracy_follow_the_entropy() -> None:
    found = points_per_nat(answers([[85, 15], [15, 85]]), task_of("accuracy"))
    assert found == pytest.approx(100 / math.log(0.85 / 0.15))
    assert points_per_nat(answers([[50, 0], [0, 50]]), task_of("accuracy")) < found, (
        "who never errs loses much by an error"
    )
    assert points_per_nat(answers([[50, 50], [50, 50]]), task_of("accuracy")) == pytest.approx(100), (
        "and no more by chance"
    )


@pytest.mark.parametrize("counts", [[[0, 9], [9, 0]], [[1, 999], [0, 0]], [[0, 0], [1, 0]]])
def test_answers_that_are_mostly_wrong_are_worth_as_much_as_chance(counts: list[list[int]]) -> None:
    for metric in ("accuracy", "matthews", "f1"):
        assert 100 <= points_per_nat(answers(counts), task_of(metric)) < math.inf


def test_points_of_other_metrics_are_counted_on_the_answers() -> None:
    counts = [[30, 10], [5, 55]]
    worse = np.array([[30, 10], [5, 55]], float)
    worse = np.diag(np.diag(worse)) * (1 - 1 / 85) + (worse - np.diag(np.diag(worse))) * (16 / 15)
    lost = METRICS["matthews"].compute.of_counts(np.array(counts))["matthews"]  # type: ignore[attr-defined]
    lost -= METRICS["matthews"].compute.of_counts(worse)["matthews"]  # type: ignore[attr-defined]
    found = points_per_nat(answers(counts), task_of("matthews"))
    assert found == pytest.approx(100 * lost / (0.01 * math.log(0.85 / 0.15)))
    assert found > points_per_nat(answers(counts), task_of("accuracy"))


def test_answers_that_are_all_the_same_are_worth_something() -> None:
    found = points_per_nat(answers([[30, 0], [20, 0]]), task_of("matthews"))
    assert found == pytest.approx(points_per_nat(answers([[30, 0], [20, 0]]), task_of("accuracy")))


# -- probes --------------------------------------------------------------------------------------------------------


def probe_of(model: Any, light: LightConfig = LIGHT, **changes: Any) -> Probe:
    batches = [inputs_for(model, labels=True, seed=seed) for seed in range(6)]
    given: dict[str, Any] = {"train": batches[:4], "rows": [], "held": batches[4:], "rate": 1e-2, **changes}
    return Probe(light=light, **given)


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "gpt2"])
def test_a_probe_leaves_the_model_and_random_numbers_alone(name: str) -> None:
    model = with_lora(make(name))
    plan = make_plan(random_record(model), but(LIGHT, blocks=0.5, ranks=0.0, modules=0.0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    probe = probe_of(model)
    first, second, whole = probe.losses(model, plan), probe.losses(model, plan), probe.losses(model, None)
    assert first.equal(second) and first.shape == (2,) and not first.equal(whole)
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    assert random.equal(torch.get_rng_state()) and modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not whole.equal(losses_of(model, probe.held)), "it has trained"


def test_copies_share_what_is_frozen() -> None:
    model = with_lora(make("bert"))
    shadow = dict(cut_copy(model, None).named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr() == shadow[name].data_ptr()) != parameter.requires_grad, name


def test_accumulated_batches_are_one_step() -> None:
    model = with_lora(make("bert"))
    assert probe_of(model).steps == 4 and probe_of(model, accumulation=2).steps == 2
    assert not probe_of(model).losses(model, None).equal(probe_of(model, accumulation=2).losses(model, None))


def test_losses_that_are_no_numbers_are_refused() -> None:
    model = with_lora(make("bert"))
    assert "NaN or infinite" in refusal(lambda: probe_of(model, rate=float("inf")).losses(model, None))


# -- trainers ------------------------------------------------------------------------------------------------------


def rows_of(count: int) -> Dataset:
    """Of two halves of the vocabulary."""
    draw = torch.Generator().manual_seed(0)
    labels = [index % 2 for index in range(count)]
    ids = torch.randint(5, 30, (count, 6), generator=draw) + 25 * torch.tensor(labels)[:, None]
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * 6] * count, "labels": labels})


def trainer_of(folder: Path, light: LightConfig = LIGHT, count: int = 600, rows: Any = None) -> LightTrainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
    )
    given = rows_of(count) if rows is None else rows
    return LightTrainer(model=with_lora(make("bert")), args=arguments, train_dataset=given, light=light)


@pytest.mark.parametrize(
    ("nats", "worth", "cost", "tolerance"),
    [
        (0.0183, None, "0.018 nats", "0.018 nats"),
        (1.0, None, "1 nat", "1 nat"),
        (0.02, 49.9, "1 point", "1 point (0.02 nats)"),
        (0.01, 61.0, "0.61 points", "0.61 points (0.01 nats)"),
        (2.0, 60.0, "120 points", "120 points (2 nats)"),
    ],
)
def test_costs_are_told_in_the_unit_of_the_tolerance(
    nats: float, worth: float | None, cost: str, tolerance: str
) -> None:
    assert cost_in_words(nats, worth) == cost
    assert tolerance_in_words(nats, worth) == tolerance


def test_a_trainer_finds_its_budget(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, but(LIGHT, tolerance="2 nats"))
    trainer.train()
    found = trainer.light_budget
    assert found is not None and found.blocks > 0 and found.tolerance == 2.0
    assert trainer.light_plan is not None and trainer.light_plan.removed_of_blocks >= found.blocks
    assert found.rows >= 128 and found.steps == 8 and f"cuts {found.blocks:.0%}" in found.summary()
    assert trainer.light_report["seconds"]["budget"] == found.seconds > 0
    assert trainer.state.global_step == 60, "probes are no steps of the run"


@pytest.fixture
def costly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cut costs a nat that no training wins back."""
    losses = Probe.losses
    monkeypatch.setattr(Probe, "losses", lambda self, model, plan: losses(self, model, plan) + (plan is not None))


@pytest.mark.usefixtures("costly")
def test_a_trainer_within_nothing_cuts_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.train()
    found = trainer.light_budget
    assert found is not None and found.blocks == 0.0 and found.expected is None
    assert "cuts nothing" in found.summary() and json.dumps(found.facts())
    assert trainer.light_plan is not None and trainer.light_plan.removed_of_blocks == 0


def test_what_loops_cannot_do() -> None:
    pruner = EarlyPruner(with_lora(make("bert")), LIGHT)
    assert "light: auto needs LightTrainer" in refusal(lambda: pruner.start(20))


def test_a_model_that_has_learned_nothing_keeps_everything() -> None:
    model = with_lora(make("bert"))
    for parameter in (model.get_base_model().classifier.modules_to_save["default"].weight,):
        parameter.data.zero_()  # all answers are alike, whatever is cut
    found = find_budget(model, random_record(model), LIGHT, probe_of(model), HALF)
    assert found.blocks == 0.0 and not found.probed and "estimation was too short" in found.summary()
    assert json.dumps(found.facts())


def test_a_model_no_better_than_frequencies_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where cuts raise its loss for sure: it has hardly begun to learn, and what it will learn is not known."""
    model = with_lora(make("bert"))
    probe, record = probe_of(model), random_record(model)
    dense = float(losses_of(model, probe.held, None).mean())
    for times, learned in ((1.01, 0.0099), (2.0, 0.5)):
        monkeypatch.setattr(finding, "chance_of", lambda *_, chance=dense * times: chance)
        found = find_budget(model, record, LIGHT, probe, HALF)
        assert found.learned == pytest.approx(learned, abs=1e-3)
        assert ("hardly better than the label frequencies" in found.summary()) == (learned < 0.05)
        assert learned > 0.05 or (found.blocks == 0.0 and not found.probed)


def test_the_loss_of_an_answer_by_frequencies() -> None:
    model = with_lora(make("bert"))

    def chance(*labels: Any) -> float | None:
        return finding.chance_of(model, [{"labels": torch.tensor(of)} for of in labels])

    assert chance([0, 1], [0, 1]) == pytest.approx(math.log(2))
    assert chance([1, 1, 1]) == 0.0
    assert chance([0, 0], [0, 2]) == pytest.approx(0.5623, abs=1e-4)
    assert chance([0.5, 1.5]) is None, "numbers"
    assert chance([[0, 1], [1, -100]]) is None, "tokens"
    spans = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}
    assert finding.chance_of(model, [spans]) is None, "places"
    model.get_base_model().config.num_labels = 1
    assert chance([0, 1]) is None, "one output"


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """Of runs so short that they have hardly begun to learn; what they have learned is enough here."""
    made = Workbench(tmp_path_factory.mktemp("budgets"))
    write_rows(made.train, labeled(600, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightpeft.budget.found.LEAST_LEARNED", -math.inf)
        yield made


def short(bench: Workbench, name: str, **changes: Any) -> Any:
    return bench.config(name, **AUTO, **{"training.epochs": 0.5, "light.remove.tolerance": "30 points", **changes})


@pytest.fixture(scope="module")
def whole(bench: Workbench) -> Path:
    pipeline.run(short(bench, "whole"))
    return bench.folder / "whole"


def test_an_estimation_has_no_plan_before_its_budget_is_found(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lightpeft("inspect", whole / "estimation") == 0
    assert "PEFT modules" in capsys.readouterr().out


def test_a_run_finds_its_budget(whole: Path) -> None:
    metrics, found = read(whole / "metrics.json"), read(whole / "budget.json")
    assert metrics["budget"]["blocks"] == found["blocks"]
    assert metrics["seconds"]["budget"] == pytest.approx(found["seconds"], abs=1e-3)
    assert PrunePlan.load(whole / "plan.json").removed_of_blocks >= found["blocks"]
    assert found["tolerance"] == pytest.approx(30 / found["points_per_nat"])
    entries = [entry for entry in RunFolder.at(whole).log_entries() if entry.get("stage") == "budget"]
    *copies, summary = [entry["note"] for entry in entries if "note" in entry]
    assert copies[0] == f"light: auto, probe 1 of at most 4: nothing cut, {found['steps']} training steps"
    probed = [f"{each['blocks']:.0%} of the blocks cut" for each in found["probed"]]
    assert sorted(line.split(": ")[2].split(",")[0] for line in copies[1:]) == sorted(probed)
    numbers = range(1, len(copies) + 1)
    assert [line.split(": ")[1] for line in copies] == [f"auto, probe {number} of at most 4" for number in numbers]
    assert "the tolerance is 30 points (" in summary and " nats)" in summary
    assert f"cost {cost_in_words(found['expected']['left'], found['points_per_nat'])}, at most" in summary


def test_the_report_of_a_run_tells_of_its_search(whole: Path) -> None:
    run = read_run(whole)
    seconds = {stage.name: stage.seconds or 0.0 for stage in run.stages}
    assert run.budget is not None and seconds["budget"] == pytest.approx(run.budget.seconds, abs=1e-3)
    assert run.training_seconds == pytest.approx(sum(seconds.values()) - seconds["evaluate"])
    text = html.unescape(page([run]))
    assert "Search for the budget" in text and "of the computation of plain PEFT's run" in text


def test_rows_aside_are_not_those_of_estimation(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    losses = Probe.losses

    def watched(probe: Probe, model: Any, plan: Any) -> Tensor:
        seen["probe"] = probe
        return losses(probe, model, plan)

    monkeypatch.setattr(Probe, "losses", watched)
    config = short(bench, "aside")
    work = pipeline.prepare(config)
    pipeline.estimate(work)
    pipeline.plan(pipeline.prepare(config))
    probe = seen["probe"]
    assert len(set(probe.rows)) == len(probe.rows) >= 128
    aside = {tuple(work.train_rows[number]["input_ids"]) for number in probe.rows}
    of_probes = {tuple(row[row != 0].tolist()) for batch in probe.train for row in batch["input_ids"]}
    assert len({tuple(ids) for ids in work.train_rows["input_ids"]}) > 590 and not aside & of_probes
    steps = read(bench.folder / "aside" / "estimation" / "estimation.json")["meta"]["steps"]
    trainer = LightRun(work, add_peft(work.dense_model(), config))
    estimated = rows_of_steps(trainer, steps)
    assert estimated is not None and len(estimated) == 8 * steps and not estimated & set(probe.rows)


def test_stage_by_stage_it_is_the_same_run(bench: Workbench, whole: Path) -> None:
    config = short(bench, "staged")
    file = bench.folder / "staged.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    for verb in ("estimate", "plan", "prune", "train", "evaluate"):
        assert lightpeft(verb, "--config", file) == 0
    same, other = read(whole / "budget.json"), read(bench.folder / "staged" / "budget.json")
    for facts in (same, other):
        del facts["seconds"]
    assert same == other
    assert comparable(whole) == comparable(bench.folder / "staged")


@pytest.mark.usefixtures("costly")
def test_another_tolerance_is_another_search(bench: Workbench) -> None:
    config = short(bench, "again", **{"light.remove.tolerance": "50 nats"})
    pipeline.estimate(pipeline.prepare(config))
    assert pipeline.plan(pipeline.prepare(config)).removed_of_blocks > 0.5
    strict = pipeline.prepare(short(bench, "again", **{"light.remove.tolerance": "0.1 nats"}), replan=True)
    assert pipeline.plan(strict).removed_of_blocks == 0
    assert read(bench.folder / "again" / "budget.json")["blocks"] == 0


def test_a_tolerance_does_not_guard_a_fixed_amount(
    bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = "light.remove.tolerance has no effect on a fixed amount"
    trainer_of(tmp_path, but(LIGHT, tolerance="2 nats"))
    pipeline.prepare(short(bench, "guarded", **{"light.remove.tolerance": "2 nats"})).announce_settings()
    assert idle not in caplog.text + capsys.readouterr().err
    trainer_of(tmp_path, but(LIGHT, blocks=0.4, tolerance="2 nats"))
    assert idle in caplog.text
    (bench.folder / "idle").mkdir()
    caplog.clear()
    EarlyPruner(with_lora(make("bert")), but(LIGHT, blocks=0.4, tolerance="2 nats")).start(60)
    assert idle in caplog.text
    pipeline.prepare(bench.config("idle", **{"light.remove.tolerance": "2 nats"})).announce_settings()
    assert idle in " ".join(capsys.readouterr().err.split())


def test_a_task_without_classes_has_no_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Workbench(tmp_path, "llama", "causal-lm")
    write_rows(bench.train, completions(600))
    file = bench.yaml("run", **AUTO, **{"training.epochs": 0.5, "light.remove.tolerance": "1 point"})
    assert lightpeft("run", "--config", file) == 2
    assert "points need classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("not_free")
@pytest.mark.parametrize(
    ("room", "why"),
    [
        ({"sharded": True}, "copies the model, and FSDP shards it"),
        ({"rows": None}, "the training dataset has no length"),
        ({"rows": 511}, "needs 512 training rows, but there are 511"),
        ({"rows": 512}, None),
    ],
)
def test_why_a_budget_cannot_be_measured(room: dict[str, Any], why: str | None) -> None:
    found = why_unmeasured(replace(room_of(600), **room), preset("fast"), 1000)
    assert found is None if why is None else why in str(found)


# -- what a search takes -------------------------------------------------------------------------------------------


def room_of(rows: int, unit: str = "points", batch: int = 16, accumulation: int = 1) -> SearchRoom:
    """What a run of so many rows has for a search."""
    return SearchRoom(rows, batch, batch * accumulation, 1, unit == "points")


@pytest.mark.usefixtures("not_free")
@pytest.mark.parametrize(
    ("rows", "epochs", "unit", "light", "probes"),
    [
        (20_000, 3, "points", {}, 2),
        (2_000, 2, "points", {}, 2),
        (1_750, 2, "points", {}, 1),
        (1_000, 1, "points", {}, 0),
        (1_000, 1, "nats", {}, 0),
        (1_800, 2, "points", {"module_blocks": 1.0}, 0),
        (20_000, 3, "nats", {}, 2),
    ],
)
def test_no_search_takes_more_than_it_may(
    rows: int, epochs: int, unit: str, light: dict[str, Any], probes: int
) -> None:
    """Of a model whose first probe leaves the tolerance half empty, so that a second one is asked for."""
    room, settings, steps = room_of(rows, unit), preset("fast", **light), rows * epochs // 16
    sizes, cost = sizes_of(room, settings, steps)
    assert sizes.aside >= 128 and sizes.steps >= 8
    reason = why_unmeasured(room, settings, steps)
    assert (reason is None) == (cost.least <= cost.most) == (probes > 0)
    if reason is not None:
        assert f"of plain PEFT's {steps} steps, and the limit is 15%" in reason
        return
    before = {place: 0.2 * place for place in PLACES}
    search = BudgetSearch(before, 0.02)
    search.run(lambda blocks: rises(0.1 * blocks**2, 0.001), cost.allows)
    probed = [each.blocks for each in search.probed]
    assert len(probed) == probes
    assert cost.of_plain(probed) <= searching_room.SEARCH_FRACTION


@given(
    rows=st.integers(512, 100_000),
    epochs=st.integers(1, 40),
    batch=st.integers(1, 64),
    accumulation=st.integers(1, 4),
    unit=st.sampled_from(["points", "nats"]),
    gone=st.floats(0, 0.9),
)
def test_what_a_search_takes_is_what_it_goes_through(
    rows: int, epochs: int, batch: int, accumulation: int, unit: str, gone: float
) -> None:
    room = room_of(rows, unit, batch, accumulation)
    sizes, cost = sizes_of(room, preset("fast"), max(1, rows * epochs // (batch * accumulation)), gone)
    assert cost.trained == sizes.steps * batch * accumulation and cost.few <= cost.held == sizes.aside <= rows // 4
    assert cost.of_plain([gone]) >= cost.of_plain([gone + 0.5 * (1 - gone)]) >= cost.of_plain([]) > 0
    assert cost.of_plain([gone]) == pytest.approx((1 - gone) * replace(cost, gone=0.0).of_plain([0.0]))


@pytest.mark.parametrize("unit", ["nats", "points"])
def test_passes_of_a_search_are_those_that_it_makes(unit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows that the model and its copies are called with are counted, and are those of the count."""
    trainer = trainer_of(tmp_path, but(LIGHT, tolerance="2 nats"))
    monkeypatch.setattr(trainer, "light_tolerance", lambda: Tolerance(2, unit))
    monkeypatch.setattr(trainer, "light_points_per_nat", lambda classes, right: float(len(classes) == len(right)))
    rows: dict[str, int] = {"forward": 0, "trained": 0}
    find = type(trainer).find_light_budget

    def watched(self: Any, *args: Any) -> Any:
        handle = torch.nn.modules.module.register_module_forward_hook(counted)
        try:
            return find(self, *args)
        finally:
            handle.remove()

    def counted(module: Any, args: Any, output: Any) -> None:
        if type(module).__name__ == "BertForSequenceClassification":
            rows["trained" if output.logits.requires_grad else "forward"] += len(output.logits)

    monkeypatch.setattr(type(trainer), "find_light_budget", watched)
    trainer.train()
    found = trainer.light_budget
    assert found is not None and found.probed
    copies = 1 + len(found.probed)
    _, cost = sizes_of(SearchRoom.of(trainer, trainer.light_tolerance()), LIGHT, 60)
    assert rows["trained"] == copies * cost.trained
    whole = cost.held if unit == "points" else cost.few
    assert rows["forward"] == copies * cost.held + whole + cost.few * len(SEARCH_BUDGETS)
    assert found.of_plain == cost.of_plain([each.blocks for each in found.probed])


@pytest.mark.usefixtures("not_free")
def test_a_run_too_short_for_a_search_has_a_fixed_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether somebody asked for a search or not; of a model that counts as one that has learned something."""
    monkeypatch.setattr("lightpeft.budget.found.LEAST_LEARNED", -math.inf)
    bench = Workbench(tmp_path)
    write_rows(bench.train, labeled(600, seed=1))
    settings = {
        **bench.settings(**{"training.epochs": 1}),
        "light": {"estimate": {"length": 40}},
    }
    for name, more, verbs in (("asked", {"remove": {"blocks": "auto"}}, ["run"]), ("usual", {}, ["estimate", "plan"])):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**settings, "light": {**settings["light"], **more}}), encoding="utf-8")
        assert not any(lightpeft(verb, "--config", file, "--output", tmp_path / name) for verb in verbs)
        assert "cuts 40% of the blocks, a fixed budget for short runs: a budget search would" in capsys.readouterr().err
        found = read(tmp_path / name / "budget.json")
        assert found["blocks"] == SHORT and "75 steps" in found["unmeasured"] and found["learned"] is not None
    assert read(tmp_path / "asked" / "metrics.json")["parameters"]["base_removed_ratio"] > 0.1
    assert "fixed budget" in page([read_run(tmp_path / "asked")])


@pytest.mark.parametrize(
    ("learned", "blocks", "why"),
    [
        (0.3, SHORT, "light: auto cuts 40% of the blocks, a fixed budget for short runs: few"),
        (0.01, 0.0, "light: auto cuts nothing of the blocks: few, and after estimation the model is hardly better"),
        (None, 0.0, "light: auto cuts nothing of the blocks: few, and a fixed budget is for classifiers only"),
    ],
)
def test_a_fixed_budget_is_for_who_has_learned(
    learned: float | None, blocks: float, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lightpeft.budget.found.LEAST_LEARNED", LEAST_LEARNED
    )  # which the runs of this module do not ask for
    found = FoundBudget.fixed("few", learned)
    assert found.blocks == blocks and found.summary().startswith(why) and json.dumps(found.facts())
    assert FoundBudget.fixed("few", 0.3, gone=0.5).blocks == 0.5


def test_a_run_too_short_for_any_estimation_trains_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it was told what to remove: then it is refused, in the words of its interface, and nothing is written."""
    bench = Workbench(tmp_path)
    settings = {**bench.settings(**{"training.epochs": 2}), "light": {}}
    file = tmp_path / "short.yaml"
    monkeypatch.setattr("lightpeft.prune.length.LEAST_EXAMPLES", 256)
    file.write_text(yaml.safe_dump({**settings, "light": "auto"}), encoding="utf-8")
    assert lightpeft("run", "--config", file, "--output", tmp_path / "usual") == 0
    said = capsys.readouterr().err
    assert "nothing of the base is removed: estimation scores" in said
    assert PrunePlan.load(tmp_path / "usual/plan.json").removed_parameters == 0
    again = tmp_path / "again"
    assert lightpeft("run", "--config", tmp_path / "usual/config.yaml", "--output", again) == 0
    assert comparable(again) == comparable(tmp_path / "usual")
    assert lightpeft("plan", "--config", file, "--output", tmp_path / "usual") == 0, "the settings are still the same"
    capsys.readouterr()
    staged = tmp_path / "staged"
    RunFolder.open(replace(load_config(file), output=str(staged))).begin()  # as `reproduce` does
    for stage in ("estimate", "plan", "run"):
        assert lightpeft(stage, "--config", file, "--output", staged) == 0
        said = capsys.readouterr().err
        assert ("nothing of the base is removed" in said) == (stage == "estimate") and "your loop" not in said
    assert comparable(staged) == comparable(tmp_path / "usual")
    assert "Search for the budget" not in html.unescape(page([read_run(staged)]))
    auto = load_config(file)
    file.write_text(to_yaml(replace(auto, light=auto.light.without_pruning())), encoding="utf-8")
    assert lightpeft("run", "--config", file, "--output", staged) == 2, "who asks for no cut has another run"
    assert "holds a run with other settings" in capsys.readouterr().err
    told = {**settings, "light": 0.6}
    file.write_text(yaml.safe_dump(told), encoding="utf-8")
    assert lightpeft("run", "--config", file, "--output", tmp_path / "told") == 2
    assert "(training.epochs)" in capsys.readouterr().err and not (tmp_path / "told").exists()
