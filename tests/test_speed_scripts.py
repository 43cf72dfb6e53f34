"""The benchmark scripts that measure time and memory, end to end on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_speed
import gpu
import inference
import needs
import pytest
import serving
import sft
import steps
import torch
import vllm_engine
import vllm_speed
import workbench
import writers
from benchmarking import place, readme_with, short_run
from lanes import thorough
from transformers import AutoModelForCausalLM
from workbench import Workbench, forked, read, save_base, tokenizer_of_bytes

from lightpeft.adapters.merging import load_merged
from lightpeft.app.runs import pipeline

pytestmark = thorough
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def forking() -> Any:
    with forked():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def config(bench: Workbench) -> Path:
    return short_run(bench)


# -- steps.py, inference.py --------------------------------------------------------------------------------------------


def test_subjects_of_a_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, out = readme_with(place("steps tiny"), tmp_path, monkeypatch), tmp_path / "out.json"
    monkeypatch.chdir(tmp_path)
    words = (str(config), "--rounds", "1", "--steps", "1", "--out", str(out), "--write-readme")
    assert steps.main(list(words)) == 0
    results = read(out)
    assert read(tmp_path / "tiny.steps.json") == results
    first, *others = results["memory_bytes"]
    assert others
    for subject in (first, *others):
        assert len(results["values"][subject]) == 1
        assert results["samples_per_second"][subject]["median"] > 0
        assert f"| {subject} |" in readme.read_text()
    assert results["time_ratio"][first]["median"] == 1
    capsys.readouterr()
    assert steps.main([str(tmp_path / "missing.yaml"), "--steps", "0"]) == 2
    assert capsys.readouterr().err == "steps: --steps is 0; give at least 1\n"
    assert steps.main([str(tmp_path / "missing.yaml")]) == 2
    assert "steps: config file" in capsys.readouterr().err


# -- needs.py ----------------------------------------------------------------------------------------------------------


def test_needs(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "needs.json"
    assert needs.main([str(config), "--steps", "2", "--out", str(out)]) == 0
    (stages,) = read(out)["results"].values()
    assert list(stages) == ["plain", "estimate", "train"]
    assert stages["plain"]["said_flops"] == stages["plain"]["measured_flops"] > 0
    assert all(stage["measured_bytes"] > 0 for stage in stages.values())
    assert "tiny, estimate" in capsys.readouterr().out
    assert needs.main([str(tmp_path / "missing.yaml")]) == 2
    assert needs.main([str(config), "--steps", "2", "--dense", "--out", str(out)]) == 0
    (stages,) = read(out)["results"].values()
    assert list(stages) == ["plain", "estimate"] and stages["plain"]["measured_bytes"] > 0


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_inference(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path / "bench", family)
    monkeypatch.chdir(tmp_path)
    config = bench.yaml("tiny", **{"training.epochs": 1, "light.preset": "paper"})
    assert inference.main([str(config), "--rounds", "2", "--steps", "1", "--out", str(tmp_path / "out.json")]) == 0
    results = read(tmp_path / "out.json")
    for size in ("1", "32"):
        assert list(results["values"][size]) == list(inference.KINDS)
        assert results["speed_ratio"][size]["plain, merged"]["median"] == 1
        assert all(speed["median"] > 0 for speed in results["samples_per_second"][size].values())
    caches = results["kv_cache_bytes_per_token"]
    assert (set(caches.values()) == {None}) == (family == "bert")
    assert family == "bert" or caches["light, merged"] < caches["plain, merged"] == caches["plain, unmerged"]


# -- gguf_speed.py -----------------------------------------------------------------------------------------------------


def test_gguf_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path, "llama", "causal-lm")
    monkeypatch.setattr(workbench, "POSITIONS", 128)
    texts = bench.train.read_text(encoding="utf-8").splitlines()
    save_base(bench.base, "llama", tokenizer=tokenizer_of_bytes(texts=texts))
    light, plain = (
        bench.config(name, **{"method": name, "data.max_length": 128, "light.remove.heads": 0.5, "training.epochs": 1})
        for name in ("light", "plain")
    )
    pipeline.run(light)
    out = tmp_path / "out.json"
    sizes = ["--rows", "3", "--tokens", "5", "--types", "f32", "q8_0"]
    assert gguf_speed.main([light.output, *sizes, "--out", str(out)]) == 0
    found = read(out)["results"][light.output]["types"]
    assert found["f32"]["same_texts"] == found["f32"]["texts"] == 3
    for each in found.values():
        assert each["file_bytes"]["light"] < each["file_bytes"]["dense"]
        assert all(speed > 0 for speeds in each["values"].values() for speed in speeds)
    pipeline.run(plain)
    assert gguf_speed.main([plain.output]) == 2
    assert "has no light model" in capsys.readouterr().err


# -- vllm_speed.py -----------------------------------------------------------------------------------------------------


class Asked:
    """What stands in for vLLM's process: PyTorch."""

    version = "0"

    def __init__(self, python: str, log: Any) -> None:
        assert python == "python of vLLM"

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, model: Path, prompts: list[list[int]], tokens: int, **options: Any) -> Any:
        assert options["enable_prefix_caching"] is False and options["max_model_len"] >= max(map(len, prompts)) + tokens
        whole = load_merged(model) if model.name == "light" else AutoModelForCausalLM.from_pretrained(model)
        return vllm_engine.Written([gguf_speed.continued(whole.float(), each, tokens) for each in prompts], 0.5)


