"""The two runs of the demo: plain LoRA and lightpeft, on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightpeft.app.runs import pipeline
from lightpeft.app.runs.demo.fetching import fetched
from lightpeft.config.run import RunConfig, run_config_from_dict
from lightpeft.errors import require

METHODS = ("plain", "light")
SETTINGS: dict[str, Any] = {
    "light": 0.4,
    "data": {"task": "classification", "limit_train": 1600, "limit_test": 1000, "max_length": 64},
    "peft": {"type": "lora", "lora_dropout": 0.0},
    "training": {"epochs": 2, "batch_size": 32, "learning_rate": 1e-3, "precision": "auto"},
}
"""Few rows, so that both runs take less than a minute on two cores."""


def demo(cache: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Run plain LoRA and lightpeft, each unless it is done already.

    Args:
        cache: folder for the model and the rows, which are downloaded if they are missing.
        output: folder of the two runs, `plain` and `light`.

    Returns:
        Content of metrics.json, by method.

    Raises:
        LightPeftError: the download failed, or the folder holds other runs.
    """
    require(not output.is_file(), f"{output} is a file; give a folder for the two runs: --output")
    place = fetched(cache)
    return {method: pipeline.run(_config(method, place, output / method)) for method in METHODS}


def _config(method: str, cache: Path, output: Path) -> RunConfig:
    rows = {split: str(cache / "movie_reviews" / f"{split}.csv") for split in ("train", "test")}
    own = {"method": method, "output": str(output), "model": {"name": str(cache / "minilm")}}
    return run_config_from_dict({**SETTINGS, **own, "data": {**SETTINGS["data"], **rows}})
