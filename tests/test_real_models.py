"""Real pretrained models end to end: MiniLM through a whole run, SmolLM2 through surgery and generation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lanes import thorough
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainingArguments, set_seed

from lightpeft import LightTrainer, load_config, load_light
from lightpeft.app.evaluation.predicting import predict
from lightpeft.app.evaluation.scores import scores_of
from lightpeft.app.runs import pipeline
from lightpeft.config import run_config_from_dict
from lightpeft.plans.prune_plan import PrunePlan

CONFIG = Path(__file__).parents[1] / "configs" / "movie_reviews" / "minilm_default.yaml"
IN_BLOCKS = 6 * (4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384)
"""Parameters of MiniLM's six blocks: attention, FFN and two norms each."""


def test_minilm_learns_with_two_fifths_of_its_blocks(minilm: Path, movie_reviews: Path, tmp_path: Path) -> None:
    config = load_config(CONFIG)
    config = replace(
        config,
        output=str(tmp_path / "run"),
        model=replace(config.model, name=str(minilm)),
        data=replace(
            config.data,
            train=str(movie_reviews / "train.csv"),
            test=str(movie_reviews / "test.csv"),
            max_length=32,
            limit_train=1200,
            limit_test=400,
        ),
        training=replace(config.training, epochs=1, batch_size=16, learning_rate=1.5e-3),
    )
    report = pipeline.run(config)
    plan = PrunePlan.load(tmp_path / "run" / "plan.json")
    parameters = report["parameters"]
    assert parameters["base_dense"] - parameters["base"] == plan.removed_parameters
    assert 0.6 <= plan.removed_parameters / IN_BLOCKS < 0.605
    assert all(len(block.neurons) % 8 == 0 for block in plan.blocks)
    # the classes are even, so 0.5 is chance; 400 rows have a standard error of 0.025
    assert report["metrics"]["accuracy"] > 0.6

    light = load_light(tmp_path / "run" / "adapter")
    (tmp_path / "texts.txt").write_text("A gorgeous, moving and funny film.\nA dull, lifeless and stupid mess.\n")
    predict(tmp_path / "run", tmp_path / "texts.txt", tmp_path / "labels.csv")
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 3
    ids = torch.randint(1000, 2000, (2, 12))
    with torch.no_grad():
        merged = light(input_ids=ids).logits, light.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(*merged, rtol=1e-4, atol=1e-4)


@thorough
def test_python_and_the_shell_give_the_same(
    minilm: Path, movie_reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`LightTrainer` with the defaults of `TrainingArguments`, beside `lightpeft run` with the same settings."""
    given = {
        "output": str(tmp_path / "run"),
        "light": 0.4,
        "seed": 42,  # as in `TrainingArguments`
        "model": {"name": str(minilm)},
        "data": {
            "train": str(movie_reviews / "train.csv"),
            "test": str(movie_reviews / "test.csv"),
            "max_length": 32,
            "limit_train": 400,
            "limit_test": 200,
        },
        "peft": {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0},
        "training": {
            "epochs": 3,
            "batch_size": 8,
            "eval_batch_size": 8,
            "learning_rate": 1e-3,
            "warmup": 0.0,
        },
        "trainer": {"train_sampling_strategy": "random"},
    }
    monkeypatch.setattr("lightpeft.app.tasks.tokens.PADDED_TO", 1)
    report = pipeline.run(run_config_from_dict(given))
    work = pipeline.prepare(run_config_from_dict(given))
    monkeypatch.chdir(tmp_path)
    set_seed(42)
    trainer = LightTrainer(
        AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2),
        TrainingArguments("out", learning_rate=1e-3),
        train_dataset=work.train_rows,
        processing_class=work.tokenizer,
        peft_config=LoraConfig(task_type="SEQ_CLS"),
        light=0.4,
    )
    trainer.train()
    trainer.save_model("adapter")
    assert trainer.light_plan == PrunePlan.load(tmp_path / "run" / "plan.json")
    light = load_light("adapter")
    for name, value in load_file("run/adapter/adapter_model.safetensors").items():
        assert load_file("adapter/adapter_model.safetensors")[name].equal(value), name
    outcomes = pipeline.measure(work, light)
    assert scores_of(outcomes, work.task).metrics == report["metrics"]
