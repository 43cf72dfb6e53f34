"""`evaluate` on every kind of model: the numbers of its run, beside another model, in files, and refusals."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import workbench
import yaml
from scipy.stats import binomtest
from sklearn.metrics import classification_report
from tiny import refusal, with_lora
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)
from workbench import Workbench, labeled, lightpeft, read, write_rows

from lightpeft import load_light
from lightpeft.app.evaluation.class_names import class_order
from lightpeft.app.evaluation.harness import evaluate_harness
from lightpeft.app.evaluation.predicting import predict
from lightpeft.app.evaluation.reports import evaluate_model
from lightpeft.app.folders.opening import find_model
from lightpeft.app.runs import pipeline
from lightpeft.config import ModelConfig, run_config_from_dict
from lightpeft.models.loading import load_model
from lightpeft.models.task_heads import CLASSIFICATION
from lightpeft.saving.whole import MERGED
from lightpeft.saving.whole_config import OWN

METHODS = ("light", "plain", "full")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """One run of each method on the same data."""
    bench = Workbench(tmp_path_factory.mktemp("evaluating"))
    for method in METHODS:
        pipeline.run(bench.config(method, method=method))
    return bench


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workbench.save_base(tmp_path_factory.mktemp("llama") / "base", "llama")


def rows_of(bench: Workbench, **data: Any) -> dict[str, Any]:
    """Settings that name the test rows and the length of the runs."""
    return {"data": {"test": str(bench.test), "max_length": 32, **data}}


def measured(bench: Workbench, run: str) -> dict[str, Any]:
    return read(bench.folder / run / "metrics.json")


# -- what a name stands for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("light", "run (light adapter)"),
        ("plain", "run (PEFT adapter)"),
        ("full", "run (model)"),
        ("light/adapter", "light adapter"),
        ("plain/adapter", "PEFT adapter"),
        ("full/model", "model"),
    ],
)
def test_every_kind_of_model_gets_the_numbers_of_its_run(bench: Workbench, folder: str, kind: str) -> None:
    run = folder.partition("/")[0]
    report = evaluate_model(bench.folder / folder, rows_of(bench) if "/" in folder else None)
    assert report["model"]["kind"] == kind
    assert report["examples"] == 40
    expected = measured(bench, run)
    assert report["model"]["metrics"] == pytest.approx(expected["metrics"])
    assert report["model"]["intervals"]["accuracy"] == pytest.approx(expected["intervals"]["accuracy"])
    assert report["model"]["parameters"] == expected["parameters"]


def test_given_length_goes_over_that_of_training(bench: Workbench) -> None:
    adapter = bench.folder / "light" / "adapter"
    short = evaluate_model(adapter, rows_of(bench, max_length=4))["model"]["metrics"]
    assert short["loss"] != pytest.approx(measured(bench, "light")["metrics"]["loss"])
    refused = refusal(lambda: evaluate_model(adapter, rows_of(bench, answer="likelihood")))
    assert "needs a causal language model" in refused


def test_a_family_that_cannot_be_pruned_can_be_measured(bench: Workbench, tmp_path: Path) -> None:
    sizes = {**workbench.SIZES, "embedding_size": 16, "vocab_size": 40, "max_position_embeddings": 40}
    albert = AlbertForSequenceClassification(AlbertConfig(**sizes, num_labels=2))
    albert.save_pretrained(tmp_path)
    for file in bench.base.glob("*token*"):
        shutil.copy(file, tmp_path)
    report = evaluate_model(tmp_path, rows_of(bench))
    assert 0 <= report["model"]["metrics"]["accuracy"] <= 1
    model = ModelConfig(name=str(tmp_path))
    assert "cannot be pruned" in refusal(lambda: load_model(model, CLASSIFICATION, ["a", "b"]))


# -- named tasks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_three(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with MNLI's classes in an order of its own."""
    folder = tmp_path_factory.mktemp("three")
    names = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    config = BertConfig.from_pretrained(bench.base, id2label=names, label2id={v: k for k, v in names.items()})
    BertForSequenceClassification(config).save_pretrained(folder)
    for file in bench.base.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_further_splits_have_their_prefix(of_three: Path, tmp_path: Path) -> None:
    layouts.write_task(tmp_path, "mnli")
    settings = {"data": {"task": "mnli", "path": str(tmp_path), "max_length": 32}}
    report = evaluate_model(of_three, settings, other=str(of_three), per_class=True)
    for part in (report["model"]["metrics"], report["model"]["intervals"], report["comparison"]):
        assert {"accuracy", "mismatched_accuracy"} <= part.keys()
    assert report["model"]["metrics"]["mismatched_examples"] == 15
    assert list(report["classes"])[:3] == ["contradiction", "neutral", "entailment"]