def test_vllm_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path, "llama", "causal-lm")
    changes = {"light.remove.heads": 0.5, "training.epochs": 1}
    light, plain = (bench.config(name, method=name, **changes) for name in ("light", "plain"))
    for config in (light, plain):
        pipeline.run(config)
    monkeypatch.setattr(vllm_speed, "Vllm", Asked)
    sizes = ["--rows", "5", "--tokens", "4", "--rounds", "2"]
    monkeypatch.delenv(vllm_engine.PYTHON, raising=False)
    assert vllm_speed.main([light.output, *sizes]) == 2
    assert "does not say which Python has vLLM" in capsys.readouterr().err
    monkeypatch.setenv(vllm_engine.PYTHON, "python of vLLM")
    out = tmp_path / "out.json"
    assert vllm_speed.main([light.output, *sizes, "--out", str(out)]) == 0
    found = read(out)["results"][light.output]
    assert found["same_texts"] == found["texts"] == 5
    assert found["bytes"]["light"] < found["bytes"]["dense"]
    assert found["tokens_per_second"] == {
        "all at once": {"light": [40.0] * 2, "dense": [40.0] * 2},
        "one after another": {"light": [8.0] * 2, "dense": [8.0] * 2},
    }
    assert vllm_speed.main([plain.output, *sizes]) == 2
    assert "has no light model" in capsys.readouterr().err

    def refused(*_: Any, **__: Any) -> None:
        raise vllm_engine.Refused("it does not like it")

    monkeypatch.setattr(Asked, "ask", refused)
    assert vllm_speed.main([light.output, *sizes]) == 2
    assert "vLLM does not serve this: it does not like it" in capsys.readouterr().err


# -- serving.py --------------------------------------------------------------------------------------------------------


def test_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path)
    light, plain = (bench.config(name, method=name) for name in ("light", "plain"))
    pipeline.run(light)
    ways = {name: serving.WAYS[name] for name in ("PyTorch, f32", "ONNX Runtime, f32")}
    monkeypatch.setattr(serving, "WAYS", ways)
    out = tmp_path / "out.json"
    sizes = ["--rounds", "2", "--batches", "2"]
    assert serving.main([light.output, *sizes, "--out", str(out)]) == 0
    found = read(out)["results"][light.output]
    assert set(found["same_as_pytorch"].values()) == {found["rows"]} == {40}
    measured = read(Path(light.output) / "metrics.json")["metrics"]["accuracy"]
    assert all(accuracy == pytest.approx(measured) for accuracy in found["accuracy"].values())
    for size in ("1", "32"):
        assert found["over_pytorch"][size]["PyTorch, f32"]["median"] == 1
        assert all(len(values) == 2 and min(values) > 0 for values in found["values"][size].values())
    assert found["bytes"]["ONNX Runtime, f32"]["light"] < found["bytes"]["ONNX Runtime, f32"]["dense"]
    assert "| ONNX Runtime, f32 |" in capsys.readouterr().out
    assert serving.main([light.output, "--batches", "0"]) == 2
    assert capsys.readouterr().err == "serving: --batches is 0; give at least 1\n"
    pipeline.run(plain)
    assert serving.main([plain.output]) == 2
    assert "has no light model" in capsys.readouterr().err


# -- writers.py --------------------------------------------------------------------------------------------------------


