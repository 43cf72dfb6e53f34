"""Bad input: one line on stderr that says what is wrong, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped,unused-ignore]
import pytest
import torch
from workbench import (
    Rows,
    Workbench,
    labeled,
    lightpeft,
    read,
    stamps,
    write_rows,
)

from lightpeft.app.runs import pipeline
from lightpeft.plans.prune_plan import PrunePlan

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def adapter(bench: Workbench) -> Path:
    """A good light adapter."""
    pipeline.run(bench.config("good"))
    return bench.folder / "good" / "adapter"


@pytest.fixture
def refused(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused, and return its one line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        earlier = stamps(bench.folder)
        assert lightpeft(*arguments) == 2
        written = capsys.readouterr()
        assert written.out == ""
        assert written.err.count("\n") == 1
        assert written.err.startswith("lightpeft: ")
        assert stamps(bench.folder) == earlier
        return written.err

    return run


def test_unknown_keys_name_the_nearest(bench: Workbench, refused: Refused) -> None:
    for key, nearest in [
        ("light.remove.haeds", "light.remove.heads"),
        ("lihgt.remove.heads", "light.remove.heads"),
        ("ouptut", "output"),
    ]:
        assert f"did you mean --{nearest}?" in refused("run", "--config", bench.yaml("plain"), f"--{key}", "0.5")
        assert f"did you mean --{nearest}?" in refused("run", "--config", bench.yaml("plain"), f"--{key}=0.5")
        suggestion = nearest.partition(".")[0] if key.startswith("lihgt") else nearest
        assert f"did you mean {suggestion}?" in refused("run", "--config", bench.yaml("typo", **{key: 0.5}))


VALUES = {
    "light.remove.heads": ("1.5", "[0, 1)"),
    "method": ("lite", "light, plain"),
    "training.epochs": ("1e999", "training.epochs"),
    "peft.r": ("10000000", "peft.r is"),
    "peft": ('{"type": "bottleneck", "size": 0}', "peft.size is"),
    "data.columns": ('{"txt": "text"}', "rows of kind classification have text, label"),
    "trainer.max_grad_norm": ("soft", "trainer.max_grad_norm is"),
    "trainer.optim": ("adamm", "trainer.optim: adamm is not a valid OptimizerNames"),
    "seed": ("18446744073709551616", "seed is"),
}
"""Setting -> a bad value, and what its line says; tests/test_config.py has the others."""


@pytest.mark.parametrize("key", VALUES)
def test_bad_values(bench: Workbench, refused: Refused, key: str) -> None:
    value, says = VALUES[key]
    line = refused("run", "--config", bench.yaml("plain"), f"--{key}", value)
    assert says in line
    file = bench.yaml("value", **{key: _plain(value)})
    assert line == refused("run", "--config", file) == refused("check", "--config", file)


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def test_bad_commands(bench: Workbench, refused: Refused) -> None:
    assert "did you mean run?" in refused("rnu")
    assert "model.name is empty" in refused("run")
    assert "unrecognized arguments: extra" in refused("run", "--config", bench.yaml("plain"), "extra")
    assert "model" in refused("predict")
    whole = "it must be a whole number"
    assert f"--rounds is 'few'; {whole}" in refused("bench", "--config", bench.yaml("plain"), "--rounds", "few")
    assert f"--batch_size is 'all'; {whole}" in refused("predict", bench.base, bench.test, "--batch_size", "all")


LONG = "n" * 300
"""More than file systems take for a name."""
COMMANDS: dict[str, str] = {
    "run --config {settings} --output {folder}/{long}": "File name too long",
    "run --config {settings} --output {settings}/below": "Not a directory",
    "run --config {settings} --data.train {long}.csv": "File name too long",
    "run --config {settings} --data.train ~nosuchuser/rows.csv": "file ~nosuchuser/rows.csv does not exist",
    "trim {adapter} {folder}/small --data ~nosuchuser/rows.csv": "file ~nosuchuser/rows.csv does not exist",
    "run --config {settings} --model.name {long}": "cannot be loaded",
    "run --config {folder}": "is not a regular file",
    "run --config {settings} --output {circle}": "File exists",
    "run --config {settings} --estimation {circle}": "is not a run folder",
    "export {adapter} {circle}": "nothing was changed",
    "predict {adapter} {test} --output {circle}/below.csv": "File exists; nothing was changed",
    "predict {adapter} /dev/zero": "is not a regular file",
    "predict {adapter} {test} --output {long}.csv": "File name too long",
    "predict {adapter} {test} --output {table}": "is a folder; give a file",
    "predict {adapter} {test} --answer_tokens 1180591620717411303424": "answer_tokens is",
    "evaluate {adapter} --data.test {test} --json {table}": "is a folder; give a file",
    "reproduce {folder}": "is not a regular file",
    "bench --config {settings} --rounds 1180591620717411303424": "1180591620717411303424; give a finite number",
    "bench --config {settings} --json {table}": "is a folder; give a file",
}
"""Command -> what its one line says."""


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_places_and_numbers(
    bench: Workbench, adapter: Path, refused: Refused, tmp_path: Path, command: str
) -> None:
    table = bench.folder / "table.csv"
    table.mkdir(exist_ok=True)
    for one, other in (("circle", "round"), ("round", "circle")):
        (tmp_path / one).symlink_to(other)
    places = {"folder": bench.folder, "settings": bench.yaml("plain"), "test": bench.test, "table": table}
    places["circle"] = tmp_path / "circle"
    words = [word.format(adapter=adapter, long=LONG, **places) for word in command.split()]
    line = refused(*words)
    assert COMMANDS[command] in line
    assert len(line) < 1200


# -- models ------------------------------------------------------------------------------------------------------


def run_with(bench: Workbench, refused: Refused, **changes: Any) -> str:
    return refused("run", "--config", bench.yaml("plain", **changes))


def test_missing_model(bench: Workbench, refused: Refused) -> None:
    assert "does not exist" in run_with(bench, refused, **{"model.name": str(bench.folder / "nowhere")})
    assert "model.name is empty" in run_with(bench, refused, **{"model.name": ""})
    assert "cannot be loaded" in run_with(bench, refused, **{"model.name": "no-such-model"})


def base_with(bench: Workbench, **config: Any) -> Path:
    """A copy of the base with other settings in its config.json."""
    folder = bench.folder / "other_base"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bench.base, folder)
    settings = {**read(folder / "config.json"), **config}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_unsupported_family(bench: Workbench, refused: Refused) -> None:
    line = run_with(bench, refused, **{"model.name": str(base_with(bench, model_type="albert"))})
    assert 'model family "albert" cannot be pruned: its layers share one set of weights' in line


# -- data --------------------------------------------------------------------------------------------------------


def rows_with(bench: Workbench, refused: Refused, rows: Rows, **changes: Any) -> str:
    file = write_rows(bench.folder / "odd.csv", rows)
    return run_with(bench, refused, **{"data.train": str(file), **changes})


DIGITS = "1" * 30
DEEP = 100_000
ODD_ROWS: dict[str, tuple[str, str]] = {
    "30 digits": (f'{{"text": {DIGITS}, "label": "positive"}}', 'column "text" mixes types'),
    "half a character": ('{"text": "\\ud800", "label": "positive"}', 'column "text" mixes types'),
    "brackets": (f'{{"text": {"[" * DEEP}{"]" * DEEP}}}', "line 3 cannot be read"),
}
"""Name -> the line behind two good rows, and a part of the error."""


@pytest.mark.parametrize("name", ODD_ROWS)
def test_rows_that_no_table_holds(bench: Workbench, refused: Refused, tmp_path: Path, name: str) -> None:
    odd, says = ODD_ROWS[name]
    good = [f'{{"text": "word{i}", "label": "{label}"}}' for i, label in enumerate(("positive", "negative"))]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*good, odd]), encoding="utf-8")
    line = run_with(bench, refused, **{"data.train": str(file)})
    assert says in line and str(file) in line and len(line) < 1000


@pytest.mark.parametrize("label", ["1e19", "-1e40", "inf", "1" * 400])
def test_numbers_that_no_loss_can_square(bench: Workbench, refused: Refused, label: str) -> None:
    rows = [{**row, "label": label if i == 4 else "1"} for i, row in enumerate(labeled(20))]
    line = rows_with(bench, refused, rows, **{"data.task": "regression", "data.test": None})
    assert 'row 5 (the header not counted), column "label"' in line and "regression needs one" in line


def parquet(file: Path, metadata: Any = None, **columns: pyarrow.Array) -> Path:
    rows = labeled(20)
    usual = {name: pyarrow.array([row[name] for row in rows]) for name in ("text", "label")}
    table = pyarrow.table(usual | columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    pyarrow.parquet.write_table(table, file)
    return file


UNKNOWN = {"info": {"features": {"text": {"_type": "Nonsense"}, "label": {"_type": "Value", "dtype": "string"}}}}
PARQUETS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown feature": ({"metadata": json.dumps(UNKNOWN)}, "Feature type 'Nonsense' not found"),
    "deep JSON": ({"metadata": "[" * DEEP}, "is not a readable Parquet file"),
}


@pytest.mark.parametrize("name", PARQUETS)
def test_parquet_that_says_what_nobody_knows(bench: Workbench, refused: Refused, tmp_path: Path, name: str) -> None:
    content, says = PARQUETS[name]
    file = parquet(tmp_path / "rows.parquet", **content)
    line = run_with(bench, refused, **{"data.train": str(file)})
    assert says in line and str(file) in line and len(line) < 1000


TOKENIZERS: dict[str, list[Any]] = {
    "model_max_length": ["512", -1, True],
    "model_input_names": ["x", [1]],
}


@pytest.mark.parametrize("key", TOKENIZERS)
def test_settings_of_a_tokenizer_that_are_none(bench: Workbench, refused: Refused, key: str) -> None:
    base = base_with(bench)
    file = base / "tokenizer_config.json"
    usual = read(file)
    for value in TOKENIZERS[key]:
        file.write_text(json.dumps({**usual, key: value}), encoding="utf-8")
        assert f"the tokenizer of model {base} has {key}" in run_with(bench, refused, **{"model.name": str(base)})


# -- run folders -------------------------------------------------------------------------------------------------


def test_output_that_is_not_a_run(bench: Workbench, refused: Refused) -> None:
    assert "is a file" in run_with(bench, refused, output=str(bench.train))
    assert "contains files but no run" in run_with(bench, refused, output=str(bench.base))
    other = bench.folder / "other_tool"
    other.mkdir()
    (other / "config.yaml").write_text("optimizer: adam\n", encoding="utf-8")
    assert "is not a run" in run_with(bench, refused, output=str(other))


def test_amounts_that_cannot_go(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused before estimation; after one it stays, and `plan` with a smaller amount goes on from it."""
    assert lightpeft("run", "--config", bench.yaml("emptied", **{"light.remove.blocks": 0.999})) == 2
    assert "blocks 0.999 cannot be reached" in capsys.readouterr().err
    folder = bench.folder / "emptied"
    assert not folder.exists()
    assert lightpeft("estimate", "--config", bench.yaml("emptied", **{"light.remove.blocks": 0.4})) == 0
    assert lightpeft("plan", "--run", folder, "--light", "0.998") == 2
    assert "blocks 0.998 cannot be reached" in capsys.readouterr().err
    assert read_budget(folder) is None
    assert lightpeft("plan", "--run", folder, "--light.remove.heads", "0.25", "--light.remove.neurons", "0.25") == 0
    assert read_budget(folder) == 0.25
    assert lightpeft("run", "--run", folder) == 0


