"""Graphs for ONNX Runtime and OpenVINO: they compute what the light model computes; what has none is refused."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from adapters import light_over
from lanes import telling, thorough
from peft_models import adapted
from tiny import (
    DECODERS,
    DROPPED,
    ENCODERS,
    TEXT,
    VARIANTS,
    inputs_for,
    make,
    maker,
    plan_for,
    refusal,
    relative_difference,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.exporters import ExportedModel
from workbench import Rows, Workbench, checksums, labeled, lightpeft, write_rows

from lightpeft import LightModel, export_model
from lightpeft.adapters.merging import merged_copy
from lightpeft.app.cli.verbs.export import EXPORT
from lightpeft.app.exports.exporting import DTYPES, EXPORTS
from lightpeft.app.exports.graphs import measuring, sessions, tracing
from lightpeft.app.exports.graphs.runtimes import RUNTIMES, Runtime
from lightpeft.app.folders.opening import find_light
from lightpeft.app.runs import pipeline
from lightpeft.files import read_json
from lightpeft.models.families.family_table import FAMILIES
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan

CLOSE = 1e-4
"""Two programs add up the same numbers in other orders."""
IMAGES = {"vit", "dinov2"}
ROUTED = {name for name, family in FAMILIES.items() if any(stack.experts for stack in family.stacks)}
TEXTS = [name for name in (*ENCODERS, *DECODERS) if name not in IMAGES | ROUTED]
QUICK = {("bert", "onnx"), ("llama-gqa", "openvino")}
"""Tracing takes seconds: `make test` traces these."""
NARROW = {"modernbert": {"local_attention": 4}}
"""What makes windows of attention shorter than the texts."""
SHALLOW = {"num_hidden_layers": 1}
UNEVEN: dict[str, Any] = {"scope": "global"}


def cases(names: Iterable[str], chosen: set[tuple[str, str]]) -> list[Any]:
    """Name and form, of which `make test` takes those that are chosen."""
    both = itertools.product(names, RUNTIMES)
    return [pytest.param(*case, marks=() if case in chosen else thorough) for case in both]


def whole(light: LightModel) -> PreTrainedModel:
    """What is exported, in PyTorch."""
    return merged_copy(light).float().eval()


@torch.no_grad()
def difference(model: PreTrainedModel, folder: Path, form: str, inputs: dict[str, Tensor]) -> float:
    """Of all that both give for a batch."""
    own, theirs = model(**inputs), sessions.load(form, folder).run(inputs)
    assert theirs and all(value.shape == own[name].shape for name, value in theirs.items())
    return max(relative_difference(value, own[name]) for name, value in theirs.items())


def greedy(folder: Path, form: str, inputs: dict[str, Tensor], count: int) -> Tensor:
    """So many tokens behind a batch that is padded on the left: the prompt in one call, then one by one."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    running, news = sessions.load(form, folder), ids
    for _ in range(count):
        places = tracing.positions(mask)[:, -news.shape[1] :]
        logits = running.run({"input_ids": news, "attention_mask": mask, "position_ids": places})["logits"]
        news = logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, news], 1), torch.cat([mask, torch.ones_like(news)], 1)
    return ids


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), cases(TEXTS, QUICK))
def test_a_runtime_computes_the_same(name: str, form: str, tmp_path: Path) -> None:
    """Uneven layers, some without attention or FFN, in batches of other sizes than the traced one, padded or not."""
    light = light_over(make(name, **NARROW.get(name, {})), **DROPPED)
    before = {key: value.clone() for key, value in light.state_dict().items()}
    export_model(light, tmp_path / "out", form)
    assert all(before[key].equal(value) for key, value in light.state_dict().items()), "the light model stays as it is"
    model = whole(light)
    if name in ENCODERS:
        for shape in ({"rows": 1, "length": 4, "padding": "none"}, {"rows": 5, "length": 13}):
            assert difference(model, tmp_path / "out", form, inputs_for(model, **shape)) < CLOSE
        return
    for shape in ({"rows": 1, "length": 3, "padding": "none"}, {"rows": 3, "length": 11, "padding": "left"}):
        inputs = inputs_for(model, generate=True, **shape)
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert greedy(tmp_path / "out", form, inputs, 8).equal(model.generate(**inputs, **settings)), shape


