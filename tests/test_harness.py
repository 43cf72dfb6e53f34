"""lm-evaluation-harness on live models, dense and pruned, against the masked model and the model called directly."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import workbench
import yaml
from lanes import thorough
from peft import PeftModel
from tiny import make, masked, plan_for, refusal, with_lora
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lightpeft.app.evaluation.harness import DOCUMENT_MEANS, HarnessScores, run_harness
from lightpeft.prune.surgery import apply_plan

OPTIONS = [["good0 good1", "bad0", "bad3 bad4 bad5"], ["word1", "good4 bad2 word3 good1"], ["bad1", "good5", "word9"]]
ROWS: list[dict[str, Any]] = [
    {
        "question": " ".join(workbench.NEUTRAL[index : index + 3 + index % 4]),
        "options": OPTIONS[index % 3],
        "answer": index % len(OPTIONS[index % 3]),
    }
    for index in range(15)
]
COMMON = {"test_split": "test", "doc_to_text": "{{question}}", "dataset_path": "json"}
TASKS: list[dict[str, Any]] = [
    {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        **COMMON,
    },
    {
        "task": "tiny_text",
        "output_type": "generate_until",
        "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": ["word1"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **COMMON,
    },
    {
        "task": "tiny_perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
        **COMMON,
        "doc_to_text": "",
    },
]
GROUP = {
    "group": "tiny_group",
    "task": ["tiny_choice", "tiny_text"],
    "aggregate_metric_list": [{"metric": "acc", "filter_list": "none"}],
}

pytest.importorskip("lm_eval.tasks")  # not "lm_eval": a folder of benchmarks/ would do


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    base = workbench.save_base(tmp_path_factory.mktemp("harness") / "base", "llama")
    return with_lora(AutoModelForCausalLM.from_pretrained(base))


@pytest.fixture(scope="module")
def tokenizer(model: PeftModel) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model.get_base_model().config.name_or_path)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder of task files over a local JSON file; what is written is right for the model on every third row."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [generated(model, tokenizer, row["question"]) for row in ROWS]
    rows = [
        {**row, "written": text if i % 3 else "other"} for i, (row, text) in enumerate(zip(ROWS, texts, strict=True))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    for task in TASKS:
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, "dataset_kwargs": files}))
    (folder / "group.yaml").write_text(yaml.safe_dump(GROUP))
    return folder


@pytest.fixture(scope="module")
def pruned(model: PeftModel) -> tuple[PeftModel, PeftModel]:
    """The pruned model, and the dense model under the masks that compute the same."""
    light, plan = copy.deepcopy(model), plan_for(model)
    apply_plan(light, plan)
    assert plan.removed_parameters > 0
    return light, masked(model, plan)


@pytest.fixture(scope="module")
def scores(model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Path) -> dict[str, HarnessScores]:
    names = ["tiny_group", "tiny_perplexity"]
    return run_harness(model, tokenizer, names, include_path=tasks, batch_size=4)


def generated(model: PeftModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Six tokens, greedily, up to `word1`."""
    inputs = tokenizer(question, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True).split("word1")[0]


def log_likelihoods(model: PeftModel, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[float]:
    """Of every option behind the question, one at a time without padding."""
    start, values = len(tokenizer(row["question"])["input_ids"]), []
    for option in row["options"]:
        ids = tokenizer(f"{row['question']} {option}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        values.append(sum(float(log_p[place - 1, ids[0, place]]) for place in range(start, ids.shape[1])))
    return values


def right(row: dict[str, Any], values: list[float]) -> float:
    return float(values.index(max(values)) == row["answer"])


def of_documents(scores: HarnessScores, name: str) -> list[float]:
    return DOCUMENT_MEANS.scores(scores.answers)[name].tolist()


def test_likelihoods_are_the_model_s(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, scores: dict[str, HarnessScores]
) -> None:
    expected: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in ROWS:
        values = log_likelihoods(model, tokenizer, row)
        expected["acc"].append(right(row, values))
        lengths = [len(option) for option in row["options"]]
        expected["acc_norm"].append(right(row, [v / n for v, n in zip(values, lengths, strict=True)]))
    found = scores["tiny_choice"]
    for name, values in expected.items():
        assert of_documents(found, name) == values
        assert found.metrics[name] == pytest.approx(sum(values) / 15)
    assert expected["acc"] != expected["acc_norm"]
    assert 0 < found.metrics["acc"] < 1
    assert (found.examples, found.num_fewshot) == (15, 0)


def test_intervals(scores: dict[str, HarnessScores]) -> None:
    for name, metrics in {"tiny_choice": ("acc", "acc_norm"), "tiny_text": ("exact_match",)}.items():
        for metric in metrics:
            low, high = scores[name].intervals[metric] or (1, 0)
            assert 0 <= low < scores[name].metrics[metric] < high <= 1
    perplexity = scores["tiny_perplexity"]
    assert perplexity.metrics["word_perplexity"] > 1
    assert perplexity.answers.predictions[0] == {}  # a perplexity is no mean over documents
    group = scores["tiny_group"]
    assert group.metrics == {"acc": pytest.approx(scores["tiny_choice"].metrics["acc"])}
    low, high = group.intervals["acc"] or (1, 0)
    assert (low + high) / 2 == pytest.approx(group.metrics["acc"])


def test_limit_and_solved_examples(model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Path) -> None:
    found = run_harness(model, tokenizer, ["tiny_choice"], include_path=tasks, limit=4, num_fewshot=1)["tiny_choice"]
    assert (found.examples, found.num_fewshot) == (4, 1)
    assert len(found.answers) == 4
    part = run_harness(model, tokenizer, [str(tasks / "tiny_choice.yaml")], limit=0.2)["tiny_choice"]
    assert (part.examples, part.num_fewshot) == (3, 0)


def test_refusals(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is not a folder" in refusal(lambda: run_harness(model, tokenizer, ["a"], include_path=tasks / "no"))
    assert "--tasks" in refusal(lambda: run_harness(model, tokenizer, []))
    assert "num_fewshot is -1" in refusal(lambda: run_harness(model, tokenizer, ["a"], num_fewshot=-1))
    assert "limit is 0" in refusal(lambda: run_harness(model, tokenizer, ["a"], limit=0))
    classifier = with_lora(make("bert"))
    assert "needs a language model" in refusal(lambda: run_harness(classifier, tokenizer, ["a"]))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'lightpeft[harness]'" in refusal(lambda: run_harness(model, tokenizer, ["tiny_choice"]))


@thorough
def test_a_name_that_nearly_is_one(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """For this, the thousands of task files of the harness are read."""
    assert 'no task "arc_esay"; did you mean arc_easy' in refusal(lambda: run_harness(model, tokenizer, ["arc_esay"]))


def test_shipped_task_files_are_read() -> None:
    from lm_eval.tasks import TaskManager

    folder = Path(__file__).parents[1] / "benchmarks" / "lm_eval"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    assert manager.all_tasks == sorted(path.stem for path in folder.glob("*.yaml"))
