"""Plans, light adapters and measurements as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightpeft.app.runs.bench import rounds_in_words
from lightpeft.app.runs.checking import Check
from lightpeft.config import peft_type
from lightpeft.console.progress import exact_duration, in_bytes
from lightpeft.peft_kinds.kinds import kind_named
from lightpeft.plans.records import PrunePlan
from lightpeft.plans.structure import SLOTS


def plan_table(plan: PrunePlan) -> Table:
    """One row a layer: what stays of heads, neurons and PEFT modules; and the ranks of these, a column a place."""
    ranks = [plan.module_ranks(spec) for spec in plan.specs]
    slots = [slot for slot in SLOTS if any(slot in of for of in ranks)]
    told = [["-" if of.get(slot) == 0 else str(of.get(slot, "")) for slot in slots] for of in ranks]
    note = "\nbelow the names of projections: ranks of the PEFT modules there; -: the module goes" if slots else ""
    table = Table(
        caption=f"{plan.summary()}{note}", caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    rows = [{name: value for name, value in row.items() if name != "module:ranks"} for row in plan.rows()]
    for name in (*rows[0], *slots):
        title = name.replace("kv heads", "kv\nheads").replace(" of each", "\nof each").replace("_", "\n")
        table.add_column(title, justify="right", no_wrap=True)
    for row, of in zip(rows, told, strict=True):
        table.add_row(*row.values(), *of)
    return table


def facts_table(facts: Mapping[str, Any], title: str) -> Table:
    """Names and values, one a row."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(escape(name), escape(shown(value)))
    return table


def metrics_table(
    metrics: Mapping[str, float],
    intervals: Mapping[str, Sequence[float] | None],
    title: str,
    constant: Mapping[str, float] | None = None,
) -> Table:
    """One metric a row, with its 95% interval where there is one; beside the majority baseline, where given."""
    table = _numbers_table(title, "", "value", "95% interval", *(["majority baseline"] if constant else []))
    for name, value in metrics.items():
        beside = [shown(constant[name]) if name in constant else ""] if constant else []
        table.add_row(escape(name), shown(value), _range(intervals.get(name)), *beside)
    return table


def milestones_table(milestones: Mapping[str, Any]) -> Table:
    """The course of a run on a sample of test rows: one moment a row, with the main metric and the loss.

    Args:
        milestones: what metrics.json has under that name.
    """
    metrics: Mapping[str, Mapping[str, float]] = milestones["metrics"]
    columns = list(dict.fromkeys(name for values in metrics.values() for name in values))
    table = _numbers_table(f"the course of the run, on {milestones['examples']:,} test rows", "", *columns)
    for moment, values in metrics.items():
        numbers = [shown(values[name]) if name in values else "" for name in columns]
        table.add_row(escape(moment.replace("_", " ")), *numbers)
    return table


def paired_table(comparison: Mapping[str, Mapping[str, Any]], first: str, second: str) -> Table:
    """Two models on the same examples: one metric a row, the difference with its interval, and the test's p value."""
    title = f"on the same examples\nA: {first}\nB: {second}"
    table = _numbers_table(title, "", "A", "B", "B - A", "95% interval", "p", "test")
    table.box, table.pad_edge, table.padding = None, False, (0, 1, 0, 0)  # lines would not fit 80 characters
    for name, entry in comparison.items():
        values = [shown(entry[key]) for key in ("first", "second")]
        p_value = "" if entry["p_value"] is None else f"{entry['p_value']:.3g}"
        table.add_row(
            escape(name), *values, f"{entry['difference']:+.4f}", _range(entry["interval"]), p_value, entry["test"]
        )
    return table


def per_class_table(classes: Mapping[str, Mapping[str, float]]) -> Table:
    """Precision, recall and F1 of every class, and how many examples it has."""
    table = _numbers_table("by class", "", "precision", "recall", "F1", "examples")
    for name, entry in classes.items():
        values = [f"{entry[key]:.4f}" for key in ("precision", "recall", "f1-score")]
        table.add_row(escape(name), *values, f"{entry['support']:,.0f}")
    return table


