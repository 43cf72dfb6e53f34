"""How long a run trains and at which rate, where the settings say auto; and what too few scored examples are worth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lights import light_of
from tiny import refusal
from training import estimate, inputs, student
from workbench import Workbench, lightpeft

from lightpeft import LightPeftError
from lightpeft.app.runs import pipeline, workspace
from lightpeft.config import TrainingConfig, load_config
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.prune import length
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.length import StageLength, fit_stage, remove_nothing_if_short, stage_of
from lightpeft.recipe.pruner import EarlyPruner
from lightpeft.training.schedule import (
    LEAST_EPOCHS,
    LEAST_RATE,
    LEAST_RUN_STEPS,
    MOST_EPOCHS,
    RATE,
    RATE_WIDTH,
    Pace,
    auto_epochs,
    auto_rate,
    resolve_auto,
    scored_steps,
)

AUTO = {"training.epochs": "auto", "training.learning_rate": "auto"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("schedule"))


# The rule


def trained(rows: int, width: int = RATE_WIDTH, processes: int = 1, **given: Any) -> TrainingConfig:
    return resolve_auto(TrainingConfig(**given), rows, width, processes)


rows_and_batches = {
    "rows": st.integers(1, 20_000),
    "batch_size": st.integers(1, 64),
    "gradient_accumulation": st.integers(1, 4),
    "processes": st.integers(1, 4),
}


@given(**rows_and_batches)
def test_few_rows_are_seen_more_often(rows: int, processes: int, **sizes: int) -> None:
    training = trained(rows, RATE_WIDTH, processes, **sizes)
    epochs: Any = training.epochs
    steps = Pace.of(rows, training, processes).steps(epochs)
    assert LEAST_EPOCHS <= epochs <= MOST_EPOCHS
    assert steps >= LEAST_RUN_STEPS or epochs == MOST_EPOCHS
    # no pass more than that takes
    assert epochs == LEAST_EPOCHS or steps - Pace.of(rows, training, processes).steps_per_epoch < LEAST_RUN_STEPS


@pytest.mark.parametrize(("rows", "epochs"), [(20, 40), (300, 20), (600, 11), (2000, 4), (8282, 3), (100_000, 3)])
def test_epochs_of_common_sizes(rows: int, epochs: int) -> None:
    assert trained(rows).epochs == epochs


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_more_steps_per_epoch_are_never_more_epochs(a: int, b: int) -> None:
    few, many = sorted((a, b))
    assert auto_epochs(few) >= auto_epochs(many)


@given(st.integers(16, 50_000), st.integers(16, 50_000))
def test_wider_models_never_train_at_a_higher_rate(a: int, b: int) -> None:
    narrow, wide = sorted((a, b))
    assert RATE >= auto_rate(narrow) >= auto_rate(wide) >= LEAST_RATE


def test_rates_at_both_ends() -> None:
    assert auto_rate(RATE_WIDTH) == auto_rate(64) == RATE
    assert auto_rate(4096) == pytest.approx(3e-4, rel=0.03) and auto_rate(16_384) == LEAST_RATE
    assert auto_rate(None) == LEAST_RATE  # as if it were wide


@given(st.floats(0.01, 100), st.floats(1e-7, 10), st.integers(1, 10_000))
def test_numbers_stay(epochs: float, rate: float, rows: int) -> None:
    given = {"epochs": epochs, "learning_rate": rate}
    assert trained(rows, 4096, **given) == TrainingConfig(**given)


@pytest.mark.parametrize("name", ["epochs", "learning_rate"])
def test_each_is_settled_alone(name: str) -> None:
    given: dict[str, Any] = {"epochs": 2.5, "learning_rate": 7e-3, name: "auto"}
    training = trained(64, **given)
    assert isinstance(getattr(training, name), (int, float))
    other = {"epochs", "learning_rate"} - {name}
    assert all(getattr(training, each) == given[each] for each in other)


@pytest.mark.parametrize("name", ["epochs", "learning_rate"])
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(LightPeftError, match=f"{name} is 'many'; it must be a number or auto"):
        TrainingConfig(**{name: "many"})


@given(steps=st.integers(1, 60), **{**rows_and_batches, "rows": st.integers(1, 300)})
def test_least_examples_of_some_steps_in_a_row(steps: int, rows: int, processes: int, **sizes: int) -> None:
    pace = Pace.of(rows, TrainingConfig(**sizes), processes)
    of_step = math.prod(sizes.values()) * processes
    of_steps = [min(of_step, rows - start) for start in range(0, rows, of_step)]
    if len(of_steps) == pace.steps_per_epoch:  # else accumulation ends in the middle of a batch
        assert pace.least_examples(steps) == min(sums_of_windows(of_steps, steps))


@given(examples=st.integers(0, 600), **{**rows_and_batches, "rows": st.integers(1, 300)})
def test_stages_of_small_batches_are_longer(examples: int, rows: int, processes: int, **sizes: int) -> None:
    config = trained(rows, processes=processes, **sizes)
    pace, epochs = Pace.of(rows, config, processes), float(config.epochs)
    length, steps = pace.enough_steps(examples, pace.steps(epochs)), pace.steps(epochs)
    assert length == steps or pace.least_examples(scored_steps(length)) >= examples
    assert length <= 2 or pace.least_examples(scored_steps(length - 1)) < examples


@pytest.mark.parametrize(("batch_size", "least"), [(32, 32), (8, 63), (4, 127)])
def test_least_steps_of_a_run(batch_size: int, least: int) -> None:
    light = light_of(length="auto")
    pace = Pace(rows=4096, batch_size=batch_size)
    usual = stage_of(light, pace.steps(3)).steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length, "LEAST_EXAMPLES", 256)
        assert fit_stage(light, pace, pace.steps(3)).steps == max(usual, least)
        assert fit_stage(light, None, 500) == stage_of(light, 500), "rows that are not counted"


def test_a_part_of_the_run_is_longer_for_its_examples_and_a_number_of_steps_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(length, "LEAST_EXAMPLES", 256)
    pace = Pace(rows=640, batch_size=8)
    assert fit_stage(light_of(length=0.1), pace, 400).steps == 63
    assert fit_stage(light_of(length=24), pace, 80).steps == 24
    with pytest.raises(LightPeftError, match="too few for a reliable plan, which needs 256"):
        fit_stage(light_of(length=0.1), pace, 80)
    light, unable = remove_nothing_if_short(light_of(blocks="auto", length=0.1), pace, 80)
    assert unable is not None and not light.uses_scores and light.rates.scale == 1
    assert remove_nothing_if_short(light_of(blocks="auto", length=0.1), pace, 400)[1] is None
    assert remove_nothing_if_short(light_of(length=0.1), pace, 80) == (light_of(length=0.1), None), (
        "what is asked for is refused"
    )


def sums_of_windows(of_steps: Sequence[int], steps: int) -> list[int]:
    """What `steps` steps see, from each step of an epoch on."""
    return [sum(itertools.islice(itertools.cycle(of_steps), start, start + steps)) for start in range(len(of_steps))]


# In runs


def test_a_run_says_what_auto_stands_for(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    config = bench.config("auto", method="plain", **AUTO, **{"training.batch_size": 32})
    report = pipeline.run(config)
    line = "training takes 80 steps (training.epochs: 40) at learning rate 0.001"
    assert line in " ".join(capsys.readouterr().err.split())
    assert line in (bench.folder / "auto" / "log.jsonl").read_text()
    assert report["config"]["training"]["epochs"] == 40 and report["config"]["training"]["learning_rate"] == 1e-3
    stored = load_config(bench.folder / "auto" / "config.yaml").training
    assert (stored.epochs, stored.learning_rate) == ("auto", "auto")  # as it was given: the same command goes on
    assert pipeline.run(config) == report


def test_numbers_are_taken_without_a_word(bench: Workbench) -> None:
    work = pipeline.prepare(bench.config("numbers"))
    assert work.config == work.run.config
    work.announce_settings()
    assert not bench.folder.joinpath("numbers").exists()


# Too few scored examples


def test_a_run_of_few_examples_is_refused_before_it_begins(
    bench: Workbench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows in 8 batches, three times: of 12 steps, the most that estimation may take for it, six are scored."""
    monkeypatch.setattr(length, "LEAST_EXAMPLES", 49)
    assert lightpeft("run", "--config", bench.yaml("few")) == 2
    error = capsys.readouterr().err
    assert "estimation scores 32 examples, too few for a reliable plan, which needs 49" in error
    assert error.count("\n") == 1 and not (bench.folder / "few").exists()
    monkeypatch.setattr(length, "LEAST_EXAMPLES", 48)
    assert pipeline.run(bench.config("enough"))["metrics"]
    assert EstimationRecord.load(bench.folder / "enough" / "estimation").meta["steps"] == 11


