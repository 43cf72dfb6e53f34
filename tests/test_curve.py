"""What each budget would cost: nested cuts, their losses, and the command that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lights import but, light_of
from tiny import inputs_for, make, random_record, refusal, with_lora
from workbench import Workbench, lightpeft, read

from lightpeft import apply_plan
from lightpeft.app.runs import pipeline
from lightpeft.budget.curve import CURVE_BUDGETS, loss_curve, nested_plans
from lightpeft.plans.prune_plan import PrunePlan

BUDGET = light_of(criterion="fisher", modules=0.0, ranks=0.0)


def kept(plan: PrunePlan) -> set[tuple[str, int, int]]:
    """Units that stay."""
    found = set()
    for index, block in enumerate(plan.blocks):
        found |= {("head", index, head) for head in block.heads} | {("neuron", index, n) for n in block.neurons}
    return found


# -- plans -------------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), name=st.sampled_from(["bert", "llama-gqa", "gpt2"]), balanced=st.booleans())
def test_what_goes_at_one_budget_goes_at_the_next(seed: int, name: str, balanced: bool) -> None:
    record = random_record(with_lora(make(name)), seed)
    budget = but(BUDGET, head_unit="balanced" if balanced else "group")
    plans = dict(nested_plans(record, budget))
    assert list(plans) == sorted(plans)
    for part, plan in plans.items():
        assert plan.removed_of_blocks >= part
    for earlier, later in zip(list(plans.values()), list(plans.values())[1:], strict=False):
        assert kept(later) <= kept(earlier)


def test_budgets_that_the_floors_forbid_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    record = random_record(with_lora(make("llama-gqa")))
    monkeypatch.setattr("lightpeft.plans.planning.LEAST_NEURONS", 24)
    plans = dict(nested_plans(record, BUDGET, CURVE_BUDGETS))
    assert plans and max(plans) < max(CURVE_BUDGETS)
    monkeypatch.setattr("lightpeft.plans.planning.LEAST_NEURONS", 48)
    assert "no plan can be made for any budget: light.remove.blocks 0.9 cannot be reached" in refusal(
        lambda: dict(nested_plans(record, BUDGET, [0.9]))
    )


@pytest.mark.parametrize("parts", [[0.0], [1.0], [float("nan")], []])
def test_other_parts_are_refused(parts: list[float]) -> None:
    record = random_record(with_lora(make("bert")))
    assert refusal(lambda: dict(nested_plans(record, BUDGET, parts)))


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "t5"])
def test_losses_are_those_of_the_cut_model(name: str) -> None:
    model = with_lora(make(name))
    record = random_record(model)
    batches = [inputs_for(model, labels=True, seed=seed) for seed in range(3)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plans = dict(nested_plans(record, BUDGET, [0.2, 0.5]))
    dense, points = loss_curve(model, plans, batches)
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    assert dense == pytest.approx(mean_loss(model, batches), abs=1e-6)
    for point in points:
        cut = with_lora(make(name))
        apply_plan(cut, plans[point.blocks])
        assert point.loss == pytest.approx(mean_loss(cut, batches), abs=1e-5)
        assert point.rise == pytest.approx(point.loss - dense)
        assert point.interval[0] < point.rise < point.interval[1]
        assert point.removed_of_blocks == plans[point.blocks].removed_of_blocks >= point.blocks


@torch.no_grad()
def mean_loss(model: Any, batches: list[dict[str, Any]]) -> float:
    return sum(float(model.eval()(**batch).loss) for batch in batches) / len(batches)


# -- the command -------------------------------------------------------------------------------------------------------


def test_curve_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Workbench(tmp_path)
    fisher = {"light.estimate.criterion": "fisher"}
    config = bench.yaml("run", **fisher)
    assert lightpeft("plan", "--config", config, "--curve") == 2
    assert "estimate" in capsys.readouterr().err
    assert lightpeft("estimate", "--config", config) == 0
    assert lightpeft("plan", "--config", config, "--curve", "--rows", "40") == 0
    shown = capsys.readouterr().out
    assert "40 training rows" in shown and "lightpeft report shows them" in " ".join(shown.split())
    found = read(tmp_path / "run" / "curve.json")
    assert found["rows"] == 40
    assert not (tmp_path / "run" / "plan.json").exists(), "nothing is decided"
    settings = (tmp_path / "run" / "config.yaml").read_bytes()
    assert (
        lightpeft("plan", "--run", tmp_path / "run", "--curve", "--rows", "24", "--light.remove.head_unit", "balanced")
        == 0
    )
    assert (tmp_path / "run" / "config.yaml").read_bytes() == settings, "nor is the run another one"
    pipeline.run(bench.config("run", **fisher))  # it goes on
    assert lightpeft("plan", "--run", tmp_path / "run", "--curve", "--rows", "3") == 2
    assert "--rows: 3 rows are too few" in capsys.readouterr().err
    assert lightpeft("plan", "--run", tmp_path / "run", "--rows", "30") == 2
    assert "--rows needs --curve" in capsys.readouterr().err
    assert lightpeft("plan", "--config", bench.yaml("masks"), "--curve") == 2


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"light.remove.depth": 0.5, "light.remove.blocks": 0.6}),
        ("llama", {"peft.slots": ["q", "v"]}),
        ("bert", {"peft": {"type": "bottleneck", "size": 8}}),
    ],
    ids=["depth", "few modules", "bottleneck"],
)
def test_curve_of_other_runs(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    bench = Workbench(tmp_path, family, "classification" if family == "bert" else "causal-lm")
    fisher = {"light.estimate.criterion": "fisher"}
    config = bench.yaml("run", **fisher, **changes)
    assert lightpeft("estimate", "--config", config) == 0
    assert lightpeft("plan", "--run", tmp_path / "run", "--curve", "--rows", "24") == 0
    points = read(tmp_path / "run" / "curve.json")["points"]
    assert points and all(point["removed_of_blocks"] >= point["blocks"] for point in points)
    if "light.remove.depth" in changes:
        assert min(point["blocks"] for point in points) >= 0.5, "as much has gone with the blocks"
