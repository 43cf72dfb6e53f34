"""Generated texts, in batches with a cache, against most probable tokens chosen one by one without either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import DROPPED, VOCABULARY, make, plan_for, with_lora
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lightpeft.app.evaluation import generating
from lightpeft.app.evaluation.generating import generate_texts
from lightpeft.prune.surgery import apply_plan

END, LINE = 2, 5
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 16], [17, 18], [20] * 9]
STEPS = 12


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a number; of two of them a line end is a part."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    words = {
        "<pad>" if n == 0 else "</s>" if n == END else ".\n" if n == LINE else word: n for word, n in words.items()
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module", params=["pruned", "dropped"])
def model(request: pytest.FixtureRequest) -> PeftModel:
    """A small decoder with LoRA, without some heads and neurons, or without whole sub-layers."""
    model = with_lora(make("llama-gqa"))
    apply_plan(model, plan_for(model, **(DROPPED if request.param == "dropped" else {})))
    return model


def written(model: PeftModel, prompt: list[int], ends: set[int]) -> list[int]:
    """The most probable tokens behind a prompt up to an end, by a forward pass over all of it for each."""
    ids = list(prompt)
    for _ in range(STEPS):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best in ends:
            break
        ids.append(best)
    return ids[len(prompt) :]


def texts(model: PeftModel, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[str]:
    return generate_texts(model, PROMPTS, tokenizer, max_new_tokens=STEPS, **options)


def expected(model: PeftModel, tokenizer: PreTrainedTokenizerFast, ends: set[int]) -> list[str]:
    return [tokenizer.decode(written(model, prompt, ends), skip_special_tokens=True) for prompt in PROMPTS]


@pytest.mark.parametrize(("side", "batch_size"), [("right", 2), ("left", None)])
def test_batches_with_a_cache_give_the_tokens_of_single_steps(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, side: str, batch_size: int | None
) -> None:
    tokenizer.padding_side = side
    result = texts(model, tokenizer, batch_size=batch_size)
    assert result == expected(model, tokenizer, {END})
    assert len(set(result)) == len(PROMPTS)


def test_the_head_never_reads_a_view(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a view of the last positions torch would copy a frozen bfloat16 head once for each row of the batch."""
    model, usual, whole = with_lora(make("llama-gqa")), nn.functional.linear, []

    def linear(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight is head:
            whole.append(given.is_contiguous())
        return usual(given, weight, bias)

    head = model.get_base_model().lm_head.weight
    monkeypatch.setattr(nn.functional, "linear", linear)
    texts(model, tokenizer, batch_size=5)
    assert all(whole) and len(whole) == STEPS


def test_texts_end_at_any_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make("llama-gqa")
    free = [written(model, prompt, {END}) for prompt in PROMPTS]
    stop = free[0][2]  # one that the model does say
    model.generation_config.eos_token_id = [END, stop]
    result = texts(model, tokenizer)
    # the other end is no special token of the tokenizer, so it is written
    assert result[0].split() == [f"w{token}" for token in free[0][: free[0].index(stop) + 1]]


def test_speed_counts_tokens_up_to_the_end(tokenizer: PreTrainedTokenizerFast, capsys: Any) -> None:
    """Not the padding behind it, which lasts until the longest text of the batch."""
    model = make("llama-gqa")
    stop = written(model, PROMPTS[0], {END})[2]
    model.generation_config.eos_token_id = [END, stop]
    texts(model, tokenizer, batch_size=5)
    own = [written(model, prompt, {END, stop}) for prompt in PROMPTS]
    expected = sum(min(len(tokens) + 1, STEPS) for tokens in own)
    assert f"generated {expected} tokens, " in (said := capsys.readouterr().err) and "tokens/s" in said
    assert expected < len(PROMPTS) * STEPS


def test_checkpoint_settings_for_sampling_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make("llama-gqa")
    for name, value in {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "num_beams": 2}.items():
        setattr(model.generation_config, name, value)
    assert texts(model, tokenizer) == expected(model, tokenizer, {END})


def test_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight[LINE] *= 3  # so that it occurs
    free = [written(model, prompt, {END}) for prompt in PROMPTS]
    assert any(LINE in tokens[:-1] for tokens in free)
    lines = texts(model, tokenizer, one_line=True)
    whole = texts(model, tokenizer)
    assert lines != whole
    assert lines == [text.partition("\n")[0].strip() for text in whole]


def test_tokens_with_a_line_end(tokenizer: PreTrainedTokenizerFast) -> None:
    assert generating.line_ends(tokenizer) == {LINE}


def test_batches_that_do_not_fit_are_halved(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = with_lora(make("llama-gqa")), []
    real = model.generate

    def generate(**inputs: Any) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(**inputs)

    reference = texts(model, tokenizer, batch_size=1)
    monkeypatch.setattr(model, "generate", generate)
    assert texts(model, tokenizer, batch_size=4) == reference
    assert sizes == [4, 2, 2, 1]
