"""Training without padding: rows of a batch in one sequence, kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DECODERS, every_family, make
from transformers import DataCollatorWithFlattening, OPTConfig, OPTForCausalLM
from workbench import POSITIONS, Workbench, lightpeft, read

from lightpeft.app.runs import pipeline
from lightpeft.app.runs.subject import Subject
from lightpeft.errors import LightPeftError
from lightpeft.training.packing import keeps_rows_apart

MIXING = ("opt", "gpt_oss")
"""Families whose own masks or positions transformers does not tell where a row begins."""


@every_family(DECODERS)
@torch.no_grad()
def test_the_trial_finds_models_that_keep_rows_apart(name: str) -> None:
    model = make(name).eval()
    rows = [{"input_ids": list(range(3, 3 + length)), "labels": [1] * length} for length in (9, 5, 12)]
    flat = model(**DataCollatorWithFlattening()(rows), use_cache=False).logits[0]
    alone = [model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0] for row in rows]
    apart = torch.allclose(flat, torch.cat(alone), rtol=1e-3, atol=1e-3)
    assert apart == (name not in MIXING)
    model.train()
    assert keeps_rows_apart(model) == apart and model.training


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("packing"), "llama", "causal-lm")


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_a_run_learns_as_with_padding(bench: Workbench) -> None:
    """In float32: the same losses, scores, plan and answers."""
    every: dict[str, Any] = {"trainer.logging_steps": 1, "peft": {"lora_dropout": 0.0}}
    for name, free in (("padded", False), ("free", True)):
        pipeline.run(bench.config(name, **every, **{"training.padding_free": free}))
    padded, free = bench.folder / "padded", bench.folder / "free"
    assert len(losses(padded)) > 8
    assert losses(free) == pytest.approx(losses(padded), rel=1e-3)
    assert read(free / "plan.json")["blocks"] == read(padded / "plan.json")["blocks"]
    assert read(free / "metrics.json")["metrics"]["loss"] == pytest.approx(
        read(padded / "metrics.json")["metrics"]["loss"], rel=1e-3
    )


def test_bench_and_check_take_steps_without_padding(bench: Workbench) -> None:
    free = {"training.padding_free": True}
    assert lightpeft("check", "--config", bench.yaml("checked", **free)) == 0
    subject = Subject("plain", bench.config("measured", **free), steps=2)
    for padded, flat in zip(subject.batches, subject.training_batches, strict=True):
        assert flat["input_ids"].shape == (1, int(padded["attention_mask"].sum())) and len(padded["input_ids"]) == 8
    assert subject.training() > 0 and subject.inference() > 0


def test_a_task_with_a_head_is_refused(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    with pytest.raises(LightPeftError, match="padding_free: task classification has head .*; leave it out, or give"):
        pipeline.run(bench.config("run", **{"training.padding_free": True}))
    assert not (tmp_path / "run").exists()


def test_a_model_that_mixes_rows_is_refused(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, "llama", "causal-lm")
    words = read(bench.base / "config.json")["vocab_size"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    config = OPTConfig(vocab_size=words, max_position_embeddings=POSITIONS, word_embed_proj_dim=32, **sizes)
    OPTForCausalLM(config).save_pretrained(bench.base)
    with pytest.raises(LightPeftError, match=r"padding_free: rows of .* would attend to each other without padding"):
        pipeline.run(bench.config("run", **{"training.padding_free": True}))
    assert not (tmp_path / "run").exists()
