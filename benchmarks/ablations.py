"""What each choice of a config buys: variants of one run, over seeds, each beside the run as it is.

    python benchmarks/ablations.py configs/movie_reviews/minilm_default.yaml --seeds 0 1 2

Variants whose estimation is the same share it: estimation does not depend on what is removed. Finished runs are kept
in the output folder and not repeated. Writes ablations.results.json and ablations.md, with paired differences to the
run as it is and the p value of a paired t-test over seeds. Paths inside the config are relative to the current folder.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from readme_tables import fill, markdown_table
from rich.console import Console
from scipy.stats import ttest_rel

from lightpeft import pipeline
from lightpeft.cli import quiet
from lightpeft.config import Budget, RunConfig, load_config, load_yaml, merged, run_config_from_dict
from lightpeft.errors import LightPeftError
from lightpeft.profiling import hardware
from lightpeft.records import write_json
from lightpeft.runs import RunFolder
from lightpeft.training import append_line

QUALITY = Path(__file__).parents[1] / "docs" / "quality.md"
AS_IS = "as it is"
VARIANTS: dict[str, dict[str, Any]] = {
    AS_IS: {},
    # which units go
    "Taylor instead of Fisher": {"head_criterion": "taylor", "neuron_criterion": "taylor"},
    "magnitude instead of Fisher": {"head_criterion": "magnitude", "neuron_criterion": "magnitude"},
    "random instead of Fisher": {"head_criterion": "random", "neuron_criterion": "random"},
    "half of the heads of each layer, half of all neurons": {"heads": 0.5, "neurons": 0.5},
    "half of each layer": {"heads": 0.5, "neurons": 0.5, "neurons_scope": "layerwise"},
    "half of each layer, Taylor": {
        "heads": 0.5,
        "neurons": 0.5,
        "neurons_scope": "layerwise",
        "head_criterion": "taylor",
        "neuron_criterion": "taylor",
    },
    "no sub-layer has to stay": {"min_heads": 0, "min_neurons": 0},
    # which modules and ranks stay
    "modules by ratio, 3/4 and half of the ranks go": {"module_criterion": "ratio", "modules": 0.75, "ranks": 0.5},
    "modules by Taylor": {"module_criterion": "taylor"},
    "modules in the upper third, half of the ranks": {"modules": 2 / 3, "ranks": 0.5},
    "all ranks": {"ranks": 0.0},
    "all modules and ranks": {"modules": 0.0, "ranks": 0.0},
    # recovery
    "refit: bias": {"refit": "bias"},
    "refit: low rank": {"refit": "low_rank"},
    "modules start again": {"restart": True},
    # estimation
    "estimation half as long": {"length": 0.05},
    "estimation twice as long": {"length": 0.2},
    "masks that really move": {"mask_learning_rate": 2e-2},
}
"""Settings of `light` by the variant's name."""


