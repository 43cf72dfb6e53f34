"""TRL's `DPOTrainer`: its reference is not masked, goes with the cut, and is no part of a light adapter."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from datasets import Dataset
from lights import light_of
from peft import PeftModel
from tiny import make, refusal, relative_difference, with_lora
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl_settings import SETTINGS, WORDS, logits, tokenizer

from lightpeft import EarlyPruner, load_light
from lightpeft.peft_kinds.sites.live_sites import REFERENCE

trl = pytest.importorskip("trl")

BUDGET: dict[str, Any] = {"length": 4, "heads": 0.5, "neurons": 0.5, "modules": 0.5}


def dpo(model: PeftModel, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Any:
    ref_model = settings.pop("ref_model", None)
    rows = [
        {
            "prompt": " ".join(WORDS[i : i + 2 + i % 3]) + " ",
            "chosen": " ".join(WORDS[i + 5 : i + 8]),
            "rejected": " ".join(WORDS[i + 9 : i + 11]),
        }
        for i in range(32)
    ]
    return trl.DPOTrainer(
        model,
        ref_model=ref_model,
        args=trl.DPOConfig(str(folder), **{**SETTINGS, "max_steps": 16, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


@pytest.fixture
def model(tmp_path: Path) -> PeftModel:
    """LoRA that adds nothing yet, over a base that lies in `tmp_path`."""
    make("llama-gqa", eos_token_id=1).save_pretrained(tmp_path / "base")
    return with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), trained=False, lora_dropout=0.05)


@torch.no_grad()
def reference_logits(model: PeftModel) -> Tensor:
    """What TRL's trainer takes as the answers of its reference."""
    with trl.trainer.utils.use_adapter(model, REFERENCE):
        return logits(model)


def values(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_estimate_prune_and_train_on(model: PeftModel, tmp_path: Path, checkpointing: bool) -> None:
    base = logits(model)
    pruner = EarlyPruner(model, light_of(**BUDGET))
    estimation = dpo(model, tmp_path / "run", pruner.callback(), gradient_checkpointing=checkpointing)
    estimation.train()
    record = pruner.record()
    assert record.meta["steps"] == 4
    assert all(scores.max() > 0 for scores in record.block_scores("neurons", "taylor"))
    assert record.module_scores("ratio").gt(0).all() and record.module_scores("taylor").gt(0).all()
    assert reference_logits(model).equal(base), "the reference of estimation is the base"

    light = pruner.prune()
    handed_over = logits(light)
    assert list(light.peft_config) == ["default"] and light.active_adapter == "default"
    training = dpo(light, tmp_path / "run", gradient_checkpointing=checkpointing)
    assert training.model is light
    training.train()
    assert reference_logits(light).equal(handed_over), "that of training is the light model as it was handed over"
    assert values(training, "loss")[0] == pytest.approx(0.6931, abs=1e-3), "the log of 2: model and reference agree"
    assert mean(values(training, "loss")[-4:]) < 0.65 and mean(values(training, "rewards/margins")[-4:]) > 0.1

    training.save_model(str(tmp_path / "light"))
    assert not (tmp_path / "light" / REFERENCE).exists()
    again = load_light(tmp_path / "light", base=tmp_path / "base")
    assert list(again.peft_config) == ["default"] and logits(again).equal(logits(light))


def test_the_reference_is_not_masked(model: PeftModel, tmp_path: Path) -> None:
    base = logits(model)
    pruner = EarlyPruner(model, light_of(**BUDGET))
    dpo(model, tmp_path / "run")  # adds it
    pruner.start()
    with torch.no_grad():
        pruner.estimator.masks.values.fill_(0.5)
    assert reference_logits(model).equal(base)
    with model.disable_adapter():
        assert logits(model).equal(base)
    assert relative_difference(logits(model), base) > 0.1


def test_a_pruner_made_after_the_trainer(model: PeftModel, tmp_path: Path) -> None:
    trainer = dpo(model, tmp_path / "run")
    pruner = EarlyPruner(model, light_of(**BUDGET, depth=1 / 3))
    trainer.add_callback(pruner.callback())
    trainer.train()
    light = pruner.prune()
    assert len(light.get_base_model().model.layers) == 2 and list(light.peft_config) == ["default"]
    dpo(light, tmp_path / "run", max_steps=2).train()


def test_other_adapters_are_refused(model: PeftModel) -> None:
    model.add_adapter("second", model.peft_config["default"])
    said = refusal(lambda: EarlyPruner(model))
    assert "several adapters (default, second)" in said and "delete_adapter()" in said