BERT = TEXT | SHALLOW
HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    "tokens": maker("BertConfig", "BertForTokenClassification", BERT | {"num_labels": 5}),
    "span": maker("BertConfig", "BertForQuestionAnswering", BERT),
    "options": maker("BertConfig", "BertForMultipleChoice", BERT),
    "number": maker("BertConfig", "BertForSequenceClassification", BERT | {"num_labels": 1}),
    "decoder": VARIANTS["llama-classifier"],
}


@thorough
@pytest.mark.parametrize("form", RUNTIMES)
@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str, form: str, tmp_path: Path) -> None:
    light = light_over(HEADS[head](), **UNEVEN)
    export_model(light, tmp_path, form)
    model = whole(light)
    for rows, length in ((2, 5), (4, 9)):
        inputs = inputs_for(model, rows=rows, length=length)
        if head == "options":
            inputs = {name: torch.stack([value, value.flip(0), value], 1) for name, value in inputs.items()}
        assert difference(model, tmp_path, form, inputs) < CLOSE
    assert not any("cache" in name for name in sessions.load(form, tmp_path).run(inputs))


@thorough
@pytest.mark.parametrize(("form", "dtype"), [("onnx", "int8"), ("openvino", "int8"), ("openvino", "f16")])
def test_data_types(form: str, dtype: str, tmp_path: Path) -> None:
    sizes = {**SHALLOW, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 500}
    light = light_over(make("bert", **sizes), **UNEVEN)
    export_model(light, tmp_path, form, dtype=dtype)
    model = whole(light)
    apart = difference(model, tmp_path, form, inputs_for(model))
    assert CLOSE / 10 < apart < {"f16": 0.01, "int8": 0.15}[dtype]
    written = sum(file.stat().st_size for file in tmp_path.iterdir() if file.suffix in (".data", ".bin"))
    in_32_bits = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert written < {"f16": 0.55, "int8": 0.4}[dtype] * in_32_bits


@thorough
def test_a_real_model(minilm: Path, tmp_path: Path) -> None:
    """MiniLM with a real tokenizer: texts in, labels out."""
    base = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    light = light_over(base, **UNEVEN)
    model = whole(light)
    texts = [("a moving film", "and a long one, with a twist"), ("dull", "never again")]
    inputs = dict(tokenizer(*map(list, zip(*texts, strict=True)), padding=True, return_tensors="pt"))
    assert "token_type_ids" in inputs
    for form in RUNTIMES:
        export_model(light, tmp_path / form, form, tokenizer)
        assert difference(model, tmp_path / form, form, inputs) < CLOSE
        of_one = {**inputs, "token_type_ids": torch.zeros_like(inputs["token_type_ids"])}
        theirs = sessions.load(form, tmp_path / form)
        assert not theirs.run(of_one)["logits"].equal(theirs.run(inputs)["logits"]), "types of tokens are read"


# -- what is in the folder ---------------------------------------------------------------------------------------------


def write_empty(patch: pytest.MonkeyPatch) -> None:
    """From here on files of graphs are empty, which takes no tracing."""
    patch.setattr(Runtime, "write", lambda self, model, inputs, folder, dtype: (folder / self.file).touch())


