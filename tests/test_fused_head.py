"""TRL's trainers that ask for log-probabilities in place of logits: the same numbers, from labeled tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import make, refusal, relative_difference
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import student
from transformers import set_seed
from trl_settings import SETTINGS, WORDS, tokenizer

from lightpeft import accelerated, light_trainer
from lightpeft.models.unwrap import transformers_model
from lightpeft.training import token_scores
from lightpeft.training.logits import labeled_head

trl = pytest.importorskip("trl")
trl_models = pytest.importorskip("trl.trainer.utils")
if not hasattr(trl_models, "add_fused_lm_head"):
    pytest.skip("this release of TRL asks models for logits", allow_module_level=True)

OF_SFT = ("log_probs", "entropy", "is_top1")
OF_DPO = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of no more than five tokens are in memory at a time."""
    monkeypatch.setattr(token_scores, "_LOGIT_BYTES_ON_CPU", 0)
    monkeypatch.setattr(token_scores, "_LEAST_CHUNK", 5)


def fused(asked: tuple[str, ...], name: str = "llama-gqa", **options: Any) -> nn.Module:
    """A PeftModel whose head answers with log-probabilities, as TRL's trainers make it."""
    model = student(name)
    trl_models.add_fused_lm_head(model.get_base_model(), outputs=asked, **options)
    return model


