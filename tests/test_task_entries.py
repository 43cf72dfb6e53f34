"""Every task that ships, end to end: rows in the hub's columns, a tiny encoder and a tiny decoder, official metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import telling
from layouts import LAYOUTS, TELLING, WORDS, evaluate, write_task
from lights import nested
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lightpeft.adapters.light_adapter import load_light
from lightpeft.app.runs import pipeline
from lightpeft.app.tasks.entries.task_entries import ENTRIES
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.multiple_choice import MultipleChoiceByLikelihood, MultipleChoiceTask
from lightpeft.app.tasks.kinds.regression import RegressionTask
from lightpeft.app.tasks.kinds.task_kinds import BY_LIKELIHOOD
from lightpeft.app.tasks.loading import restore_task
from lightpeft.config import RunConfig, run_config_from_dict

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PROMPT_WORDS = ("Question", "Answer", "True", "False", "Neither", "yes", "no", "negative", "positive", "because", "it")
VOCABULARY = [*SPECIAL, *WORDS, *TELLING, *PROMPT_WORDS, *".:?*_-", *(f"Name{number}" for number in range(9))]
SIZES: dict[str, Any] = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 96}

ONE_ACCURACY = {"accuracy"}
METRICS: dict[str, set[str]] = {
    "cola": {"matthews", "accuracy"},
    "mrpc": {"accuracy", "f1"},
    "stsb": {"pearson", "spearman"},
    "qqp": {"accuracy", "f1"},
    "mnli": {"accuracy", "mismatched_accuracy", "mismatched_loss", "mismatched_examples"},
    "cb": {"accuracy", "f1_macro"},
    "multirc": {"f1a", "exact_match"},
    "record": {"f1", "exact_match"},
    "squad": {"f1", "exact_match"},
    "squad_v2": {f"{part}{name}" for part in ("", "has_answer_", "no_answer_") for name in ("f1", "exact_match")},
    "web_questions": {"f1", "exact_match"},
}
"""What is reported beside the loss and the number of examples; where nothing is said, the accuracy."""
RULES = {"accuracy", "accuracy_norm"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny BERT and a tiny Llama, each with a tokenizer of one token a word."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    found: dict[str, PreTrainedModel] = {
        "bert": BertModel(BertConfig(**SIZES)),
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, **tokens)),
    }
    for family, model in found.items():
        model.save_pretrained(folder / family)
        word_tokenizer(family).save_pretrained(folder / family)
    return {family: folder / family for family in found}


def word_tokenizer(family: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = (
        ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1") if family == "bert" else ("[CLS] $A", "[CLS] $A $B")
    )
    ids = [(token, VOCABULARY.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    names = (
        {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        if family == "bert"
        else {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **names)


def config_for(base: Path, output: Path, data: dict[str, Any], **settings: Any) -> RunConfig:
    """A run of one or two steps."""
    return run_config_from_dict(
        {
            "output": str(output),
            "method": "plain",
            "model": {"name": str(base)},
            "data": {"max_length": 96, **data},
            "peft": {"r": 2, "lora_alpha": 4},
            "training": {"epochs": 1, "batch_size": 18, "learning_rate": 1e-2, "prefix_cache": "off"},
            **settings,
        }
    )


def test_every_entry_has_a_layout() -> None:
    assert set(LAYOUTS) == set(ENTRIES)


@pytest.mark.parametrize("family", ["bert", "llama"])
@telling("task", ENTRIES, {"sst2", "stsb", "mnli", "multirc", "record", "piqa", "squad_v2", "web_questions"})
def test_from_the_hubs_columns_to_the_official_metric(
    bases: dict[str, Path], tmp_path: Path, task: str, family: str
) -> None:
    kind = ENTRIES[task].kind
    if kind == "generation" and family == "bert":
        pytest.skip("an encoder writes no texts")
    data = {"task": task, "path": str(write_task(tmp_path / "data", task))}
    by_likelihood = family == "llama" and kind in BY_LIKELIHOOD
    if by_likelihood:
        data["answer"] = "likelihood"
    report = pipeline.run(config_for(bases[family], tmp_path / "run", data))
    expected = METRICS.get(task, ONE_ACCURACY) | {"examples"} | ({"loss"} if kind != "generation" else set())
    if by_likelihood:
        expected |= RULES
        expected |= {f"mismatched_{name}" for name in RULES} if task == "mnli" else set()
    assert set(report["metrics"]) == expected
    assert report["metrics"]["examples"] == 15
    assert next(iter(report["metrics"])) == report["main_metric"]
    assert all(value == value for value in report["metrics"].values())  # no NaN


@pytest.mark.parametrize(
    ("task", "family", "answer"),
    [("socialiqa", "bert", "head"), ("rte", "llama", "likelihood"), ("winogrande", "llama", "likelihood")],
)
def test_what_can_be_learned_is_learned(
    bases: dict[str, Path], tmp_path: Path, task: str, family: str, answer: str
) -> None:
    path = str(write_task(tmp_path / "data", task, train=160, test=40))
    training = {"epochs": 8, "batch_size": 16, "learning_rate": 1e-2}
    data = {"task": task, "path": path, "answer": answer}
    report = pipeline.run(config_for(bases[family], tmp_path / "run", data, method="full", training=training))
    assert report["metrics"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("task", "family", "kind"),
    [
        ("socialiqa", "bert", MultipleChoiceTask),
        ("arc_easy", "bert", MultipleChoiceTask),
        ("socialiqa", "llama", MultipleChoiceByLikelihood),
        ("stsb", "llama", RegressionTask),
    ],
)
def test_a_light_run_and_what_its_adapter_says(
    bases: dict[str, Path], tmp_path: Path, task: str, family: str, kind: type[Task]
) -> None:
    data = {"task": task, "path": str(write_task(tmp_path / "data", task))}
    light = nested(length=2, heads=0.5, neurons=0.5, modules=0.5)
    training = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2}
    config = config_for(bases[family], tmp_path / "run", data, method="light", light=light, training=training)
    work = pipeline.prepare(config)
    report = pipeline.run(config)
    assert report["parameters"]["base_removed_ratio"] > 0.05
    model = load_light(tmp_path / "run" / "adapter")
    restored = restore_task(model.light_task)
    assert type(restored) is type(work.task) is kind
    assert (restored.entry, restored.labels, restored.main_metric) == (
        work.task.entry,
        work.task.labels,
        report["main_metric"],
    )
    notes = [entry.get("note", "") for entry in work.run.log_entries()]
    assert not any("truncated to data.max_length" in note for note in notes)
    again = evaluate(model, work.test_rows, restored, restored.collator(work.tokenizer), 5)
    assert again == pytest.approx(report["metrics"], rel=1e-4, abs=1e-6)


def test_a_run_says_so_where_its_rows_are_cut(bases: dict[str, Path], tmp_path: Path) -> None:
    data = {"task": "rte", "path": str(write_task(tmp_path / "data", "rte")), "max_length": 8}
    config = config_for(bases["bert"], tmp_path / "run", data)
    work = pipeline.prepare(config)
    pipeline.train(work)
    note = "100% of the training rows are truncated to data.max_length: 8 tokens"
    assert [entry["note"] for entry in work.run.log_entries() if "note" in entry] == [note]
