"""The language-modeling head where labels are: losses and gradients are the usual ones, and fewer logits are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import DECODERS, ENCODER_DECODERS, every_family, inputs_for, make, relative_difference
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import student, trainer

from lightpeft import accelerated
from lightpeft.compat.torch import has_hooks
from lightpeft.models.unwrap import transformers_model
from lightpeft.training import logits as training_logits
from lightpeft.training.logits import labeled_head

Learned = tuple[Tensor, dict[str, Tensor]]
"""A loss, and gradients by name."""


def answers(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """A padded batch in which half of the tokens are of a prompt."""
    data = inputs_for(model, labels=True, rows=4, length=12, seed=seed)
    data["labels"][:, :6] = -100
    return data


def learned(model: PeftModel, data: dict[str, Tensor]) -> Learned:
    model.zero_grad()
    loss = model(**data).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def widths() -> Callable[[PeftModel], list[int]]:
    """Watches a model's head: how many positions each call computed."""

    def watch(model: PeftModel) -> list[int]:
        seen: list[int] = []
        head = transformers_model(model).get_output_embeddings()
        head.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
        return seen

    return watch


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of no more than five tokens are in memory at a time."""
    monkeypatch.setattr(training_logits, "_LOGIT_BYTES_ON_CPU", 0)
    monkeypatch.setattr(training_logits, "_LEAST_CHUNK", 5)


def check_inside(model: PeftModel, data: dict[str, Tensor], *, bf16: bool) -> None:
    """Twice inside the block, and behind it, all is as before it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        usual = learned(model, data)
        with labeled_head(model):
            inside = [learned(model, data), learned(model, data)]
        for found in (*inside, learned(model, data)):
            check_same(usual, found, bf16=bf16)


def check_same(usual: Learned, found: Learned, *, bf16: bool) -> None:
    """But for rounding."""
    assert relative_difference(usual[0], found[0]) < (1e-3 if bf16 else 1e-6)
    assert usual[1].keys() == found[1].keys()
    largest = max(gradient.norm() for gradient in usual[1].values())
    tolerance = (2e-2 if bf16 else 1e-5) * largest
    assert all((found[1][key] - usual[1][key]).norm() <= tolerance for key in usual[1])


@every_family(DECODERS)
@pytest.mark.parametrize("bf16", [False, True])
def test_losses_and_gradients_are_the_usual_ones(name: str, bf16: bool, few_at_once: None) -> None:
    model = student(name)
    check_inside(model, answers(model), bf16=bf16)


@every_family(DECODERS)
@pytest.mark.parametrize("bf16", [False, True])
def test_who_watches_the_head_sees_logits_of_labeled_tokens(
    name: str, bf16: bool, widths: Callable[..., list[int]]
) -> None:
    model = student(name)
    data, seen = answers(model), widths(model)
    check_inside(model, data, bf16=bf16)
    labeled = int((data["labels"][:, 1:] != -100).sum())
    assert seen == [48, 2, labeled, labeled, 48], "a batch of two tokens finds out whether it can be done"


class AtOnce(TorchDispatchMode):
    """The most tokens that a softmax goes over."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._log_softmax.default:
            self.tokens = max(self.tokens, args[0][..., 0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "straight"),
    [
        ("llama-gqa", True),
        ("gpt2", True),  # the head is tied to the embeddings
        ("gemma2", False),  # what the head gives is capped before the loss sees it
    ],
)
def test_logits_are_never_all_there(name: str, straight: bool, few_at_once: None) -> None:
    model = student(name)
    data = answers(model)
    head = transformers_model(model).get_output_embeddings()
    with labeled_head(model), AtOnce() as at_once:
        output = model(**data)
        output.loss.backward()
    labeled = int((data["labels"][:, 1:] != -100).sum())
    assert labeled > 5
    assert at_once.tokens <= 5 if straight else at_once.tokens == labeled
    assert output.logits.shape == (1, labeled, 0 if straight else head.out_features)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_that_trains_gets_its_gradients(bias: bool) -> None:
    model = student("llama-gqa")
    head = transformers_model(model).get_output_embeddings()
    if bias:
        head.bias = nn.Parameter(torch.randn(head.out_features))
    data = answers(model)
    for frozen in (head.weight, head.bias) if bias else (head.weight,):
        frozen.requires_grad_()
        usual = learned(model, data)
        with labeled_head(model):
            found = learned(model, data)
        frozen.requires_grad_(False)
        assert any(name.endswith("lm_head.weight" if frozen is head.weight else "lm_head.bias") for name in found[1])
        check_same(usual, found, bf16=False)
    with labeled_head(model):
        frozen_head = learned(model, data)
    check_same((usual[0], {key: usual[1][key] for key in frozen_head[1]}), frozen_head, bf16=False)


def test_half_precision_in_which_small_gradients_vanish_goes_the_usual_way() -> None:
    model = student("llama-gqa")
    data = answers(model)
    with labeled_head(model), torch.autocast("cpu", torch.float16):
        assert model(**data).logits.shape[-1] > 0
    with labeled_head(model), torch.autocast("cpu", torch.bfloat16):
        assert model(**data).logits.shape[-1] == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_inside_a_trainer(tmp_path: Path, accumulation: int) -> None:
    """The loss is a mean over the tokens of the whole optimizer step, which `Trainer` counts."""
    losses = []
    for loss_only in (False, True):
        model = student("llama-gqa")
        with accelerated(model, loss_only=loss_only):
            run = trainer(model, tmp_path, max_steps=6, logging_steps=1, gradient_accumulation_steps=accumulation)
            run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[0]) == 6


def test_evaluation_and_generation_see_all_logits(widths: Callable[..., list[int]]) -> None:
    model = student("llama-gqa")
    data, seen = answers(model), widths(model)
    with labeled_head(model):
        learned(model, data)
        model.eval()
        assert model(**data).logits.shape[:2] == (4, 12)
        model.train()
        without = {key: value for key, value in data.items() if key != "labels"}
        assert model(**without).logits.shape[:2] == (4, 12)
        assert model(**data, logits_to_keep=12).logits.shape[:2] == (4, 12)
        seen.clear()
        model(**data)
    assert seen != [48]


@pytest.mark.parametrize("name", [*ENCODER_DECODERS, "bert", "vit"])
def test_other_models_are_left_alone(name: str) -> None:
    model = student(name)
    data = inputs_for(model, labels=True)
    usual = learned(model, data)
    with labeled_head(model):
        for _ in range(2):
            found = learned(model, data)
            assert found[0].equal(usual[0])
            assert all(found[1][key].equal(gradient) for key, gradient in usual[1].items())


def test_a_model_that_computes_its_loss_itself_is_found_out(widths: Callable[..., list[int]]) -> None:
    model = student("llama-gqa")
    inner = transformers_model(model)
    forward = inner.forward

    def alone(*args: object, labels: Tensor, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output

    inner.forward = alone
    data, seen = answers(model), widths(model)
    usual = learned(model, data)[0]
    with labeled_head(model):
        assert all(learned(model, data)[0].equal(usual) for _ in range(2))
    assert seen == [48, 2, 48, 48]


def test_everything_is_put_back() -> None:
    model = make("llama-gqa")
    head, loss = model.get_output_embeddings(), model.loss_function
    with labeled_head(model):
        assert model.loss_function is not loss
    assert model.loss_function is loss
    assert "forward" not in vars(head)
    assert not has_hooks(model)