def completions(model: nn.Module) -> dict[str, Tensor]:
    """A batch with prompts, completions and padding."""
    vocabulary = transformers_model(model).get_input_embeddings().num_embeddings
    ids = torch.randint(3, vocabulary, (4, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = labels[1, 9:] = -100
    attends = torch.ones_like(ids)
    attends[1, 9:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": attends}


def asked_of(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The answer to a batch, and the gradients of a loss that weighs tokens differently."""
    model.zero_grad()
    answer = model(**batch, fused_lm_head=True)
    weights = torch.linspace(0.5, 2, answer.log_probs.numel()).view_as(answer.log_probs)
    (-answer.log_probs * weights).sum().backward()
    return answer, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Logits(TorchDispatchMode):
    """Tensors as wide as the vocabulary: the most tokens in one, and the tokens whose softmax was computed."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.most, self.computed = vocabulary, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        transposed_weight = func is torch.ops.aten.t.default
        if isinstance(result, Tensor) and result.shape[-1:] == (self.vocabulary,) and not transposed_weight:
            self.most = max(self.most, result[..., 0].numel())
            self.computed += result[..., 0].numel() if func is torch.ops.aten._log_softmax.default else 0
        return result


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("asked", [OF_SFT, OF_DPO], ids=["sft", "dpo"])
def test_answers_and_gradients_are_those_of_trl(asked: tuple[str, ...], bf16: bool) -> None:
    model = fused(asked)
    batch = completions(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        usual, usual_gradients = asked_of(model, batch)
        with labeled_head(model, loss_only=False):
            found, gradients = asked_of(model, batch)
    assert type(found) is type(usual) and found.keys() == usual.keys()
    assert found.label_mask.equal(usual.label_mask) and found.log_probs.shape == (4, 11)
    of_tokens = [name for name in asked if name != "is_top1"]
    for name in ("loss", *of_tokens):
        assert relative_difference(usual[name], found[name]) < (2e-2 if bf16 else 1e-5), name
    assert found.is_top1.equal(usual.is_top1)
    largest = max(gradient.norm() for gradient in usual_gradients.values())
    assert gradients.keys() == usual_gradients.keys()
    for name, gradient in usual_gradients.items():
        assert (gradients[name] - gradient).norm() <= (2e-2 if bf16 else 1e-5) * largest, name


def test_labeled_tokens_alone_go_through_the_head_and_a_few_at_a_time() -> None:
    model = fused(OF_SFT)
    batch = completions(model)
    vocabulary = transformers_model(model).get_output_embeddings().out_features
    labeled = int((batch["labels"][:, 1:] != -100).sum())
    with Logits(vocabulary) as usual:
        asked_of(model, batch)
    with accelerated(model), Logits(vocabulary) as found:
        asked_of(model, batch)
    assert usual.most == 44, "TRL computes every position on a CPU"
    assert (found.most, found.computed) == (5, labeled)


@pytest.mark.parametrize("training", [True, False])
def test_who_asks_for_logits_gets_all_of_them(training: bool) -> None:
    model = fused(OF_SFT).train(training)
    batch = completions(model)
    with labeled_head(model, loss_only=False):
        assert model(**batch).logits.shape[:2] == (4, 12)
        with torch.no_grad():
            assert model(**batch, fused_lm_head=True).log_probs.shape == (4, 11)
    assert model(**batch).logits.shape[:2] == (4, 12)


def test_no_label_at_all_gives_a_loss_of_zero_that_reaches_the_model() -> None:
    model = fused(OF_SFT)
    batch = completions(model)
    batch["labels"][:] = -100
    with labeled_head(model, loss_only=False):
        model(**batch, fused_lm_head=True).log_probs.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def train_the_head(model: nn.Module) -> None:
    transformers_model(model).get_output_embeddings().weight.requires_grad_()


LEFT_TO_TRL: dict[str, tuple[dict[str, Any], Callable[[nn.Module], None]]] = {
    "a temperature": ({"asked": OF_SFT, "temperature": 0.5}, lambda model: None),
    "entropy that may be trained on": ({"asked": ("log_probs", "entropy")}, lambda model: None),
    "logits that are capped": ({"asked": OF_SFT, "name": "gemma2"}, lambda model: None),
    "a head that trains": ({"asked": OF_SFT}, train_the_head),
}


@pytest.mark.parametrize("case", LEFT_TO_TRL)
def test_the_rest_is_left_to_trl(case: str) -> None:
    options, change = LEFT_TO_TRL[case]
    model = fused(**options)
    change(model)
    batch = completions(model)
    usual, usual_gradients = asked_of(model, batch)
    with labeled_head(model, loss_only=False):
        found, gradients = asked_of(model, batch)
    assert found.log_probs.equal(usual.log_probs)
    assert all(gradients[name].equal(gradient) for name, gradient in usual_gradients.items())


def test_a_loss_that_trains_on_the_entropy_is_refused() -> None:
    model = fused(OF_SFT)
    with labeled_head(model, loss_only=False):
        entropy = model(**completions(model), fused_lm_head=True).entropy.sum()
    assert "fast_steps=False" in refusal(entropy.backward)


# -- whole trainings -----------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> Dataset:
    """Rows of unequal length with prompts."""
    texts = [(" ".join(WORDS[i % 20 : i % 20 + 2 + i % 5]), " ".join(WORDS[25 : 27 + i % 3])) for i in range(48)]
    return Dataset.from_list([{"prompt": f"{prompt} ", "completion": answer} for prompt, answer in texts])


def sft(trainer: Any, rows: Dataset, folder: Path, **options: Any) -> Any:
    set_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    return trainer(
        model=get_peft_model(make("llama-gqa", eos_token_id=1), lora),
        args=trl.SFTConfig(str(folder), **{**SETTINGS, "max_steps": 6, **options.pop("settings", {})}),
        train_dataset=rows,
        processing_class=tokenizer(),
        **options,
    )


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_a_training_is_that_of_trl_without_its_logits(rows: Dataset, tmp_path: Path, loss: str) -> None:
    """Of the light trainer without a cut, and of TRL's own trainer inside `accelerated`: batches, losses, reports."""
    settings = {"loss_type": loss, "gradient_checkpointing": False, "train_sampling_strategy": "sequential"}
    usual = sft(trl.SFTTrainer, rows, tmp_path, settings=settings)
    usual.train()
    light = sft(light_trainer(trl.SFTTrainer), rows, tmp_path, settings=settings, light=0)
    plain = sft(trl.SFTTrainer, rows, tmp_path, settings=settings)
    vocabulary = plain.model.get_output_embeddings().out_features
    seen = []
    for trainer in (light, plain):
        with Logits(vocabulary) as logits:
            if trainer is light:
                trainer.train()
            else:
                with accelerated(trainer.model):
                    trainer.train()
        seen.append(logits.most)
        for name in ("loss", "num_tokens", "mean_token_accuracy", "entropy"):
            assert logged(trainer, name) == pytest.approx(logged(usual, name), rel=1e-3), name
            assert len(logged(trainer, name)) == 6
    assert max(seen) <= 5
