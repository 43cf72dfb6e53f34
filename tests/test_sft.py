"""TRL's `SFTTrainer` takes the callback and the light model like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel
from tiny import VOCABULARY, batch, make, with_lora
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from lightpeft import EarlyPruner, LightConfig, load_light
from lightpeft.adapters.full_width import save_full_width
from lightpeft.config import ModelConfig
from lightpeft.prune.light_model import LightModel

trl = pytest.importorskip("trl")

WORDS = [f"w{index}" for index in range(VOCABULARY - 3)]

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 20,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1,
}
"""Of TRL's trainers, for short runs on a CPU."""


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sft(model: PeftModel, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Any:
    rows = [
        {"prompt": " ".join(WORDS[i : i + 2 + i % 3]) + " ", "completion": " ".join(WORDS[i + 5 : i + 8])}
        for i in range(32)
    ]
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("checkpointing", [True, False])
def test_estimate_prune_and_train_on(tmp_path: Path, checkpointing: bool) -> None:
    make("llama-gqa", eos_token_id=1).save_pretrained(tmp_path / "base")
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_dropout=0.05)
    pruner = EarlyPruner(model, LightConfig(length=0.2, heads=0.5, neurons=0.5, modules=0.5))
    estimation = sft(model, tmp_path / "run", pruner.callback(), gradient_checkpointing=checkpointing)
    estimation.train()
    record = pruner.record()
    assert record.meta["steps"] == estimation.state.global_step == 4
    assert all(scores.max() > 0 for scores in record.of_blocks("neurons", "taylor"))
    assert record.of_modules("ratio").gt(0).all()

    light = pruner.prune()
    training = sft(light, tmp_path / "run", gradient_checkpointing=checkpointing)
    assert training.model is light
    training.train()
    history = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    assert history[-1] < history[0]

    light.eval()
    training.save_model(str(tmp_path / "light"))
    again = load_light(tmp_path / "light", base=tmp_path / "base")
    assert again(**batch(padding="left")).logits.equal(light(**batch(padding="left")).logits)


def test_it_trains_on_what_was_learned_at_full_width(tmp_path: Path) -> None:
    """An export is PEFT's own folder, and goes on over the whole base as any other does."""
    make("llama-gqa", eos_token_id=1).save_pretrained(tmp_path / "base")
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    pruner = EarlyPruner(model, LightConfig(length=2, heads=0.5, neurons=0.5))
    sft(model, tmp_path / "run", pruner.callback()).train()
    light = pruner.prune()
    training = sft(light, tmp_path / "run")
    training.train()
    training.save_model(str(tmp_path / "light"))
    save_full_width(tmp_path / "light", ModelConfig(name=str(tmp_path / "base")), tmp_path / "wide")

    wide = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "wide", is_trainable=True
    )
    going_on = sft(wide, tmp_path / "run", max_steps=4)
    assert going_on.model is wide and not isinstance(wide, LightModel)
    going_on.train()
    losses = [entry["loss"] for entry in going_on.state.log_history if "loss" in entry]
    untouched = sft(with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), tmp_path / "run", max_steps=1)
    untouched.train()
    assert losses[0] < untouched.state.log_history[0]["loss"], "it has learned something"
    assert losses[-1] < losses[0]
