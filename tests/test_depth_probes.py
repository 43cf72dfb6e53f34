"""How deep a task has to be read: classifiers on every block's output, and what a run makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lights import light_of
from peft import LoraConfig
from tiny import TEXT, TOKENS, inputs_for, make, maker, refusal, with_lora, without_dropout
from torch import Tensor, nn
from training import chunks, dataset, trained_weights
from transformers import TrainingArguments
from workbench import Workbench, forked, labeled, lightpeft, read, write_rows

from lightpeft import EarlyPruner, LightTrainer, find_depth
from lightpeft.app.runs import depth, pipeline
from lightpeft.files import read_tensors
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.depth_probes import (
    RIDGES,
    FoundDepth,
    enough,
    is_classifying_decoder,
    place_of_head,
    read_out,
    states_by_block,
)
from lightpeft.prune.discovery import ensure_family
from lightpeft.recipe import depth as trainers_depth
from lightpeft.saving.peft_adapter import WEIGHTS
from lightpeft.training.arguments import training_arguments


def test_every_row_is_judged_by_the_others() -> None:
    """The closed form is what leaving each row out and fitting again gives, at the penalty that does best."""
    generator = torch.Generator().manual_seed(0)
    states, labels = torch.randn(12, 3, generator=generator), torch.arange(12) % 2
    states[:, 1] += labels
    scaled = (states.double() - states.double().mean(0)) / states.double().std(0)
    inputs, targets = torch.cat([scaled, torch.ones(12, 1)], 1), nn.functional.one_hot(labels).double()
    errors = []
    for ridge in RIDGES:
        wrong = []
        for row in range(12):
            others = [other for other in range(12) if other != row]
            x = inputs[others]
            penalty = torch.diag(torch.tensor([ridge, ridge, ridge, 0.0], dtype=torch.float64))  # none on the intercept
            weights = torch.linalg.solve(x.T @ x + penalty, x.T @ targets[others])
            wrong.append((targets[row] - inputs[row] @ weights).square().sum())
        errors.append(torch.stack(wrong))
    best = min(errors, key=lambda of_ridge: float(of_ridge.mean()))
    found = read_out(states, labels)
    torch.testing.assert_close(found.errors, best)
    assert found.accuracy > 0.5


def test_the_least_depth_within_noise() -> None:
    noise = torch.tensor([0.0, 0.2] * 8)
    assert enough([noise + 1, noise.flip(0) + 0.01, noise, noise]) == 2
    assert enough([noise + 1, noise + 0.5, noise, noise + 1]) == 3


def test_where_a_head_reads() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert place_of_head(mask, first=False).tolist() == [3, 2]
    assert place_of_head(mask, first=True).tolist() == [2, 0]


def rows_read_at(block: int, rows: int = 96) -> tuple[Any, list[dict[str, Tensor]]]:
    """A tiny decoder, and batches whose labels are the sign of a number in its block's output."""
    model = without_dropout(make("llama-classifier"))
    data = inputs_for(model, rows=rows, labels=True)
    states, _ = states_by_block(model, [data])
    data["labels"] = (states[block][:, 0] > states[block][:, 0].median()).long()
    return model, list(chunks(data, 16))


@pytest.mark.parametrize("block", [0, 2])
def test_the_block_that_tells_most(block: int) -> None:
    model, batches = rows_read_at(block)
    found = find_depth(model, batches)
    assert min(range(3), key=found.error.__getitem__) == block and found.accuracy[block] > 0.8
    assert found.enough <= block + 1 and found.rows == 96 and len(found.error) == 3
    assert found.depth == pytest.approx(1 - found.enough / 3)
    assert f"the task needs {found.enough} of 3 blocks" in found.summary()


def test_the_model_stays_as_it_was() -> None:
    model, batches = rows_read_at(0)
    model.train()
    find_depth(model, batches)
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_a_decoder_that_is_not_listed_is_read_at_its_last_token() -> None:
    """In its first one, a causal model knows nothing of the text."""
    settings = {**TEXT, **TOKENS, "num_key_value_heads": 4}
    model = without_dropout(maker("StableLmConfig", "StableLmForSequenceClassification", settings)()).eval()
    ensure_family(model)
    assert is_classifying_decoder(model)
    data = inputs_for(model, padding="none", labels=True)
    first, _ = states_by_block(model, [data])
    data["input_ids"] = torch.cat([data["input_ids"][:, :1], data["input_ids"][:, 1:].flip(1)], 1)
    other, _ = states_by_block(model, [data])
    assert not any(one.allclose(two) for one, two in zip(first, other, strict=True))


def test_without_a_mask_all_tokens_are_real() -> None:
    model = without_dropout(make("llama-classifier"))
    data = inputs_for(model, padding="none", labels=True)
    masked, _ = states_by_block(model, [data])
    bare, _ = states_by_block(model, [{name: data[name] for name in ("input_ids", "labels")}])
    assert all(one.equal(other) for one, other in zip(masked, bare, strict=True))


