"""What people do with a transformers model: auto classes, pipelines, streamers, on light and on merged models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import CLOSE, light_over, logits
from peft import PeftModel
from tiny import DROPPED, make, refusal, relative_difference
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)
from transformers.utils import logging
from workbench import save_base

from lightpeft import LightModel, load_light, load_merged, save_merged

TEXT = "word1 good2 word3"


class Made:
    """A base with a tokenizer, a light adapter over it, and the same merged."""

    def __init__(self, folder: Path, family: str, auto: Any, **budget: Any) -> None:
        self.folder, self.auto = folder, auto
        save_base(folder / "base", family)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        light = light_over(auto.from_pretrained(folder / "base"), **budget)
        light.save_pretrained(folder / "light")
        assert not save_merged(light, folder / "merged", self.tokenizer), "layers are not equally wide"

    def light(self) -> LightModel:
        return load_light(self.folder / "light")

    def merged(self) -> PreTrainedModel:
        return load_merged(self.folder / "merged")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("classifier"), "bert", AutoModelForSequenceClassification)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("writer"), "llama", AutoModelForCausalLM)


def scores(model: PreTrainedModel | PeftModel, made: Made) -> torch.Tensor:
    with torch.no_grad():
        return model(**made.tokenizer(TEXT, return_tensors="pt")).logits.softmax(-1)[0]


@contextmanager
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Lets pytest see what transformers logs."""
    logging.enable_propagation()
    caplog.clear()
    yield
    logging.disable_propagation()


# -- pipelines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["light", "merged", "folder"])
def test_a_pipeline_that_classifies(form: str, classifier: Made, caplog: pytest.LogCaptureFixture) -> None:
    model = str(classifier.folder / "merged") if form == "folder" else getattr(classifier, form)()
    options: dict[str, Any] = {} if form == "folder" else {"tokenizer": classifier.tokenizer}
    with heard(caplog):
        pipe = pipeline("text-classification", model=model, top_k=None, **options)
        found = {each["label"]: each["score"] for each in pipe([TEXT])[0]}
    expected = scores(classifier.light(), classifier)
    assert [found["LABEL_0"], found["LABEL_1"]] == pytest.approx(expected.tolist(), rel=1e-4)
    assert not caplog.records, "no word about models that are not supported"
    assert len(pipe([TEXT, "bad1"], batch_size=2)) == 2 and pipe.device == pipe.model.device


@pytest.mark.parametrize("form", ["light", "merged", "folder"])
def test_a_pipeline_that_writes(form: str, writer: Made, caplog: pytest.LogCaptureFixture) -> None:
    model = str(writer.folder / "merged") if form == "folder" else getattr(writer, form)()
    options: dict[str, Any] = {} if form == "folder" else {"tokenizer": writer.tokenizer}
    greedy: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    new: dict[str, Any] = {**greedy, "return_full_text": False}
    with heard(caplog):
        pipe = pipeline("text-generation", model=model, **options)
        texts = [each[0]["generated_text"] for each in pipe([TEXT, "bad1"], batch_size=1, **new)]
    assert not [record for record in caplog.records if "not supported" in record.getMessage()]
    tokens = writer.tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)
    expected = writer.light().generate(**tokens, **greedy)[0, tokens["input_ids"].shape[1] :]
    assert texts[0] == writer.tokenizer.decode(expected, skip_special_tokens=True)
    assert pipe.device == pipe.model.device


# -- auto classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{}, DROPPED], ids=["narrower", "without sub-layers"])
@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("bert", AutoModelForSequenceClassification),
        ("llama-gqa", AutoModelForCausalLM),
        ("t5", transformers.AutoModelForSeq2SeqLM),
        ("whisper", transformers.AutoModelForSpeechSeq2Seq),
        ("vit", transformers.AutoModelForImageClassification),
    ],
)
def test_auto_classes_read_merged_models(name: str, auto: Any, budget: dict[str, Any], tmp_path: Path) -> None:
    light = light_over(make(name), **budget)
    save_merged(light, tmp_path / "merged")
    loaded = auto.from_pretrained(tmp_path / "merged")
    assert type(loaded) is type(make(name)) and loaded.light_plan == light.light_plan
    assert relative_difference(logits(loaded), logits(light)) < CLOSE


def test_options_of_auto_classes(classifier: Made) -> None:
    merged, auto = classifier.folder / "merged", AutoModelForSequenceClassification
    loaded = auto.from_pretrained(merged, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16 and loaded.device.type == "cpu"
    assert auto.from_pretrained(merged, device_map={"": "cpu"}, trust_remote_code=True).light_plan
    for options, said in (
        ({"num_labels": 3}, "does not support id2label, label2id; leave that out"),
        ({"quantization_config": object()}, "does not support quantization_config"),
        ({"device_map": {"bert": "cpu", "classifier": "cpu"}}, "a device_map with several devices; use one device"),
    ):
        assert said in refusal(lambda options=options: auto.from_pretrained(merged, **options))
    for other in (AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering):
        said = refusal(lambda other=other: other.from_pretrained(merged))
        assert said == (
            f"{merged} is a BertForSequenceClassification, which {other.__name__} does not load; "
            "use lightpeft.load_merged"
        )


def test_without_lightpeft_there_is_one_line(classifier: Made) -> None:
    program = "import sys, transformers\n"
    for call in ("AutoModelForSequenceClassification.from_pretrained(", "pipeline('text-classification', "):
        program += f"try: transformers.{call}sys.argv[1])\n"
        program += "except ValueError as error: print(str(error).splitlines()[0])\n"
    command = [sys.executable, "-c", program, str(classifier.folder / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("load it with lightpeft.load_merged(folder)") == 2