@pytest.mark.parametrize(
    ("family", "task", "form"),
    [("bert", "classification", "onnx"), pytest.param("llama", "causal-lm", "openvino", marks=thorough)],
)
def test_export(
    family: str,
    task: str,
    form: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Workbench(tmp_path, family, task)
    run = bench.config("run")
    pipeline.run(run)
    capsys.readouterr()
    out = tmp_path / "out"
    assert lightpeft("export", run.output, out, "--form", form) == 0
    said = capsys.readouterr()
    assert "(f32)" in said.out.replace("\n", " ")
    assert "torch.onnx" not in said.out and not said.err, said.err
    files = {path.name for path in out.iterdir()}
    assert {RUNTIMES[form].file, "config.json", "export.json", "README.md", "tokenizer.json"} <= files
    assert RUNTIMES[form].use in (out / "README.md").read_text(encoding="utf-8")
    tokenizer, config = AutoTokenizer.from_pretrained(out), AutoConfig.from_pretrained(out)
    if task == "classification":
        inputs = tokenizer(["word1 good1", "bad1 bad2 word3"], padding=True, return_tensors="pt")
        logits = ExportedModel.from_pretrained(out)(**inputs).logits
        assert set(config.id2label.values()) == {"positive", "negative"} and logits.shape == (2, 2)
    assert "measured.json" not in files and "test rows" not in said.out
    before = checksums(out)
    assert lightpeft("export", run.output, out, "--form", form) == 2
    assert "--overwrite" in capsys.readouterr().err and checksums(out) == before
    assert lightpeft("export", run.output, tmp_path / "no", "--form", form, "--dtype", "q8_0") == 2
    assert "dtype q8_0 is not supported by form " in capsys.readouterr().err
    write_empty(monkeypatch)
    assert lightpeft("export", run.output, out, "--form", form, "--overwrite", "--dtype", "int8") == 0
    assert checksums(out) != before and "(int8)" in capsys.readouterr().out.replace("\n", " ")


# -- what a graph in int8 is worth -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """With a finished run of its settings."""
    bench = Workbench(tmp_path_factory.mktemp("finished"))
    pipeline.run(bench.config("run"))
    return bench


@telling("form", RUNTIMES, ["onnx"])
def test_int8_is_measured(
    form: str, finished: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "TIMED_ROWS", 16)
    run, out, threads = finished.folder / "run", tmp_path / "out", torch.get_num_threads()
    assert lightpeft("export", run, out, "--form", form, "--dtype", "int8") == 0
    said = capsys.readouterr()
    found, own = read_json(out / "measured.json"), read_json(run / "metrics.json")["metrics"]
    assert (found["dtype"], found["runtime"], found["main_metric"]) == ("int8", RUNTIMES[form].title, "accuracy")
    assert found["run"] == own and found["metrics"].keys() == own.keys() and found["metrics"]["examples"] == 40
    assert abs(found["metrics"]["accuracy"] - answered(out, form)) < 1e-6
    assert found["timed"] == 16 and all(each["n"] == 5 for each in found["milliseconds"].values())
    medians = {name: each["median"] for name, each in found["milliseconds"].items()}
    assert medians["graph"] > 0 and medians["dense"] > 0
    lines = [f"accuracy {found['metrics']['accuracy']:.4f} on 40 test rows (run: {own['accuracy']:.4f})"]
    lines += [f"{medians['graph']:.2f} ms (", f"float32 {medians['dense']:.2f} ms (", "speedup "]
    assert all(line in said.out for line in lines), said.out
    assert torch.get_num_threads() == threads


def answered(folder: Path, form: str) -> float:
    """Accuracy of a graph, by the tokenizer and the names of the labels beside it."""
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    session, right = sessions.load(form, folder, exact=False), 0
    rows = labeled(40, seed=2)
    for row in rows:
        logits = session.run(dict(tokenizer([row["text"]], return_tensors="pt")))["logits"]
        right += config.id2label[int(logits.argmax())] == row["label"]
    return right / len(rows)


def test_what_int8_costs_is_said(
    finished: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a graph that always answers the other class, and not of one that is always right."""
    write_empty(monkeypatch)
    monkeypatch.setattr(measuring, "TIMED_ROWS", 2)
    run, right = finished.folder / "run", [row["label"] == "positive" for row in labeled(40, seed=2)]
    own = read_json(run / "metrics.json")["metrics"]["accuracy"]

    class Told(sessions.Session):
        def __init__(self, wrong: bool) -> None:
            self.answers = itertools.cycle([int(label) ^ wrong for label in right])

        def run(self, inputs: Any) -> dict[str, Tensor]:
            return {"logits": torch.eye(2)[[next(self.answers)]]}

    monkeypatch.setattr(sessions, "load", lambda *given, **settings: Told(wrong=True))
    assert lightpeft("export", run, tmp_path / "out", "--form", "onnx", "--dtype", "int8") == 0
    assert f"warning: int8 loses {100 * own:.1f} points of accuracy on 40 test rows" in capsys.readouterr().err
    monkeypatch.setattr(sessions, "load", lambda *given, **settings: Told(wrong=False))
    better = measuring.measure_graph(find_light(run), RUNTIMES["onnx"], tmp_path, "int8")
    assert better.metrics["accuracy"] == 1 and not list(better.doubts())


@contextmanager
def rows_of_test(bench: Workbench, rows: Rows | None) -> Iterator[None]:
    """Other test rows, or none, while the block runs."""
    kept = bench.test.read_bytes()
    bench.test.unlink() if rows is None else write_rows(bench.test, rows)
    try:
        yield
    finally:
        bench.test.write_bytes(kept)


def test_an_export_whose_data_are_gone_is_there_all_the_same(
    finished: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_empty(monkeypatch)
    with rows_of_test(finished, None):
        assert lightpeft("export", finished.folder / "run", tmp_path, "--form", "onnx", "--dtype", "int8") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the export was not measured: " in line]
    assert "does not exist" in line
    assert (tmp_path / "model.onnx").is_file() and not (tmp_path / "measured.json").exists()


def test_what_is_not_measured(finished: Workbench, tmp_path: Path) -> None:
    run, writer = finished.folder / "run", Workbench(tmp_path, "llama", "causal-lm")
    pipeline.run(writer.config("run"))

    def reason(model: Path, **settings: Any) -> str:
        found = find_light(model, None, settings)
        return refusal(lambda: measuring.measure_graph(found, RUNTIMES["onnx"], tmp_path, "int8"))

    assert "adapter is not the folder of a run" in reason(run / "adapter")
    assert "causal-lm uses the language-modeling head" in reason(writer.folder / "run")
    assert "set model.low_memory to false" in reason(run, low_memory=True)
    with rows_of_test(finished, labeled(30, seed=2)):
        assert "the run was measured on 40 test rows, but its data now have 30" in reason(run)
    assert "does not run in ONNX Runtime" in reason(run), "there is no graph"
    assert not (tmp_path / "measured.json").exists()


def test_the_command_line_knows_every_form_and_data_type() -> None:
    options = {option.name: option for option in EXPORT.options}
    assert get_args(options["--form"].type) == tuple(EXPORTS) and get_args(options["--dtype"].type) == DTYPES
    for name, runtime in RUNTIMES.items():
        assert EXPORTS[name].dtypes == tuple(runtime.writers)


# -- what is refused ---------------------------------------------------------------------------------------------------


def by_length() -> LightModel:
    """Rotary embeddings that are computed anew from the length of a text, which a trace cannot follow."""
    return light_over(make("llama-gqa", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))


def with_adapters() -> LightModel:
    model = adapted(make("bert"))
    plan = plan_for(model)
    apply_plan(model, plan)
    return as_light(model, plan)


def quantized() -> Any:
    light = light_over(make("bert", **SHALLOW))
    light.get_base_model().config.quantization_config = {}
    return light


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (lambda: light_over(make("t5")), {}, "does not support encoder-decoders such as t5; use form merged"),
        (lambda: light_over(make("mixtral")), {}, "does not support routed experts, which this mixtral has"),
        (lambda: light_over(make("vit")), {}, "a model that reads text, and vit does not"),
        (by_length, {}, "cannot be traced for ONNX Runtime; export it as merged"),
        (with_adapters, {}, "cannot be merged"),
        (quantized, {}, "the base is quantized"),
        (
            lambda: light_over(make("bert")),
            {"dtype": "q8_0"},
            "dtype q8_0 is not supported by form onnx; choose f32 or int8",
        ),
        (
            lambda: light_over(make("bert")),
            {"dtype": "int3"},
            "dtype int3 is not supported by form onnx; choose f32 or int8",
        ),
        (lambda: light_over(make("bert")), {"form": "onxx"}, 'export form "onxx" does not exist; choose one of merged'),
        (lambda: light_over(make("bert")), {"form": "peft"}, "use full_width(light)"),
    ],
)
def test_refusals(model: Callable[[], Any], settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    chosen = {"form": "onnx", **settings}
    assert reason in refusal(lambda: export_model(model(), tmp_path / "out", **chosen))
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light = light_over(make("bert"))
    for package, form, dtype in (
        ("onnxscript", "onnx", "f32"),
        ("onnxruntime", "onnx", "int8"),
        ("openvino", "openvino", "f32"),
        ("nncf", "openvino", "int8"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            line = refusal(lambda: export_model(light, tmp_path / "out", form, dtype=dtype))  # noqa: B023
        assert package in line and f'pip install "lightpeft[{form}]"' in line
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers.exporters", None)
        assert "needs transformers 5.24 or newer" in refusal(lambda: export_model(light, tmp_path / "out", "onnx"))
    assert not (tmp_path / "out").exists()