def test_no_more_than_a_budget() -> None:
    found = FoundDepth([0.5] * 5, [0.1] * 5, 2, 64)
    assert found.depth == pytest.approx(0.6)
    assert [found.within(blocks) for blocks in (0, 0.39, 0.4, 0.9, "auto", None)] == pytest.approx(
        [0.0, 0.2, 0.4, 0.6, 0.6, 0.6]
    )


def test_what_cannot_be_read() -> None:
    model, batches = rows_read_at(0, rows=16)
    alike = [{**batch, "labels": torch.zeros_like(batch["labels"])} for batch in batches]
    assert "have the same label" in refusal(lambda: find_depth(model, alike))
    numbers = [{**batch, "labels": batch["labels"].float()} for batch in batches]
    assert "needs one class number for each row" in refusal(lambda: find_depth(model, numbers))


# -- runs --------------------------------------------------------------------------------------------------------------

AUTO: dict[str, Any] = {"light.remove.depth": "auto"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("reading"), "llama")


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lower of two blocks is enough; how many rows were looked at, each time."""
    asked: list[int] = []

    def find(model: nn.Module, batches: Iterable[dict[str, Tensor]], autocast: torch.dtype | None) -> FoundDepth:
        asked.append(sum(len(batch["labels"]) for batch in batches))
        return FoundDepth([0.9, 0.8], [0.1, 0.2], 1, asked[-1])

    for place in (depth, trainers_depth):
        monkeypatch.setattr(place, "find_depth", find)
    return asked


def test_a_run_is_one_of_the_depth_that_it_finds(bench: Workbench, half: list[int], capsys: Any) -> None:
    result = pipeline.run(bench.config("auto", **AUTO))
    assert "leaves out 50% of the blocks: the task needs 1 of 2 blocks" in capsys.readouterr().err
    pipeline.run(bench.config("given", **{"light.remove.depth": 0.5}))
    one, other = (read_tensors(bench.folder / name / "adapter" / WEIGHTS) for name in ("auto", "given"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert result["depth"] == read(bench.folder / "auto" / "metrics.json")["depth"]
    assert result["depth"]["depth"] == 0.5 and result["seconds"]["depth"] > 0
    assert PrunePlan.load(bench.folder / "auto" / "plan.json").budget["remove"]["depth"] == 0.5
    assert half == [64]
    pipeline.run(bench.config("auto", **AUTO))
    assert half == [64], "it is found once"


def test_a_run_says_if_ridge_regression_is_as_good(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the block of the least error, and within the interval of the run's accuracy."""

    def says(name: str, accuracy: list[float]) -> list[str]:
        found = FoundDepth(accuracy, [0.2, 0.1], 1, 64)
        monkeypatch.setattr(depth, "find_depth", lambda *given: found)
        warnings: list[str] = pipeline.run(bench.config(name, **AUTO))["warnings"]
        return [line for line in warnings if "ridge" in line]

    (line,) = says("as_good", [0.0, 1.0])
    ridge = "ridge regression on block 2 of the base is as good: leave-one-out accuracy 1.0000 on 64 training rows, "
    assert line.startswith(f"{ridge}and the run has ")
    assert says("worse", [1.0, 0.0]) == []