def test_answers_to_one_question_count_together(llama: Path, adapter: Path, tmp_path: Path) -> None:
    layouts.write_task(tmp_path, "multirc")
    data = {"task": "multirc", "path": str(tmp_path), "answer": "likelihood", "max_length": 38}
    report = evaluate_model(llama, {"data": data}, other=str(adapter))
    assert list(report["comparison"])[:2] == ["f1a", "exact_match"]
    assert {entry["test"] for entry in report["comparison"].values()} == {"paired bootstrap"}


def test_a_task_of_one_s_own(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named in the YAML of --config, and remembered by a light adapter."""
    (tmp_path / "rows").mkdir()
    for split in ("train", "validation"):
        rows = [{"review": row["text"], "mood": row["label"]} for row in labeled(40, seed=len(split))]
        write_rows(tmp_path / "rows" / f"{split}.csv", rows)
    mood = {"kind": "classification", "path": str(tmp_path / "rows"), "metrics": ["f1_macro", "accuracy"]}
    mood |= {"columns": {"text": "review", "label": "mood"}, "labels": ["negative", "positive"]}
    changes = {"tasks": {"mood": mood}, "data": {"task": "mood", "max_length": 32}}
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(changes))
    expected = evaluate_model(bench.folder / "plain" / "adapter", changes)["model"]["metrics"]
    assert list(expected)[:2] == ["f1_macro", "accuracy"]
    report = tmp_path / "report.json"
    assert lightpeft("evaluate", bench.folder / "plain" / "adapter", "--config", file, "--json", report) == 0
    assert read(report)["model"]["metrics"] == pytest.approx(expected)
    assert "f1_macro" in capsys.readouterr().out
    run = pipeline.run(bench.config("mood", **changes))
    again = evaluate_model(bench.folder / "mood" / "adapter")
    assert again["task"] == "mood"
    assert again["model"]["metrics"] == pytest.approx(run["metrics"])


# -- classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "labels", "order"),
    [
        (["negative", "positive"], ["negative", "positive"], ["negative", "positive"]),
        (["POSITIVE", "NEGATIVE"], ["negative", "positive"], ["positive", "negative"]),
        (["LABEL_0", "LABEL_1"], ["bad", "good"], ["bad", "good"]),
        (["bad", "good"], ["0", "1"], ["0", "1"]),
        (["bad", "good", "unsure"], ["Good", "Bad"], ["Bad", "Good", "unsure"]),
        (["0", "1", "2"], ["0", "2"], ["0", "1", "2"]),
        (["May", "may", "Mai"], ["may", "May"], ["May", "may", "Mai"]),
    ],
)
def test_data_labels_in_the_order_of_the_model(classes: list[str], labels: list[str], order: list[str]) -> None:
    assert class_order(classes, labels, "m") == order


@pytest.mark.parametrize(
    ("classes", "labels"),
    [(["a", "b"], ["a", "c"]), (["LABEL_0", "LABEL_1"], ["x", "y", "z"]), (["bad", "good"], ["1", "2"])],
)
def test_other_labels_are_refused(classes: list[str], labels: list[str]) -> None:
    text = refusal(lambda: class_order(classes, labels, "m"))
    assert all(name in text for name in (*classes, *labels))


def test_a_model_that_counts_its_classes_otherwise(bench: Workbench, tmp_path: Path) -> None:
    """The same weights with the classes swapped are the same model."""
    swapped = Path(shutil.copytree(bench.folder / "full" / "model", tmp_path / "swapped"))
    model = AutoModelForSequenceClassification.from_pretrained(swapped)
    model.classifier.weight.data = model.classifier.weight.data.flip(0)
    model.classifier.bias.data = model.classifier.bias.data.flip(0)
    model.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}
    model.config.label2id = {"POSITIVE": 0, "NEGATIVE": 1}
    model.save_pretrained(swapped)
    report = evaluate_model(bench.folder / "full", other=str(swapped))
    assert report["comparison"]["accuracy"]["difference"] == 0
    assert report["comparison"]["accuracy"]["p_value"] == 1
    assert report["other"]["metrics"]["accuracy"] == pytest.approx(report["model"]["metrics"]["accuracy"])


# -- two models --------------------------------------------------------------------------------------------------


def test_rows_of_the_training_are_no_test(bench: Workbench) -> None:
    """Both models are measured on rows that they have seen, and it is said of both."""
    report = evaluate_model(
        bench.folder / "full", {"data": {"test": str(bench.train)}}, other=str(bench.folder / "plain")
    )
    for name in ("model", "other"):
        assert any("test rows are also training rows" in line for line in report[name]["warnings"])
    metrics = pipeline.run(bench.config("seen", method="plain", **{"data.test": str(bench.train)}))
    assert any("test rows are also training rows" in line for line in metrics["warnings"])
    assert not any("training rows" in line for line in read(bench.folder / "full" / "metrics.json")["warnings"])


def test_comparison_is_of_the_same_examples(bench: Workbench, tmp_path: Path) -> None:
    report = evaluate_model(bench.folder / "full", other=str(bench.folder / "plain"))
    right = {}
    for name in ("full", "plain"):
        evaluate_model(bench.folder / name, predictions=tmp_path / f"{name}.csv")
        with (tmp_path / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            right[name] = [row["prediction"] == row["reference"] for row in csv.DictReader(file)]
    assert not any("training rows" in line for name in ("model", "other") for line in report[name]["warnings"])
    entry = report["comparison"]["accuracy"]
    assert entry["first"] == pytest.approx(np.mean(right["full"]))
    assert entry["second"] == pytest.approx(np.mean(right["plain"]))
    assert entry["test"] == "McNemar"
    apart = [a for a, b in zip(*right.values(), strict=True) if a != b]
    assert entry["p_value"] == pytest.approx(binomtest(sum(apart), len(apart)).pvalue)
    assert report["comparison"]["f1"]["test"] == "paired bootstrap"
    assert report["comparison"]["loss"]["first"] == pytest.approx(measured(bench, "full")["metrics"]["loss"])
    assert report["other"]["metrics"] == pytest.approx(measured(bench, "plain")["metrics"])


# -- files -------------------------------------------------------------------------------------------------------


def test_predictions_and_report(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--predictions", tmp_path / "p.jsonl", "--json", tmp_path / "report.json")
    assert lightpeft("evaluate", bench.folder / "plain", "--per_class", *files) == 0
    shown = capsys.readouterr().out
    report = read(tmp_path / "report.json")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert list(rows[0]) == ["text", "label", "reference", "prediction", "p_negative", "p_positive"]
    assert [row["reference"] for row in rows] == [row["label"] for row in labeled(40, seed=2)]
    for row in rows:
        assert row["prediction"] == ("positive" if row["p_positive"] > 0.5 else "negative")
    pairs = [[row[key] for row in rows] for key in ("reference", "prediction")]
    expected = classification_report(*pairs, output_dict=True, zero_division=0)
    for name in ("negative", "positive", "macro avg"):
        assert report["classes"][name] == pytest.approx(expected[name])
        assert name in shown
    assert report["model"]["metrics"]["accuracy"] == pytest.approx(expected["accuracy"])
    assert f"{report['model']['metrics']['accuracy']:.4f}" in shown


def test_the_command_on_a_run(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --run the stage is done first; what the options ask for comes after it."""
    shutil.copytree(bench.folder / "light", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    assert lightpeft("evaluate", "--run", tmp_path / "run", "--compare", bench.folder / "plain") == 0
    shown = capsys.readouterr().out
    assert "McNemar" in shown
    metrics = read(tmp_path / "run" / "metrics.json")["metrics"]
    assert metrics == pytest.approx(measured(bench, "light")["metrics"])
    assert lightpeft("evaluate", "--run", tmp_path / "run") == 0
    assert "95% interval" in capsys.readouterr().out


# -- language models and the harness -----------------------------------------------------------------------------

QUESTIONS: list[dict[str, Any]] = [
    {
        "context": " ".join(workbench.NEUTRAL[index % 7 : index % 7 + 2 + index % 5]),
        "options": [" ".join(workbench.GOOD[: 1 + index % 3]), "bad0", " ".join(workbench.BAD[index % 2 : 4])],
        "answer": index % 3,
    }
    for index in range(24)
]


def choice(folder: Path, **data: Any) -> dict[str, Any]:
    """Settings of multiple choice by likelihood on `QUESTIONS`."""
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    named = {"task": "multiple-choice", "test": str(file), "max_length": 32}
    return {"data": {**named, **data}}


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A task file of the harness with the same prompts over the same rows."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    choice(tmp_path)
    files = {"data_files": {"test": str(tmp_path / "questions.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    means = ("acc", "acc_norm", "acc_bytes")
    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{context}}\nAnswer:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in means],
    }
    (folder / "questions.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter of the language model."""
    folder = tmp_path_factory.mktemp("adapter")
    with_lora(AutoModelForCausalLM.from_pretrained(llama)).save_pretrained(folder)
    return folder


def test_likelihoods_are_those_of_the_harness(llama: Path, adapter: Path, task_folder: Path, tmp_path: Path) -> None:
    """Sum and per-byte accuracies equal acc and acc_norm of lm-evaluation-harness on the same prompts."""
    pytest.importorskip("lm_eval.tasks")  # not "lm_eval": a folder of benchmarks/ would do
    found = set()
    for model in (llama, adapter):
        own = evaluate_model(model, choice(tmp_path))["model"]["metrics"]
        theirs = evaluate_harness(model, ["questions"], include_path=task_folder)["model"]["tasks"]["questions"]
        assert own["accuracy"] == pytest.approx(theirs["metrics"]["acc"])
        assert own["accuracy_norm"] == pytest.approx(theirs["metrics"]["acc_norm"])
        assert theirs["metrics"]["acc_norm"] == theirs["metrics"]["acc_bytes"]  # these texts are ASCII
        normed = evaluate_model(model, choice(tmp_path, likelihood="byte"))["model"]
        assert normed["metrics"]["accuracy_norm"] == pytest.approx(own["accuracy_norm"])
        assert normed["intervals"]["accuracy_norm"] == pytest.approx(theirs["intervals"]["acc_norm"])
        assert normed["intervals"]["accuracy"] == pytest.approx(theirs["intervals"]["acc"])
        found |= {round(own[name], 6) for name in ("accuracy", "accuracy_norm")}
    assert len(found) > 2  # the rules and the models are told apart


def test_language_modeling(llama: Path, adapter: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", workbench.completions(20))
    columns = {"prompt": "prompt", "completion": "completion"}
    data = {"task": "causal-lm", "test": str(rows), "columns": columns, "max_length": 32}
    report = evaluate_model(llama, {"data": data}, other=str(adapter), predictions=tmp_path / "p.jsonl")
    sums = [json.loads(line)["prediction"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    loss, tokens = (sum(of_row[name] for of_row in sums) for name in ("loss", "tokens"))
    assert loss / tokens == pytest.approx(report["model"]["metrics"]["loss"])
    low, high = report["model"]["intervals"]["perplexity"]
    assert low < report["model"]["metrics"]["perplexity"] < high
    assert report["comparison"]["loss"]["test"] == "paired bootstrap"
    assert report["comparison"]["loss"]["second"] == pytest.approx(report["other"]["metrics"]["loss"])


# -- refusals ----------------------------------------------------------------------------------------------------


def test_refusals(bench: Workbench, llama: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.csv", [{"text": "word1", "label": "x"}, {"text": "word2", "label": "y"}])
    light, base = bench.folder / "light" / "adapter", bench.base
    language = {"data": {"task": "causal-lm", "test": str(bench.test)}}
    cases: list[tuple[Path, dict[str, Any], dict[str, Any], str]] = [
        (light, {}, {}, "set --data.test to a file"),
        (
            light,
            rows_of(bench, test=str(other)),
            {},
            "has 2 classes (negative, positive), but the data have 2 labels (x, y)",
        ),
        (light, language, {}, "bert is not a causal language model, which causal-lm needs"),
        (light, choice(tmp_path), {}, "was trained for classification and cannot answer multiple-choice"),
        (bench.folder / "plain" / "adapter", choice(tmp_path), {}, "PEFT's task type SEQ_CLS"),
        (base, rows_of(bench), {}, "no weights for classifier, so its answers to classification would be random"),
        (tmp_path / "nothing", rows_of(bench), {}, "nothing does not exist"),
        (
            Path("runs/nothing"),
            rows_of(bench),
            {},
            "there is no folder runs/nothing, and model runs/nothing cannot be loaded",
        ),
        (bench.folder, rows_of(bench), {}, "give a folder with a run, a light adapter"),
        (bench.test, rows_of(bench), {}, "is a file"),
        (bench.folder / "full" / "model", rows_of(bench), {"base": str(base)}, "has no base; leave out --base"),
        (light, rows_of(bench), {"base": str(llama)}, "belongs to another base"),
        (light, rows_of(bench), {"batch_size": 0}, "batch_size is 0"),
        (light, rows_of(bench), {"predictions": tmp_path / "p.xlsx"}, ".csv or .jsonl"),
        (llama, {**language, "data": {**language["data"]}}, {"per_class": True}, "has no classes; leave it out"),
        (light, rows_of(bench), {"other": str(llama)}, "would be random"),
    ]
    for model, settings, options, expected in cases:
        text = refusal(lambda m=model, s=settings, o=options: evaluate_model(m, s, **o))
        assert expected in text, text
    assert not list(tmp_path.glob("p.*"))


def test_a_pruned_model_that_was_merged(bench: Workbench, tmp_path: Path) -> None:
    """transformers cannot put it into layers of its config's widths; with its plan it answers, without it does not."""
    load_light(bench.folder / "light" / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    shutil.copytree(bench.base, tmp_path / "merged", dirs_exist_ok=True, ignore=only_tokenizer)
    answers = evaluate_model(tmp_path / "merged", rows_of(bench))["model"]
    assert answers["metrics"] == pytest.approx(measured(bench, "light")["metrics"], rel=1e-4)
    (tmp_path / "merged" / MERGED).unlink()
    text = refusal(lambda: evaluate_model(tmp_path / "merged", rows_of(bench)))
    assert text.endswith("without its plan: merged.json is missing; add it")
    config = tmp_path / "merged" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())[OWN]))
    text = refusal(lambda: evaluate_model(tmp_path / "merged", rows_of(bench)))
    assert "not merged by lightpeft export" in text


@pytest.mark.parametrize("source", ["light", "light/adapter"])
def test_an_export(bench: Workbench, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The export of a run or of a light adapter gets the numbers of the run, and answers new rows, without the base."""
    assert lightpeft("export", bench.folder / source, tmp_path / "merged") == 0
    written = capsys.readouterr().out
    assert f"wrote a whole model that needs no base to {tmp_path / 'merged'}; load it with " in written
    elsewhere = bench.base.rename(bench.folder / "moved_base")
    try:
        report = evaluate_model(tmp_path / "merged", rows_of(bench))
        assert lightpeft("predict", tmp_path / "merged", bench.test, "--output", tmp_path / "merged.csv") == 0
    finally:
        elsewhere.rename(bench.base)
    assert report["model"]["kind"] == "merged light model"
    expected = measured(bench, "light")
    assert report["model"]["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
    parameters = report["model"]["parameters"]
    for name in ("base_dense", "base", "base_removed_ratio"):
        assert parameters[name] == expected["parameters"][name]
    assert "trained" not in parameters
    assert lightpeft("predict", bench.folder / "light", bench.test, "--output", tmp_path / "light.csv") == 0
    merged, light = (list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("merged", "light"))
    assert [row["label"] for row in merged] == [row["label"] for row in light]
    assert len(merged) == 40


def only_tokenizer(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if "token" not in name]


@pytest.mark.parametrize(("method", "result"), [("plain", "adapter"), ("full", "model")])
def test_a_result_that_is_not_as_it_was_written(bench: Workbench, tmp_path: Path, method: str, result: str) -> None:
    """One road: what the stages of a run refuse, everybody else does, too."""
    run = Path(shutil.copytree(bench.folder / method, tmp_path / "run"))
    weights = next((run / result).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    for ask in (lambda: evaluate_model(run), lambda: predict(run, bench.test)):
        assert "was altered or damaged" in refusal(ask)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_remembers_the_order_of_its_classes(bench: Workbench, tmp_path: Path, method: str) -> None:
    """Whatever order the data have them in; they are those of another model of the comparison."""
    shutil.copy(bench.test, tmp_path / "validation.csv")
    mood = {"kind": "classification", "path": str(tmp_path), "labels": ["positive", "negative"]}
    settings = {"tasks": {"mood": mood}, "data": {"task": "mood", "max_length": 32}}
    report = evaluate_model(bench.folder / "full" / "model", settings, other=str(bench.folder / method))
    assert report["other"]["metrics"]["accuracy"] == pytest.approx(measured(bench, method)["metrics"]["accuracy"])


def test_an_unfinished_run(bench: Workbench, tmp_path: Path) -> None:
    config = run_config_from_dict(bench.settings("unfinished"))
    pipeline.estimate(pipeline.prepare(config))
    assert "no result of `lightpeft train` yet" in refusal(lambda: find_model(bench.folder / "unfinished"))


def test_options_that_do_not_go_together(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    run = bench.folder / "light"
    for options, expected in [
        ((run, "--run", run), "exclude each other"),
        ((run, "--tasks", "piqa"), "--harness lm-eval"),
        ((run, "--harness", "lm-eval", "--per_class"), "do not work with --harness; leave them out"),
        ((run, "--harness", "lm-eval", "--tasks", "piqa"), "cannot answer tasks of lm-evaluation-harness"),
        ((run, "--harness", "other"), "harness"),
    ]:
        assert lightpeft("evaluate", *options) == 2
        written = capsys.readouterr()
        assert expected in written.err
        assert written.err.count("\n") == 1
        assert written.out == ""