def test_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path / "bench", "llama", "causal-lm")
    monkeypatch.chdir(tmp_path)
    light = {"light.after.keep": "full", "light.remove.head_unit": "group"}  # has few heads
    config = bench.yaml("tiny", **light, **{"training.epochs": 1})
    assert writers.main([str(config), "--rounds", "2", "--steps", "1", "--out", str(tmp_path / "out.json")]) == 0
    results = read(tmp_path / "out.json")
    weights = list(results["weights_bytes"].values())
    assert weights[-1] < weights[-2] < weights[-3] < weights[2], "the more is cut, the less there is"
    assert set(results["values"]) == set(results["memory_bytes"])
    assert results["run_time_ratio"][writers.PLAIN][0]["median"] == 1
    assert all(sum(share.values()) == pytest.approx(1) for share in results["shares"].values())


# -- sft.py ------------------------------------------------------------------------------------------------------------


def test_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms train on the same batches: their losses agree where their modules do."""
    bench = Workbench(tmp_path / "bench", "llama", "causal-lm")
    monkeypatch.chdir(tmp_path)
    config = bench.yaml("tiny", **{"peft.lora_dropout": 0.0})
    words = [str(config), "--rounds", "1", "--steps", "1", "--out", str(tmp_path / "out.json")]
    assert sft.main(words) == 0
    found = read(tmp_path / "out.json")["results"]
    assert set(found["seconds_per_step"]) == set(found["memory_bytes"]) == set(sft.ARMS)
    everywhere = [loss for name, loss in found["loss"].items() if sft.ARMS[name].everywhere]
    elsewhere = [loss for name, loss in found["loss"].items() if not sft.ARMS[name].everywhere]
    assert everywhere == pytest.approx([everywhere[0]] * len(everywhere), rel=2e-3)
    assert elsewhere == pytest.approx([elsewhere[0]] * len(elsewhere), rel=2e-3)
    assert everywhere[0] != pytest.approx(elsewhere[0], rel=1e-4)


# -- gpu.py ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_ends_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "none")]) == 0
    error = capsys.readouterr().err
    assert error.startswith("gpu: no CUDA device")
    assert error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_gpu_measures_tiny_shapes_on_the_cpu(tmp_path: Path) -> None:
    sizes = ("--batch", "2", "--length", "12", "--rounds", "1", "--steps", "1")
    assert gpu.main(["--device", "cpu", "--shapes", "roberta-tiny", "llama-tiny", *sizes, "--out", str(tmp_path)]) == 0
    results = read(tmp_path / "gpu.results.json")
    assert [result["case"]["shape"]["name"] for result in results["shapes"]] == ["roberta-tiny", "llama-tiny"]
    for result in results["shapes"]:
        assert set(result["subjects"]) == {"plain", "estimation", "light"}
        flops = {name: subject["flops"]["training"] for name, subject in result["subjects"].items()}
        assert flops["light"] < flops["plain"] < flops["estimation"]
        assert result["subjects"]["estimation"]["inference_seconds"] is None
        assert result["ideal"]["inference"] > 1
    assert (tmp_path / "gpu.md").read_text().count("| llama-tiny |") == 3
    assert results["quality"] == {}


def test_gpu_says_the_quality_beside_the_speed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And goes on where one of two cannot be measured."""
    sizes = ("--device", "cpu", "--shapes", "--limit", "32", "--out", str(tmp_path))
    assert gpu.main(list(sizes)) == 2
    assert capsys.readouterr().err == "gpu: nothing to measure; give --shapes, --quality or both\n"
    missing = str(tmp_path / "none.yaml")
    assert gpu.main([*sizes, "--quality", missing]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err and not (tmp_path / "gpu.md").exists()
    assert gpu.main([*sizes, "--quality", str(config), missing]) == 1
    results = read(tmp_path / "gpu.results.json")
    assert list(results["quality"]) == ["tiny"] and "does not exist" in results["failures"]["none"]
    reports = results["quality"]["tiny"]
    assert {method: report["method"] for method, report in reports.items()} == {"plain": "plain", "light": "light"}
    lines = (tmp_path / "gpu.md").read_text().splitlines()[2:]
    for report, line in zip(reports.values(), lines, strict=True):
        assert report["config"]["training"]["precision"] == "bf16" and report["config"]["training"]["epochs"] == 1
        assert report["config"]["data"]["limit_train"] == 32
        speed = report["training"]["train"]["samples_per_second"]
        assert speed > 0 and f"| accuracy {report['metrics']['accuracy']:.1%} |" in line and f"| {speed:,.0f} |" in line
    assert list(reports["light"]["training"]) == ["estimate", "train"]
