"""The command line: help, settings from preset, file and options, and what `inspect` shows."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from workbench import Workbench, lightpeft

from lightpeft import __version__
from lightpeft.app.cli.settings import COMMON_SETTINGS
from lightpeft.app.cli.verbs import VERBS
from lightpeft.app.cli.waiting import SPINS, WAITING
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.config import Estimate, Remove, RunConfig, TrainingConfig, load_config

NAMES = [
    "run",
    "check",
    "estimate",
    "plan",
    "prune",
    "train",
    "evaluate",
    "bench",
    "predict",
    "export",
    "trim",
    "inspect",
    "report",
    "reproduce",
    "demo",
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    bench = Workbench(tmp_path_factory.mktemp("cli"))
    pipeline.run(bench.config("run"))
    return bench


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert lightpeft(*arguments) == 0
    written = capsys.readouterr()
    assert written.err == ""
    return written.out


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    return yaml.safe_load(shown(capsys, *arguments, "--print_config"))


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    assert list(VERBS) == NAMES
    assert all(f"    {verb} " in text for verb in NAMES)
    assert "--config" in text


@pytest.mark.parametrize("verb", NAMES)
def test_help_of_a_verb_documents_options(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    every = "--help-all" if VERBS[verb].on_runs else "--help"
    text = " ".join(shown(capsys, verb, every).split())
    assert VERBS[verb].help.split(".")[0] in text
    assert all(option.help.split()[0] in text for option in VERBS[verb].options)
    if not VERBS[verb].on_runs:
        return
    for config, section in ((Remove, "light.remove"), (Estimate, "light.estimate"), (TrainingConfig, "training")):
        assert all(f"--{section}.{field.name}" in text for field in dataclasses.fields(config))
    assert "fraction of the attention head units to remove, in [0, 1)." in text
    assert "rows of one process in one forward pass. (type: int, default: 32)" in text
    assert "optimizer steps (whole number)" in text
    assert "--print_config" in text


def test_help_of_a_run_has_the_options_that_people_need(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "run", "--help")
    options = re.findall(r"^  (--[\w.-]+)", text, re.MULTILINE)
    assert options == [*COMMON_SETTINGS, "--config", "--run", "--help-all"]
    assert len(text.splitlines()) < 60
    of_bench = shown(capsys, "bench", "--help")
    assert {"--rounds", *COMMON_SETTINGS} <= set(re.findall(r"^  (--[\w.-]+)", of_bench, re.MULTILINE))


def test_command_alone_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == shown(capsys, "--help")


def test_help_shows_what_unset_settings_stand_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown(capsys, "run", "--help-all").split())
    light = RunConfig().light
    for section in ("remove", "estimate", "modules", "rates", "after"):
        for name, value in dataclasses.asdict(getattr(light, section)).items():
            described = text[text.index(f"--light.{section}.{name} ") :]
            shown_value = "null" if value is None else value
            assert described[described.index("default: ") :].startswith(f"default: {shown_value})")
    assert "--light LIGHT Part of the blocks' parameters to remove, such as 0.4; auto; the name of a preset; or" in text


MISNAMED = {
    ("run", "--learning-rate", "3e-4"): "unknown option --learning-rate; did you mean --training.learning_rate?",
    ("run", "--epochs=3"): "did you mean --training.epochs?",
    ("run", "--batch_size", "8"): "did you mean --training.batch_size?",
    ("run", "--text", "review"): "did you mean --data.columns.text?",
    ("run", "--data.label", "stars"): "did you mean --data.columns.label?",
    ("run", "--model", "bert"): "--model takes YAML or a YAML file, and bert is neither; did you mean --model.name?",
    ("run", "--training=5"): "did you mean --training.epochs?",
    ("run", "--train", "rows.csv"): "unknown option --train; did you mean --data.train or --light.train?",
    ("run", "--outptu", "here"): "unknown option --outptu; did you mean --output?",
    ("train", "--heads", "0.5"): "did you mean --light.remove.heads?",
    ("run", "--frobnicate"): "unknown option --frobnicate; --help lists all options",
    ("inspect", "run", "--lr", "3"): "unknown option --lr; --help lists all options",
    ("eval", "run"): "unknown verb eval; did you mean evaluate?",
    ("rnu", "--help"): "unknown verb rnu; did you mean run?",
    ("frobnicate",): "unknown verb frobnicate; lightpeft --help lists all verbs",
    ("--config", "run.yaml"): "unknown verb --config; lightpeft --help lists all verbs",
    ("run", "bert"): "unrecognized arguments: bert; --help",
}


@pytest.mark.parametrize("arguments", MISNAMED, ids=" ".join)
def test_misnamed_options(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert lightpeft(*arguments) == 2
    line = capsys.readouterr().err
    assert MISNAMED[arguments] in line
    assert line.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert lightpeft("--version") == 0
    assert capsys.readouterr().out.strip() == f"lightpeft {__version__}"


def test_version_for_a_bug_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain lines to paste: what computes, and what pip would say of everything that lightpeft may use."""
    assert lightpeft("--version", "--verbose") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"lightpeft {__version__}"
    told = dict(line.split(": ", 1) for line in lines)
    assert told["python"] == platform.python_version() and told["os"] and told["cpu"] and told["memory"].endswith("iB")
    assert all(told[name] == version(name) for name in ("torch", "peft", "accelerate", "datasets", "tokenizers"))
    assert "vllm" not in told  # which cannot be installed beside lightpeft