def test_what_is_estimated_already_goes_on(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders whose stage ran before there was a minimum are still evaluated."""
    config = bench.config("estimated")
    pipeline.estimate(pipeline.prepare(config))
    monkeypatch.setattr(workspace, "fit_stage", lambda *_: pytest.fail("asked again"))
    assert pipeline.run(config)["metrics"]


@pytest.mark.parametrize("parts", [1, 4])
def test_examples_are_counted_in_the_second_half(parts: int) -> None:
    assert estimate(student(), steps=5, parts=parts, rows=8).record().meta["scored_examples"] == 3 * 8


def test_a_loop_of_few_examples_is_warned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It has said how many steps are to be taken."""
    for least, said in ((16, 0), (17, 1)):
        monkeypatch.setattr(length, "LEAST_EXAMPLES", least)
        assert estimate(student(), steps=4, rows=8).record()
        assert (
            sum("scores 16 examples, too few for a reliable plan, which needs 17" in line for line in caplog.messages)
            == said
        )


def test_a_stage_that_was_fitted_ends_with_what_it_has_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches may be smaller than the settings say, and a run does not die of that at its cut."""
    monkeypatch.setattr(length, "LEAST_EXAMPLES", 17)
    estimator = Estimator(student(), light_of(length=0.1))
    estimator.start(40, StageLength(4, 4))
    for steps in range(1, 5):
        estimator.model(**inputs()).loss.backward()
        estimator.step()
        if steps == 2:
            with pytest.raises(LightPeftError, match="too few for a reliable plan"):  # in the middle
                estimator.record()
    assert estimator.finished and estimator.record()
    assert "scores 6 examples, too few" in caplog.text


@pytest.mark.parametrize("light", ["auto", 0.1])
def test_the_first_step_of_a_loop_fits_its_length(monkeypatch: pytest.MonkeyPatch, light: Any) -> None:
    """To 27 examples of three a step; the loop is told at once where that cannot be."""
    monkeypatch.setattr(length, "LEAST_EXAMPLES", 27)
    pruner = EarlyPruner(student(), light_of(length=light))
    pruner.start(40)
    while not pruner.finished:
        pruner.model(**inputs()).loss.backward()
        pruner.step()
    assert pruner.estimator.steps == 17 and pruner.record().meta["scored_examples"] == 27
    monkeypatch.setattr(length, "LEAST_EXAMPLES", 256)
    pruner = EarlyPruner(student(), light_of(length=light))
    pruner.start(40)
    pruner.model(**inputs()).loss.backward()
    assert "too few for a reliable plan" in (said := refusal(pruner.step)) and "longer (total_steps)" in said


def test_a_fitted_length_is_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its half, at step 8, lies behind the checkpoint; without it, other steps would be scored."""
    monkeypatch.setattr(length, "LEAST_EXAMPLES", 27)

    def trained(steps: int, folder: Path | None = None) -> Estimator:
        estimator = Estimator(student(), light_of(length=0.1))
        estimator.start(40)
        if folder is not None:
            estimator.load_state(folder)
        while estimator.steps < steps and not estimator.finished:
            estimator.model.zero_grad()
            estimator.model(**inputs(seed=estimator.steps)).loss.backward()
            estimator.step()
        return estimator

    trained(7).save_state(tmp_path)
    whole, resumed = trained(40), trained(40, tmp_path)
    assert resumed.steps == whole.steps == 17
    one, other = whole.record(), resumed.record()
    assert other.meta["scored_examples"] == 27 and all(one.scores[key].equal(other.scores[key]) for key in one.scores)


@given(st.integers(1, 1000))
def test_the_second_half_is_scored(length: int) -> None:
    assert length <= 2 * scored_steps(length) <= length + 1
