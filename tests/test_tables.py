"""Plans and measurements as tables."""

from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console
from rich.table import Table
from tiny import make, plan_for, with_lora

from lightpeft.app.cli.tables import (
    curve_table,
    demo_table,
    metrics_table,
    milestones_table,
    paired_table,
    parameters_table,
    per_class_table,
    plan_table,
)
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.structure import SLOTS


def text(table: Table, width: int = 140) -> str:
    console = Console(width=width, record=True, file=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "gpt2", "t5"])
def test_plan_table_has_a_row_for_every_layer(name: str) -> None:
    plan = plan_for(with_lora(make(name)))
    table = plan_table(plan)
    columns = {str(column.header).replace("\n", "_"): list(column.cells) for column in table.columns}
    for index, (spec, kept) in enumerate(plan.parts):
        row = {header: cells[index] for header, cells in columns.items()}
        assert row["layer"] == (spec.label or str(spec.index)) and row["heads"] == f"{len(kept.heads)}/{spec.heads}"
        assert row["neurons"] == (f"{len(kept.neurons)}/{spec.neurons}" if spec.neurons else "-")
        dense = {site.slot: site.name for site in plan.dense_sites if site.block == spec.index}
        for slot in columns.keys() & SLOTS:
            stay = plan.sites.get(dense[slot]) if slot in dense else None
            assert row[slot] == ("" if slot not in dense else str(len(stay)) if stay else "-")
    shown_plan = " ".join(text(table).split())
    assert f"({plan.removed_ratio:.1%}; {plan.removed_of_blocks:.1%} of the blocks')" in shown_plan


def test_plans_of_large_decoders_fit_80_columns() -> None:
    plan = plan_for(with_lora(make("llama-gqa")))
    large = {"heads": 64, "kv_heads": 64, "neurons": 14_336}
    specs = [dataclasses.replace(plan.specs[0], index=index, label=str(index), **large) for index in range(99)]
    sites = [
        dataclasses.replace(s, block=b.index, name=f"{b.index} {s.name}") for b in specs for s in plan.dense_sites[:7]
    ]
    kept = BlockPlan(tuple(range(64)), tuple(range(64)), tuple(range(14_336)))
    wide = dataclasses.replace(
        plan,
        specs=tuple(specs),
        blocks=(kept,) * 99,
        dense_sites=tuple(dataclasses.replace(site, rank=16) for site in sites),
        sites={site.name: tuple(range(16)) for site in sites},
    )
    lines = text(plan_table(wide), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["0", "64/64", "64/64", "14336/14336", "0%", "7/7", *["16"] * 7]


def cells(table: Table) -> list[list[str]]:
    lines = text(table).replace("┃", "│").splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]


def test_metrics_with_intervals() -> None:
    metrics = {"accuracy": 0.8125, "tokens": 1234.0, "examples": 40.0}
    table = metrics_table(metrics, {"accuracy": (0.75, 0.875), "tokens": None}, "run[a]")
    assert text(table).startswith("run[a]")
    assert cells(table) == [
        ["metric", "value", "95% interval"],
        ["accuracy", "0.8125", "0.7500 to 0.8750"],
        ["tokens", "1,234", ""],
        ["test rows", "40", ""],
    ]


def test_parameters_have_names_that_need_no_explanation() -> None:
    light = {"base_dense": 2000, "base": 1500, "base_removed_ratio": 0.25, "peft": 30, "head": 4, "trained": 34}
    assert cells(parameters_table(light)) == [
        ["base model, before the cut", "2,000"],
        ["base model, after the cut", "1,500 (25.0% removed)"],
        ["PEFT modules", "30"],
        ["head, saved with them", "4"],
        ["trained parameters", "34"],
    ]
    whole = {"base_dense": 2000, "base": 2000, "base_removed_ratio": 0.0, "peft": 0, "head": 0}
    assert cells(parameters_table(whole)) == [["base model", "2,000"]]


def test_two_models_side_by_side() -> None:
    entry = {"first": 0.5, "second": 0.625, "difference": 0.125, "interval": (0.03125, 0.25), "p_value": 0.0125}
    undefined = {"first": 0.5, "second": 0.25, "difference": -0.25, "interval": None, "p_value": None}
    comparison = {"accuracy": {**entry, "test": "McNemar"}, "f1": {**undefined, "test": "paired bootstrap"}}
    table = paired_table(comparison, "runs/[a]", "runs/b")
    assert "A: runs/[a]" in text(table) and "B: runs/b" in text(table)
    assert {column.header: list(column.cells) for column in table.columns} == {
        "metric": ["accuracy", "f1"],
        "A": ["0.5000", "0.5000"],
        "B": ["0.6250", "0.2500"],
        "B - A": ["+0.1250", "-0.2500"],
        "95% interval": ["0.0312 to 0.2500", ""],
        "p value": ["0.0125", ""],
        "test": ["McNemar", "paired bootstrap"],
    }
    assert max(map(len, text(table).splitlines())) <= 80


def test_every_column_has_a_heading() -> None:
    point = {"blocks": 0.1, "removed_of_base": 0.05, "loss": 0.7, "rise": 0.1, "interval": (0.0, 0.2)}
    tables = [
        curve_table({"rows": 40, "loss": 0.6, "points": [point]}),
        milestones_table({"examples": 40, "metrics": {"final": {"accuracy": 0.5, "loss": 0.6}}}),
        metrics_table({"accuracy": 0.5}, {}, "run", {"accuracy": 0.4}),
        plan_table(plan_for(with_lora(make("bert")))),
    ]
    for table in tables:
        assert all(str(column.header).strip() for column in table.columns)
        assert max(map(len, text(table, width=80).splitlines())) <= 80


def test_slow_demo_fits_80_columns() -> None:
    run = {
        "config": {"peft": {"peft_type": "LORA"}},
        "main_metric": "accuracy",
        "metrics": {"accuracy": 0.8123},
        "intervals": {"accuracy": (0.7956, 0.8290)},
        "parameters": {"base": 22_713_216, "base_removed_ratio": 0.2815, "peft": 73_728, "head": 770},
        "adapter_bytes": 301_000,
        "training": {"train": {"seconds": 3_725.0}},
    }
    shown = text(demo_table(run, {**run, "training": {"train": {"seconds": 1_862.5}}}), width=80)
    assert "1 h 2 min" in shown and "31 min 2 s" in shown and "(2.00x as fast)" in shown
    assert "0.7956 to 0.8290" in shown and "…" not in shown


def test_classes() -> None:
    classes = {"[no]": {"precision": 0.5, "recall": 1.0, "f1-score": 2 / 3, "support": 1200.0}}
    expected = ["[no]", "0.5000", "1.0000", "0.6667", "1,200"]
    assert cells(per_class_table(classes)) == [["class", "precision", "recall", "F1", "test rows"], expected]
