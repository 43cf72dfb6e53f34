"""Tables of the command line: plans, light adapters, metrics, budgets, benchmarks and the needs of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightpeft.app.exports.trimming import Trimmed
from lightpeft.app.runs.bench import rounds_in_words
from lightpeft.app.runs.checking import Check
from lightpeft.config import peft_type
from lightpeft.console.progress import exact_duration, in_bytes
from lightpeft.peft_kinds.kinds import kind_named
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import SLOTS


def plan_table(plan: PrunePlan) -> Table:
    """Make the table of a plan, a row for each layer: units kept of all, and the kept rank of each PEFT module."""
    ranks = [plan.module_ranks(spec) for spec in plan.specs]
    slots = [slot for slot in SLOTS if any(slot in of for of in ranks)]
    told = [["-" if of.get(slot) == 0 else str(of.get(slot, "")) for slot in slots] for of in ranks]
    note = "heads, kv heads, neurons, modules (PEFT): kept/total; removed: part of the layer's parameters"
    note += "; under each projection: kept rank of its PEFT module, - if that is removed" if slots else ""
    caption = f"{plan.summary()}\n{note}"
    table = Table(caption=caption, caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    rows = [{name: value for name, value in row.items() if name != "module:ranks"} for row in plan.rows()]
    for name in (*rows[0], *slots):
        title = name.replace("kv heads", "kv\nheads").replace(" of each", "\nof each").replace("_", "\n")
        table.add_column(title, justify="right", no_wrap=True)
    for row, of in zip(rows, told, strict=True):
        table.add_row(*row.values(), *of)
    return table


def facts_table(facts: Mapping[str, Any], title: str) -> Table:
    """Make a table of two columns without headings: names and values."""
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
    """Make a table of metrics: value, 95% interval, and the value of the majority baseline if there is one."""
    table = _numbers_table(title, "metric", "value", "95% interval", *(["majority baseline"] if constant else []))
    for name, value in metrics.items():
        beside = [shown(constant[name]) if name in constant else ""] if constant else []
        title = "test rows" if name == "examples" else name
        table.add_row(escape(title), shown(value), _format_interval(intervals.get(name)), *beside)
    return table


def parameters_table(sizes: Mapping[str, Any]) -> Table:
    """Make a table of the parameters of a run's model: the base before and after the cut, and what trained.

    Args:
        sizes: the entry `parameters` of metrics.json.
    """
    dense, base = sizes["base_dense"], sizes["base"]
    rows = {"base model": shown(base)}
    if base != dense:
        removed = f"{shown(base)} ({sizes['base_removed_ratio']:.1%} removed)"
        rows = {"base model, before the cut": shown(dense), "base model, after the cut": removed}
    others = {"peft": "PEFT modules", "head": "head, saved with them", "trained": "trained parameters"}
    rows |= {title: shown(sizes[name]) for name, title in others.items() if sizes.get(name)}
    return facts_table(rows, "parameters")


def milestones_table(milestones: Mapping[str, Any]) -> Table:
    """Make a table of the model's quality over a run: a row for each moment, columns for the main metric and the loss.

    Args:
        milestones: the entry of that name in metrics.json.
    """
    metrics: Mapping[str, Mapping[str, float]] = milestones["metrics"]
    columns = list(dict.fromkeys(name for values in metrics.values() for name in values))
    table = _numbers_table(f"quality over the run, on {milestones['examples']:,} test rows", "moment", *columns)
    for moment, values in metrics.items():
        numbers = [shown(values[name]) if name in values else "" for name in columns]
        table.add_row(escape(moment.replace("_", " ")), *numbers)
    return table


def paired_table(comparison: Mapping[str, Mapping[str, Any]], first: str, second: str) -> Table:
    """Make a table that compares two models on the same rows: the difference, its 95% interval, and the p value."""
    title = f"paired comparison on the same test rows\nA: {first}\nB: {second}"
    table = _numbers_table(title, "metric", "A", "B", "B - A", "95% interval", "p value", "test")
    table.box, table.pad_edge, table.padding = None, False, (0, 1, 0, 0)  # lines would not fit 80 characters
    for name, entry in comparison.items():
        values = [shown(entry[key]) for key in ("first", "second")]
        p_value = "" if entry["p_value"] is None else f"{entry['p_value']:.3g}"
        table.add_row(
            escape(name),
            *values,
            f"{entry['difference']:+.4f}",
            _format_interval(entry["interval"]),
            p_value,
            entry["test"],
        )
    return table


def per_class_table(classes: Mapping[str, Mapping[str, float]]) -> Table:
    """Make a table of precision, recall, F1 and the number of test rows of each class."""
    table = _numbers_table("metrics of each class", "class", "precision", "recall", "F1", "test rows")
    for name, entry in classes.items():
        values = [f"{entry[key]:.4f}" for key in ("precision", "recall", "f1-score")]
        table.add_row(escape(name), *values, f"{entry['support']:,.0f}")
    return table


def curve_table(found: Mapping[str, Any]) -> Table:
    """Make the table of `lightpeft plan --curve`: a row for each budget, with the loss right after that cut."""
    title = f"loss right after the cut, on {found['rows']:,} training rows; {found['loss']:.3f} with nothing cut"
    columns = ("removed\nof the base", "loss", "rise of\nthe loss", "95% interval\nof the rise, ±")
    table = _numbers_table(title, "budget (part\nof the blocks)", *columns)
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
    """Make an empty table: a left column of names, and right-aligned columns of numbers."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column(escape(first), no_wrap=True)
    for name in others:
        table.add_column(escape(name), justify="right", no_wrap=name != "test")
    return table