def test_verbose_goes_with_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert lightpeft("--verbose") == 2
    assert capsys.readouterr().err == "lightpeft: --verbose goes with --version alone\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "--help"], 0, ""),
        (["run", "--light.remove.blocks", "2"], 2, "light.remove.blocks"),
        (["run", "--model.name", "org/tiny", "--data.train", "no.csv"], 2, "data.train: file no.csv does not exist"),
        (["check", "--model.name", "./no"], 2, "model folder ./no does not exist"),
        (["report", "no"], 2, "no is not the folder of a run"),
        (["reproduce", "no.yaml"], 2, "config file no.yaml does not exist"),
        (["predict", "org/tiny", "no.txt"], 2, "input: file no.txt does not exist"),
    ],
    ids=["help", "a wrong setting", "missing rows", "a missing model", "no run", "no grid", "no input"],
)
def test_what_needs_no_model_does_not_wait_for_torch(arguments: list[str], code: int, said: str) -> None:
    program = (
        "import sys; from lightpeft.app.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as end: code = end.code or 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & sys.modules.keys()\n"
        "sys.exit(99 if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert said in done.stderr if said else not done.stderr


@pytest.mark.parametrize(
    ("wish", "found"),
    [({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["no wish", "a number", "a policy"],
)
def test_threads_wait_briefly_unless_the_environment_says_how(wish: dict[str, str], found: str) -> None:
    program = (
        "import os, sys; from lightpeft.app.cli import main; main(['--version'])\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | wish
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{found} False"


def completions(line: str, folder: Path) -> list[str]:
    """What a shell offers behind a line, as argcomplete's script asks for it, without waiting for torch."""
    out = folder / "offered"
    code = (
        "import sys, os; from lightpeft.app.cli import main\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'sklearn'}\n"
        "end = os._exit\n"
        "os._exit = lambda code: end(code or len(heavy & sys.modules.keys()))\n"
        "main()"
    )
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, cwd=folder, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    return out.read_text(encoding="utf-8").split()


def test_a_shell_completes_verbs_options_values_and_files(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    assert completions("lightpeft ", tmp_path)[-len(NAMES) :] == NAMES
    assert completions("lightpeft pre", tmp_path) == ["predict"]
    assert completions("lightpeft run --light.remove.blo", tmp_path) == ["--light.remove.blocks"]
    assert completions("lightpeft run --help", tmp_path) == ["--help", "--help-all"]
    assert completions("lightpeft run --light.preset ac", tmp_path) == ["accurate"]
    assert completions("lightpeft run --training.precision=b", tmp_path) == ["--training.precision=bf16"]
    assert completions("lightpeft export --form o", tmp_path) == ["onnx", "openvino"]
    assert completions("lightpeft run --data.train ro", tmp_path) == ["rows.csv"]


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lightpeft", "run", "--light.remove.haeds", "0.5"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("lightpeft", run_name="__main__")
    assert end.value.code == 2
    assert "did you mean --light.remove.heads?" in capsys.readouterr().err


# -- settings ----------------------------------------------------------------------------------------------------


def test_print_config_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = (
        "--light",
        "paper",
        "--light.remove.heads",
        "0.5",
        "--light.estimate.length",
        "0.2",
        "--peft.slots",
        '["q", "v"]',
    )
    text = shown(capsys, "run", *options, "--data.columns.text_pair", "other", "--print_config")
    file = tmp_path / "printed.yaml"
    file.write_text(text, encoding="utf-8")
    assert printed(capsys, "run", "--config", file) == yaml.safe_load(text)
    config = load_config(file)
    assert config.light.remove.heads == 0.5
    assert config.light.estimate.length == 0.2
    assert config.peft == {"type": "lora", "slots": ["q", "v"]}
    assert config.data.columns == {"text_pair": "other"}
    assert config.light.estimate.criterion == "mask"
    assert dataclasses.asdict(config) == yaml.safe_load(text)


def test_options_go_over_the_file_and_the_file_over_the_preset(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "light: {preset: paper, remove: {heads: 0.4, neurons: 0.4, multiple_of: 4}}\nseed: 3\n", encoding="utf-8"
    )
    for options in (["--light.remove.heads", "0.5", "--seed=7"], ["--seed", "7", "--light.remove.heads=0.5"]):
        given = printed(capsys, "run", "--config", file, *options)
        assert given["light"]["remove"]["heads"] == 0.5
        assert given["light"]["remove"]["neurons"] == 0.4
        assert given["light"]["remove"]["multiple_of"] == 4
        assert given["light"]["estimate"]["criterion"] == "mask"
        assert given["seed"] == 7
    changed = printed(capsys, "run", "--config", file, "--light", "fast")
    assert changed["light"]["estimate"]["criterion"] == "fisher"
    assert changed["light"]["remove"]["multiple_of"] == 4
    assert changed["light"]["remove"]["blocks"] is None  # the file says it by heads and neurons
    for amount in (["--light", "0.3"], ["--light=0.3"], ["--light.remove.blocks", "0.3"]):
        remove = printed(capsys, "run", "--config", file, *amount)["light"]["remove"]
        assert (remove["blocks"], remove["heads"], remove["multiple_of"]) == (0.3, None, 4)
    both = printed(capsys, "run", "--light", "0.3", "--light.remove.tolerance", "2 points")["light"]["remove"]
    assert (both["blocks"], both["tolerance"]) == (0.3, "2 points")
    assert lightpeft("run", "--light", "0.3", "--light.remove.heads", "0.5") == 2
    assert "both set the amount to remove" in capsys.readouterr().err


def test_values_of_every_kind_come_through(capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "light.estimate.length": "50",
        "light.remove.depth": "0.4",
        "training.fast_steps": "false",
        "training.precision": "bf16",
        "training.learning_rate": "1e-4",
        "model.revision": "main",
        "data.limit_train": "100",
        "peft.target_modules": '["query", "value"]',
    }
    given = printed(capsys, "run", *(f"--{name}={value}" for name, value in options.items()))
    assert given["light"]["estimate"]["length"] == 50
    assert given["light"]["remove"]["depth"] == 0.4
    assert (given["training"]["fast_steps"], given["training"]["precision"]) == (False, "bf16")
    assert given["training"]["learning_rate"] == 1e-4
    assert given["model"]["revision"] == "main"
    assert given["data"]["limit_train"] == 100
    assert given["peft"]["target_modules"] == ["query", "value"]


def test_text_is_text_whatever_it_looks_like(capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"data.columns.text": "yes", "data.columns.label": "null"}
    options = {"output": "7", "model.revision": "1e5", **columns, "data.train": "a: b"}
    given = printed(capsys, "run", *(f"--{name}={value}" for name, value in options.items()))
    assert (given["output"], given["model"]["revision"]) == ("7", "1e5")
    assert (given["data"]["columns"], given["data"]["train"]) == ({"text": "yes", "label": "null"}, "a: b")
    assert printed(capsys, "run", "--model.revision", "null")["model"]["revision"] is None
    assert printed(capsys, "run", "--training.prefix_cache", "off")["training"]["prefix_cache"] == "off"


def test_sections_and_mappings_as_a_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "training.yaml"
    file.write_text("batch_size: 4\nwarmup: 0.5\n", encoding="utf-8")
    options = ["--light", "remove: {heads: 0.5, multiple_of: 4}", "--light.remove.multiple_of", "2", "--training", file]
    options += ["--data.columns", "{text: review}", "--data.columns.label", "stars"]
    given = printed(capsys, "run", *options, "--tasks.mine.kind", "chat", "--tasks.mine.hub", "a/b")
    assert (given["light"]["remove"]["heads"], given["light"]["remove"]["multiple_of"]) == (0.5, 2)
    assert (given["training"]["batch_size"], given["training"]["warmup"]) == (4, 0.5)
    assert given["data"]["columns"] == {"text": "review", "label": "stars"}
    assert (given["tasks"]["mine"]["kind"], given["tasks"]["mine"]["hub"]) == ("chat", "a/b")
    assert lightpeft("run", "--light", "remove: {haeds: 0.5}", "--print_config") == 2
    assert "unknown key light.remove.haeds; did you mean light.remove.heads?" in capsys.readouterr().err


def test_settings_of_a_run_folder(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    given = printed(capsys, "evaluate", "--run", bench.folder / "run")
    expected = dataclasses.asdict(bench.config("run"))
    assert given == expected
    assert list(given) == [field.name for field in dataclasses.fields(RunConfig)]


# -- results -----------------------------------------------------------------------------------------------------


def test_a_run_says_what_to_do_with_its_result(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench.folder / "run"
    assert lightpeft("run", "--run", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    verbs = [line.split()[1:3] for line in lines[lines.index("next:") + 1 :]]
    assert verbs == [[verb, str(folder)] for verb in ("predict", "report", "inspect", "export")]
    assert set(next(zip(*verbs, strict=True))) <= set(VERBS)


def test_inspect_shows_a_plan_layer_by_layer(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench.folder / "run"
    plan = shown(capsys, "inspect", folder / "plan.json")
    assert plan == shown(capsys, "plan", "--run", folder)
    lines = [line for line in plan.splitlines() if line.count("3/4") == 2]
    assert len(lines) == 2  # a quarter of four heads, and of their keys and values, in both layers
    assert "base parameters" in plan


def test_inspect_shows_an_adapter_and_a_run(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench.folder / "run"
    adapter = shown(capsys, "inspect", folder / "adapter")
    assert "BertForSequenceClassification" in adapter and "None" not in adapter
    assert "accuracy" in adapter and "test rows" in adapter
    assert adapter.count("3/4") == 4
    assert shown(capsys, "inspect", folder) == adapter
    pruned = shown(capsys, "inspect", folder / "pruned")
    assert "accuracy" not in pruned


def test_inspect_shows_the_plan_of_an_unfinished_run(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = bench.yaml("unfinished"), bench.folder / "unfinished"
    assert lightpeft("estimate", "--config", file) == 0
    estimated = shown(capsys, "inspect", folder)
    assert "scored examples" in estimated
    assert "plan by the budget of the run" in estimated
    assert shown(capsys, "inspect", folder / "estimation") == estimated
    assert lightpeft("plan", "--config", file) == 0
    planned = shown(capsys, "inspect", folder)
    assert planned.count("3/4") == estimated.count("3/4") > 0
    assert planned.splitlines()[-1] == estimated.splitlines()[-1]


def test_inspect_of_a_run_that_has_just_begun(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder.open(bench.config("begun")).begin()
    assert lightpeft("inspect", bench.folder / "begun") == 2
    assert f"lightpeft run --run {bench.folder / 'begun'}" in capsys.readouterr().err