def read_budget(folder: Path) -> float | None:
    """The heads ratio of a run's plan, if it has one."""
    path = folder / "plan.json"
    return PrunePlan.load(path).budget["remove"]["heads"] if path.exists() else None


# -- while running -----------------------------------------------------------------------------------------------


def test_divergence_in_estimation(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    file = bench.yaml("diverged", **{"training.learning_rate": 1e30, "trainer.logging_steps": 1})
    assert lightpeft("run", "--config", file) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "NaN or infinite" in error
    assert "lower the learning rate" in error
    assert not (bench.folder / "diverged" / "estimation").exists()


def test_out_of_memory(bench: Workbench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.Trainer.training_step", full)
    assert lightpeft("run", "--config", bench.yaml("large")) == 2
    assert "lower training.batch_size" in capsys.readouterr().err


# -- light adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def copied(bench: Workbench, adapter: Path) -> Path:
    """A copy of a good light adapter, to be damaged."""
    folder = bench.folder / "copied"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(adapter, folder))


# -- predictions -------------------------------------------------------------------------------------------------


def test_bad_predictions(bench: Workbench, adapter: Path, refused: Refused) -> None:
    assert '"out.xlsx" has an unknown suffix' in refused("predict", adapter, bench.test, "--output", "out.xlsx")
    assert "does not exist" in refused("predict", bench.folder / "none", bench.test)
    assert "that does not name its task" in refused("predict", bench.base, bench.test)
    assert "does not exist" in refused("predict", adapter, bench.folder / "none.csv")
    assert "does not exist" in refused("predict", adapter, bench.folder / "none.txt")
    assert 'data.columns.text is "words"' in refused("predict", adapter, bench.test, "--text", "words")
    assert "it must be at least 1" in refused("predict", adapter, bench.test, "--batch_size", "0")
    assert "the example is not UTF-8 text" in refused("predict", adapter, "--example", "\udcff")
    blank = bench.folder / "blank.txt"
    blank.write_text("\n \n", encoding="utf-8")
    assert "only blank lines" in refused("predict", adapter, blank)
    blank.write_text("word1\n\nword2\n", encoding="utf-8")
    assert "the text is blank; fill it in or drop the row" in refused("predict", adapter, blank)
    assert "the example" in refused("predict", adapter, "--example", '{"words": "word1"}')
    odd = bench.folder / "binary.txt"
    odd.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refused("predict", adapter, odd)


def test_inspection_of_something_else(bench: Workbench, adapter: Path, copied: Path, refused: Refused) -> None:
    assert "does not exist" in refused("inspect", bench.folder / "none")
    assert "is a model, which has no plan to show; give a light adapter" in refused("inspect", bench.base)
    assert "give a folder with a run, a light adapter" in refused("inspect", bench.folder)
    assert "cannot be read" in refused("inspect", bench.train)
    assert "does not have the expected content" in refused("inspect", adapter.parent / "metrics.json")


def test_deepspeed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(tmp_path, "llama", "causal-lm")
    config = bench.yaml("deepspeed", **{})
    capsys.readouterr()
    for asked in (["--trainer.deepspeed", "zero2.json"], []):
        assert lightpeft("run", "--config", config, *asked) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("lightpeft: deepspeed: its engine does not work with a model that is cut")
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert not (bench.folder / "deepspeed").exists()