def _format_interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def bench_table(report: Mapping[str, Any]) -> Table:
    """Make the table of `lightpeft bench`: plain PEFT, the light model, their ratio, and the quartiles of the ratio."""
    kind = plain_name(report["config"])
    over = rounds_in_words(report["rounds"], report.get("of_rounds"))
    table = Table(title=f"{kind} and the light model (medians of {over})", title_justify="left")
    for name in ("measure", kind, "light", "light /\nplain", "quartiles\nof the ratio"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for row in speed_rows(report):
        spread = " - ".join(f"{end:.2f}" for end in row.get("quartiles", ()) if report["rounds"] > 1)
        table.add_row(row["name"], row["plain"], row["light"], f"{row['ratio']:.2f}", spread)
    if "estimation_throughput" in report["ratios"]:
        slowdown = report["ratios"]["estimation_throughput"]["median"]
        steps = report["end_to_end"]["estimation_steps"]
        table.caption = f"whole run: light has {steps} steps of estimation, {slowdown:.2f} times as fast as {kind}"
        table.caption_justify = "left"
    return table


def demo_table(plain: Mapping[str, Any], light: Mapping[str, Any]) -> Table:
    """Two finished runs on the same rows side by side: quality, size and time.

    Args:
        plain: metrics.json of a run with method plain.
        light: metrics.json of a run with method light.
    """
    both = (plain, light)
    table = _numbers_table("on the same rows", "", plain_name(plain["config"]), "lightpeft")
    name = plain["main_metric"]
    table.add_row(name, *(f"{report['metrics'][name]:.4f}" for report in both))
    table.add_row("95% interval", *(_format_interval(report["intervals"].get(name)) for report in both))
    sizes = [report["parameters"] for report in both]
    table.add_row("parameters of the base", *(shown(size["base"]) for size in sizes))
    table.add_row("removed", *(f"{size['base_removed_ratio']:.1%}" for size in sizes))
    table.add_row("trainable parameters", *(shown(size["peft"] + size["head"]) for size in sizes))
    table.add_row("saved adapter", *(in_bytes(report["adapter_bytes"]) for report in both))
    times = [sum(cost["seconds"] for cost in report["training"].values()) for report in both]
    faster = f"{exact_duration(times[1])}\n({times[0] / times[1]:.2f}x as fast)"
    table.add_row("training, estimation included", exact_duration(times[0]), faster)
    return table


def speed_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the measures of a `bench` result: name, plain, light, ratio (light over plain), and its quartiles."""
    subjects, ratios, whole = found["subjects"], found["ratios"], found["end_to_end"]
    both = [subjects[name] for name in ("plain", "light")]
    rows: list[dict[str, Any]] = []

    def add(name: str, values: Iterable[float], form: Callable[[float], str], ratio: float, **more: Any) -> None:
        plain, light = map(form, values)
        rows.append({"name": name, "plain": plain, "light": light, "ratio": ratio, **more})

    for what in ("training", "inference"):
        spread, medians = ratios[f"{what}_throughput"], [of[f"{what}_samples_per_second"]["median"] for of in both]
        add(f"{what} samples/s", medians, _format_tenths, spread["median"], quartiles=[spread["low"], spread["high"]])
    add("training memory", [of["peak_memory_bytes"] for of in both], in_bytes, ratios["peak_memory"])
    for name, key in (("weights at inference", "weights_bytes"), ("inference memory", "peak_memory_bytes")):
        served = [of["inference"][key] for of in both]
        add(name, served, in_bytes, served[1] / served[0])
    for what, key in (("training", "training"), ("inference", "forward")):
        flops = [of["flops"][key] / 1e9 for of in both]
        add(f"{what} GFLOPs per batch", flops, _format_tenths, flops[1] / flops[0])
    caches = [of.get("kv_cache_bytes_per_token") for of in both]
    if None not in caches:
        add("KV cache per token", caches, in_bytes, caches[1] / caches[0])
    seconds = [whole[f"{name}_seconds"] for name in ("plain", "light")]
    add("whole run, time", seconds, exact_duration, whole["light_over_plain"])
    return rows


def _format_tenths(value: float) -> str:
    return f"{value:,.1f}"


def needs_table(found: Check) -> Table:
    """Make the table of `lightpeft check`: a row for each stage with its memory in MiB, plain PEFT first."""
    title = f"expected memory in MiB; batches of {found.rows} rows of at most {found.tokens} tokens"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stage")
    for name in (
        "steps",
        "frozen\nweights",
        "trained +\noptimizer",
        "activations +\ngradients",
        "library\noverhead",
        "total",
        "GFLOPs\nper step",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for name, need in found.stages.items():
        held = need.holding
        parts = (held.weights, held.trained, held.activations, held.overhead, held.total)
        in_mib = (f"{part / 2**20:,.0f}" for part in parts)
        table.add_row("plain PEFT" if name == "plain" else name, str(need.steps), *in_mib, f"{held.flops / 1e9:,.0f}")
    return table


def trim_table(trimmed: Trimmed) -> Table:
    """Tokens, parameters and weights of a model before and after its vocabulary was cut."""
    table = _numbers_table("vocabulary", "", "before", "after", "removed")
    before, after = vars(trimmed.before), vars(trimmed.after)
    forms = {"tokens": shown, "parameters": shown, "weights_bytes": in_bytes}
    for name, form in forms.items():
        removed = 1 - after[name] / before[name]
        table.add_row(name.removesuffix("_bytes"), form(before[name]), form(after[name]), f"{removed:.1%}")
    return table


def plain_name(config: Mapping[str, Any]) -> str:
    """Return the display name of plain PEFT of a run's kind, such as "plain LoRA"."""
    return f"plain {kind_named(peft_type(config['peft'])).title}"


def shown(value: Any) -> str:
    """Format a value: floats with 4 decimals, whole numbers with thousands separators."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
