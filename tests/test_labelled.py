"""The language-modelling head where labels are: losses and gradients are the usual ones, and fewer logits are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import DECODERS, ENCODER_DECODERS, inputs_for, make, relative_difference
from torch import Tensor, nn
from training import student, trainer

from lightpeft import accelerated
from lightpeft.compat.torch import is_watched
from lightpeft.models.unwrap import transformers_model
from lightpeft.training.logits import labelled_head


def answers(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """A padded batch in which half of the tokens are of a prompt."""
    data = inputs_for(model, labels=True, rows=4, length=12, seed=seed)
    data["labels"][:, :6] = -100
    return data


def learned(model: PeftModel, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
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


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("bf16", [False, True])
def test_losses_and_gradients_are_the_usual_ones(name: str, bf16: bool, widths: Callable[..., list[int]]) -> None:
    model = student(name)
    data, seen = answers(model), widths(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        usual = learned(model, data)
        with labelled_head(model):
            first, second = learned(model, data), learned(model, data)
        after = learned(model, data)
    labelled = int((data["labels"][:, 1:] != -100).sum())
    assert seen == [48, 2, labelled, labelled, 48], "a batch of two tokens finds out whether it can be done"
    tolerance = 2e-2 if bf16 else 1e-5
    for found in (first, second, after):
        assert relative_difference(usual[0], found[0]) < (1e-3 if bf16 else 1e-6)
        assert usual[1].keys() == found[1].keys()
        largest = max(gradient.norm() for gradient in usual[1].values())
        assert all((found[1][key] - usual[1][key]).norm() <= tolerance * largest for key in usual[1])


def test_no_label_at_all_is_the_usual_loss() -> None:
    """Which is no number: transformers divides by the labels."""
    model = student("llama-gqa")
    data = answers(model)
    data["labels"][:] = -100
    with labelled_head(model):
        assert model(**data).loss.isnan()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_inside_a_trainer(tmp_path: Path, accumulation: int) -> None:
    """The loss is a mean over the tokens of the whole optimizer step, which `Trainer` counts."""
    losses = []
    for loss_alone in (False, True):
        model = student("llama-gqa")
        with accelerated(model, loss_alone=loss_alone):
            run = trainer(model, tmp_path, max_steps=6, logging_steps=1, gradient_accumulation_steps=accumulation)
            run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[0]) == 6


def test_evaluation_and_generation_see_all_logits(widths: Callable[..., list[int]]) -> None:
    model = student("llama-gqa")
    data, seen = answers(model), widths(model)
    with labelled_head(model):
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
    with labelled_head(model):
        for _ in range(2):
            found = learned(model, data)
            assert found[0].equal(usual[0])
            assert all(found[1][key].equal(gradient) for key, gradient in usual[1].items())


def test_a_loss_of_ones_own_is_left_alone() -> None:
    model = student("llama-gqa")
    inner = transformers_model(model)
    inner.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    data = answers(model)
    usual = learned(model, data)[0]
    with labelled_head(model):
        assert all(learned(model, data)[0].equal(usual) for _ in range(2))
    assert learned(model, data)[0].equal(usual)


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
    with labelled_head(model):
        assert all(learned(model, data)[0].equal(usual) for _ in range(2))
    assert seen == [48, 2, 48, 48]


def test_the_trial_draws_no_random_numbers() -> None:
    model = make("gpt2", resid_pdrop=0.5).train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with labelled_head(model):
        assert torch.rand(3).equal(expected)


def test_who_reads_logits_gets_them_all() -> None:
    model = student("llama-gqa")
    with accelerated(model):
        assert model(**answers(model)).logits.shape[:2] == (4, 12)


def test_everything_is_put_back() -> None:
    model = make("llama-gqa")
    head, loss = model.get_output_embeddings(), model.loss_function
    with labelled_head(model):
        assert model.loss_function is not loss
    assert model.loss_function is loss
    assert "forward" not in vars(head) and "_loss_function" not in vars(model)
    assert not is_watched(model)