def curve_table(found: Mapping[str, Any]) -> Table:
    """What budgets cost, one a row: what `lightpeft plan --curve` measures."""
    title = f"before training goes on, on {found['rows']:,} training rows: loss {found['loss']:.3f} with nothing cut"
    table = _numbers_table(title, "part of the blocks", "goes of all", "loss", "rise", "± (95%)")
    for point in found["points"]:
        table.add_row(
            f"{point['blocks']:g}",
            f"{point['removed_of_base']:.0%}",
            f"{point['loss']:.3f}",
            f"{point['rise']:+.3f}",
            f"{point['interval'][1] - point['rise']:.3f}",
        )
    return table


def _numbers_table(title: str, first: str, *others: str) -> Table:
    """An empty table: a column of names, and columns of numbers."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column(escape(first), no_wrap=True)
    for name in others:
        table.add_column(escape(name), justify="right", no_wrap=name != "test")
    return table


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def bench_table(report: Mapping[str, Any]) -> Table:
    """Plain PEFT, light, and their ratio, with the quartiles of the ratio."""
    kind = plain_name(report["config"])
    over = rounds_in_words(report["rounds"], report.get("of_rounds"))
    table = Table(title=f"{kind} beside light (medians over {over})", title_justify="left")
    for name in ("", kind, "light", "light / plain", "quartiles"):
        table.add_column(name, justify="left" if not name else "right")
    for row in speed_rows(report):
        spread = " - ".join(f"{end:.2f}" for end in row.get("quartiles", ()))
        table.add_row(row["name"], row["plain"], row["light"], f"{row['ratio']:.2f}", spread)
    if "estimation_throughput" in report["ratios"]:
        slowdown = report["ratios"]["estimation_throughput"]["median"]
        steps = report["end_to_end"]["estimation_steps"]
        table.caption = (
            f"estimation, part of the whole run, trains {slowdown:.2f} times as fast as {kind}, for {steps} steps"
        )
        table.caption_justify = "left"
    return table


def speed_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of what `bench` gives, measure by measure: its name, plain, light, and the ratio of light with its quartiles."""
    subjects, ratios, whole = found["subjects"], found["ratios"], found["end_to_end"]
    both = [subjects[name] for name in ("plain", "light")]
    rows: list[dict[str, Any]] = []

    def add(name: str, values: Iterable[float], form: Callable[[float], str], ratio: float, **more: Any) -> None:
        plain, light = map(form, values)
        rows.append({"name": name, "plain": plain, "light": light, "ratio": ratio, **more})

    for what in ("training", "inference"):
        spread, medians = ratios[f"{what}_throughput"], [of[f"{what}_samples_per_second"]["median"] for of in both]
        add(f"{what} samples/s", medians, _fine, spread["median"], quartiles=[spread["low"], spread["high"]])
    add("training memory", [of["peak_memory_bytes"] for of in both], in_bytes, ratios["peak_memory"])
    for name, key in (("weights served", "weights_bytes"), ("inference memory", "peak_memory_bytes")):
        served = [of["inference"][key] for of in both]
        add(name, served, in_bytes, served[1] / served[0])
    for what, key in (("training", "training"), ("inference", "forward")):
        flops = [of["flops"][key] / 1e9 for of in both]
        add(f"{what} GFLOP", flops, _fine, flops[1] / flops[0])
    caches = [of.get("kv_cache_bytes_per_token") for of in both]
    if None not in caches:
        add("KV cache a token", caches, in_bytes, caches[1] / caches[0])
    seconds = [whole[f"{name}_seconds"] for name in ("plain", "light")]
    add("whole run", seconds, exact_duration, whole["light_over_plain"])
    return rows


def _fine(value: float) -> str:
    return f"{value:,.1f}"


def needs_table(found: Check) -> Table:
    """What each stage of a run needs, one a row, with plain PEFT first; memory in MiB."""
    title = f"what a run needs, MiB; batches of {found.rows} rows of at most {found.tokens} tokens"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stage")
    for name in ("steps", "weights", "trained", "activa-\ntions", "kernels,\ngaps", "in all", "GFLOPs\na step"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, need in found.stages.items():
        held = need.holding
        parts = (held.weights, held.trained, held.activations, held.overhead, held.total)
        in_mib = (f"{part / 2**20:,.0f}" for part in parts)
        table.add_row(name, str(need.steps), *in_mib, f"{held.flops / 1e9:,.0f}")
    return table


def plain_name(config: Mapping[str, Any]) -> str:
    """What people call the usual way of a run's PEFT kind."""
    return f"plain {kind_named(peft_type(config['peft'])).title}"


def shown(value: Any) -> str:
    """A value as people read it: floats short, large counts with separators."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