def main(arguments: list[str] | None = None) -> int:
    """Run, compare and write; 0 if all went well, 2 on bad input."""
    given = _parser().parse_args(arguments)
    quiet()
    out = given.out or Path("runs") / "ablations" / given.config.stem
    try:
        reports = {name: [run(given.config, out, name, seed) for seed in given.seeds] for name in given.variants}
        results = summary(reports, given.seeds)
        write_json(out / "ablations.results.json", results)
        (out / "ablations.md").write_text(markdown(results) + "\n", encoding="utf-8")
        if given.write_docs:
            publish(results, given.config, out)
    except LightPeftError as error:
        Console(stderr=True, soft_wrap=True).print(f"ablations: {error}", markup=False)
        return 2
    Console(width=160).print(markdown(results), markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--out", type=Path, help="folder of runs and results (default: runs/ablations/<config's name>)")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/quality.md")
    return parser


def run(file: Path, out: Path, variant: str, seed: int) -> dict[str, Any]:
    """The report of one variant and seed; its estimation is taken from a run that has the same one."""
    config = variant_config(file, out, variant, seed)
    _take_estimation(config, out)
    return pipeline.run(config)


def variant_config(file: Path, out: Path, variant: str, seed: int) -> RunConfig:
    """The config of one variant, in a folder of its own."""
    folder = out / f"{list(VARIANTS).index(variant):02}-{seed}"
    settings = {"light": VARIANTS[variant], "seed": seed, "method": "light", "output": str(folder)}
    return run_config_from_dict(merged(load_yaml(file), settings))


def _take_estimation(config: RunConfig, out: Path) -> None:
    """Copy the estimation of another run of `out` that differs in nothing that estimation reads."""
    new = RunFolder.open(config)
    if new.has("estimate"):
        return
    for folder in sorted(out.glob(f"*-{config.seed}")):
        if not (folder / "config.yaml").is_file():
            continue
        old = RunFolder(folder, load_config(folder / "config.yaml"))
        if old.has("estimate") and estimation_settings(old.config) == estimation_settings(config):
            new.begin()
            shutil.copytree(old.estimation, new.estimation)
            append_line(new.log, {"stage": "estimate", "seconds": old.stage_seconds()["estimate"], "done": True})
            return


def estimation_settings(config: RunConfig) -> dict[str, Any]:
    """All settings that the scores depend on."""
    settings = asdict(config)
    budget = {*Budget.__dataclass_fields__, "refit", "refit_rank", "refit_rows", "restart"}
    light = {name: value for name, value in settings["light"].items() if name not in budget}
    return {**settings, "light": light, "output": None, "preset": None}


def summary(reports: Mapping[str, Sequence[dict[str, Any]]], seeds: Sequence[int]) -> dict[str, Any]:
    """Quality, size and times of each variant over seeds, and paired differences to the run as it is."""
    own = [report["metrics"]["accuracy"] for report in reports.get(AS_IS, ())]
    return {
        "seeds": list(seeds),
        "variants": {name: _of_variant(of_variant, own) for name, of_variant in reports.items()},
        "hardware": hardware(),
        "config": next(iter(reports.values()))[0]["config"],
    }


def _of_variant(reports: Sequence[dict[str, Any]], own: Sequence[float]) -> dict[str, Any]:
    quality = [report["metrics"]["accuracy"] for report in reports]
    differences = [a - b for a, b in zip(quality, own, strict=True)] if own else []
    varies = len(differences) > 1 and len(set(differences)) > 1
    return {
        "accuracy": quality,
        "loss": [report["metrics"]["loss"] for report in reports],
        "difference": differences,
        "p": float(ttest_rel(quality, own).pvalue) if varies else None,
        "removed_of_all": [report["parameters"]["base_removed_ratio"] for report in reports],
        "peft": [report["parameters"]["peft"] for report in reports],
        "adapter_bytes": [report["adapter_bytes"] for report in reports],
        "train_seconds": [report["seconds"]["train"] for report in reports],
        "light": reports[0]["config"]["light"],
    }


def markdown(results: dict[str, Any]) -> str:
    """The table, one row a variant."""
    header = ["variant", "accuracy, %", "difference", "p", "loss", "base removed, %", "PEFT", "KiB", "training, s"]
    return markdown_table(header, (_row(name, of_variant) for name, of_variant in results["variants"].items()))


def _row(name: str, of_variant: dict[str, Any]) -> list[str]:
    mean = statistics.mean
    own = name == AS_IS or not of_variant["difference"]
    return [
        name,
        spread(of_variant["accuracy"]),
        "-" if own else spread(of_variant["difference"], sign=True),
        "-" if of_variant["p"] is None else f"{of_variant['p']:.2f}",
        f"{mean(of_variant['loss']):.3f}",
        f"{100 * mean(of_variant['removed_of_all']):.1f}",
        f"{mean(of_variant['peft']):,.0f}",
        f"{mean(of_variant['adapter_bytes']) / 1024:.0f}",
        f"{mean(of_variant['train_seconds']):.0f}",
    ]


def spread(values: Sequence[float], sign: bool = False) -> str:
    """Mean and sample standard deviation, in percent."""
    shown = f"{100 * statistics.mean(values):{'+' if sign else ''}.1f}"
    return shown if len(values) == 1 else f"{shown} ± {100 * statistics.stdev(values):.1f}"


def publish(results: dict[str, Any], config: Path, out: Path) -> None:
    """Put the table into docs/quality.md, and the numbers and the logs beside the config."""
    fill(f"ablations {config.stem}", markdown(results), QUALITY)
    write_json(config.with_suffix(".ablations.json"), results)
    logs = config.with_suffix(".ablations.logs")
    logs.mkdir(exist_ok=True)
    for log in sorted(out.glob("*/log.jsonl")):
        shutil.copy(log, logs / f"{log.parent.name}.jsonl")


if __name__ == "__main__":
    sys.exit(main())