def test_rows_of_one_class_tell_no_depth(bench: Workbench, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Though the data have two: by chance, the rows that are looked at are alike."""
    last = int(torch.randperm(64, generator=torch.Generator().manual_seed(0))[-1])
    rows = [{**row, "label": "positive" if number == last else "negative"} for number, row in enumerate(labeled(64))]
    monkeypatch.setattr(depth, "PROBE_ROWS", 8)
    path = bench.yaml("alike", **AUTO, **{"data.train": str(write_rows(bench.folder / "alike.csv", rows))})
    assert lightpeft("run", "--config", path) == 2
    said = capsys.readouterr().err
    assert "all 8 rows have the same label; give light.remove.depth as a number, or other rows" in said
    assert "Traceback" not in said and not (bench.folder / "alike" / "depth.json").exists()


def test_an_estimation_that_is_taken_brings_its_depth(bench: Workbench, half: list[int]) -> None:
    assert lightpeft("estimate", "--config", bench.yaml("donor", **AUTO)) == 0
    taken = ("--estimation", bench.folder / "donor", "--light.remove.heads", "0.5")
    assert lightpeft("run", "--config", bench.yaml("taker", **AUTO), *taken) == 0
    assert read(bench.folder / "taker" / "metrics.json")["depth"]["depth"] == 0.5 and half == [64]


@pytest.mark.usefixtures("half")
def test_an_estimation_is_of_the_budget_that_bounds_its_depth(bench: Workbench, capsys: Any) -> None:
    of = {blocks: {**AUTO, "light.remove.blocks": blocks} for blocks in (0.5, 0.6)}
    assert lightpeft("estimate", "--config", bench.yaml("of half", **of[0.5])) == 0
    taken = ("--estimation", bench.folder / "of half")
    assert lightpeft("run", "--config", bench.yaml("of more", **of[0.6]), *taken) == 2
    assert "was made with other settings (light.remove.blocks)" in capsys.readouterr().err
    assert lightpeft("plan", "--run", bench.folder / "of half", "--light.remove.blocks", "0.4") == 2
    assert (
        "depth: auto dropped 50% of the blocks, more than light.remove.blocks 0.4; estimate again"
        in capsys.readouterr().err
    )
    assert lightpeft("plan", "--run", bench.folder / "of half", "--light.remove.blocks", "0.7") == 0


def test_what_comes_after_knows_the_depth(bench: Workbench, half: list[int]) -> None:
    """Speeds, a curve, both widths, and a page of a run that found its depth."""
    both = {**AUTO, "light.after.keep": "both", "light.after.full_width_steps": 0.25}
    config, folder = bench.yaml("used", **both), bench.folder / "used"
    assert lightpeft("run", "--config", config) == 0
    with forked():
        assert lightpeft("bench", "--config", config, "--rounds", "1", "--steps", "1") == 0
        assert lightpeft("plan", "--run", folder, "--curve") == 0
    assert lightpeft("report", folder) == 0 and half == [64]
    assert "Search for the depth" in (folder / "report.html").read_text(encoding="utf-8")


def test_it_goes_as_far_as_the_budget_allows(bench: Workbench, half: list[int]) -> None:
    assert lightpeft("estimate", "--config", bench.yaml("bounded", **AUTO, **{"light.remove.blocks": 0.4})) == 0
    assert not EstimationRecord.load(bench.folder / "bounded" / "estimation").left_out


def test_models_that_are_not_known_to_bear_it(tmp_path: Path, half: list[int], capsys: Any) -> None:
    for family, task in (("bert", "classification"), ("llama", "causal-lm")):
        made = Workbench(tmp_path / family, family, task)
        assert lightpeft("estimate", "--config", made.yaml("run", **AUTO)) == 0
        assert "light.remove.depth: auto leaves out 0% of the blocks: only" in capsys.readouterr().err
        assert not EstimationRecord.load(made.folder / "run" / "estimation").left_out
    assert not half


# -- trainers ----------------------------------------------------------------------------------------------------------


def trainer_of(folder: Path, light_depth: Any, base: str = "llama-classifier", **changes: Any) -> LightTrainer:
    light = light_of(length=4, depth=light_depth)
    arguments = TrainingArguments(str(folder), max_steps=8, use_cpu=True, report_to=[], disable_tqdm=True)
    given = {"model": make(base), "train_dataset": dataset(), "peft_config": LoraConfig(r=4, task_type="SEQ_CLS")}
    torch.manual_seed(0)
    return LightTrainer(args=arguments, light=light, **{**given, **changes})


def test_a_trainer_finds_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    third = FoundDepth([0.5, 0.9, 0.8], [0.3, 0.1, 0.2], 2, 64)
    monkeypatch.setattr(trainers_depth, "find_depth", lambda model, batches, autocast: third)
    weights = []
    for light_depth in ("auto", 1 / 3):
        with caplog.at_level("INFO", logger="lightpeft"):
            trainer = trainer_of(tmp_path / str(light_depth), light_depth)
        trainer.train()
        assert trainer.light_plan is not None and len(trainer.light_plan.left_out) == 1
        weights.append(trained_weights(trainer.model))
    assert caplog.text.count("drops 33% of the blocks: the task needs 2 of 3 blocks") == 1
    one, other = weights
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_shell_and_trainers_read_the_same(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[FoundDepth] = []

    def asked(*given: Any) -> FoundDepth:
        found.append(find_depth(*given))
        return found[-1]

    for place in (depth, trainers_depth):
        monkeypatch.setattr(place, "find_depth", asked)
    config = bench.config("shell", **AUTO)
    work = pipeline.prepare(config)
    pipeline.estimate(work)
    arguments = training_arguments(work.config.training, tmp_path, work.steps, config.seed, {})
    LightTrainer(
        work.dense_model().model,
        arguments,
        light=light_of(depth="auto"),
        peft_config=LoraConfig(r=4, task_type="SEQ_CLS"),
        train_dataset=work.train_rows,
        data_collator=work.collator,
    )
    shell, trainer = found
    assert shell.error == pytest.approx(trainer.error) and shell.enough == trainer.enough and shell.rows == trainer.rows


def test_trainers_of_other_models_leave_nothing_out(tmp_path: Path, half: list[int]) -> None:
    assert trainer_of(tmp_path, "auto", "bert").light_config.remove.depth == 0 and not half


def test_what_a_trainer_cannot_ask(tmp_path: Path) -> None:
    endless = dataset().to_iterable_dataset()
    assert "needs a training dataset with a length" in refusal(
        lambda: trainer_of(tmp_path, "auto", train_dataset=endless)
    )
    assert "LightTrainer does not load a model by name" in refusal(lambda: trainer_of(tmp_path, "auto", model="name"))


def test_where_nobody_finds_it(bench: Workbench, capsys: Any) -> None:
    light = light_of(depth="auto")
    assert "lightpeft.find_depth" in refusal(lambda: EarlyPruner(with_lora(make("llama-gqa")), light))
    assert lightpeft("check", "--config", bench.yaml("checked", **AUTO)) == 2
    assert "light.remove.depth is auto" in capsys.readouterr().err
