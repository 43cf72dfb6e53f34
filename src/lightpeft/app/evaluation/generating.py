"""Text generation with a causal language model, by greedy search."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.app.evaluation.batching import in_batches, usual_batch_size
from lightpeft.app.tasks.answers import require_finite
from lightpeft.console import bars
from lightpeft.machine import autocasting
from lightpeft.models.head import contiguous_head
from lightpeft.models.sharding import without_graph

LINE_END = "\n"


def generate_texts(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    one_line: bool = False,
    batch_size: int | None = None,
    autocast: torch.dtype | None = None,
) -> list[str]:
    """Generate one text per prompt by greedy search, up to the end token; a line says how fast.

    Prompts of about the same length form a batch, which ends as soon as all of its texts have.

    Args:
        model: a model in evaluation mode.
        prompts: token ids of each prompt, at least one id.
        tokenizer: a tokenizer with a padding token.
        max_new_tokens: most tokens of a text.
        one_line: True to end a text at its first line end.
        batch_size: prompts per batch; None: the default of the device.
        autocast: half precision to compute in; None: the dtype of the weights.

    Returns:
        One text per prompt, without special tokens and surrounding space.

    Raises:
        LightPeftError: the logits of a chosen token are NaN or infinite.
    """
    config = _greedy_config(model, tokenizer, max_new_tokens, one_line)
    device = next(model.parameters()).device

    def compute(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids = {"input_ids": [list(prompts[row]) for row in rows]}
        # left, whatever side the tokenizer pads: the text must follow its prompt directly
        batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(device)
        seen = _FiniteCheck()
        with without_graph(model), autocasting(device, autocast), contiguous_head(model):
            written = model.generate(**batch, generation_config=config, logits_processor=[seen])
        return written[:, batch["input_ids"].shape[1] :].cpu(), seen.finite.cpu()

    longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    longest = len(prompts[longest_first[0]]) + max_new_tokens
    size = batch_size or usual_batch_size(device, longest)
    batches = in_batches(longest_first, compute, size)
    texts, finite, count, started = [""] * len(prompts), [True] * len(prompts), 0, time.perf_counter()
    for rows, (written, numbers) in bars.progress(batches, math.ceil(len(prompts) / size), "Generating"):
        for row, ids, number in zip(rows, written, numbers, strict=True):
            texts[row], finite[row] = _decode(ids, tokenizer, one_line), bool(number)
            count += _written_tokens(ids, config.eos_token_id or ())
    require_finite(finite)
    bars.say(f"generated {count:,} tokens, {count / (time.perf_counter() - started):,.0f} tokens/s")
    return texts


class _FiniteCheck(LogitsProcessor):
    """Record if the logits are finite. The largest logit decides, since others may be minus infinity."""

    def __init__(self) -> None:
        self.finite = torch.tensor(True)
        """Bool [rows]: False if a chosen token had logits that are NaN or infinite."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finite = self.finite.to(scores.device) & scores.amax(-1).isfinite()
        return scores


def _greedy_config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, one_line: bool
) -> GenerationConfig:
    """Return the settings of greedy search, with the checkpoint's end tokens and none of its other settings."""
    ends = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if one_line:
        stops |= line_ends(tokenizer)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def line_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of tokens that contain a line end."""
    tokens = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return {token for token, text in enumerate(tokens) if LINE_END in text}


def _written_tokens(ids: Tensor, ends: Sequence[int]) -> int:
    """Return the number of generated tokens up to the first end, which counts; what follows is padding."""
    found = torch.isin(ids, torch.tensor(list(ends), dtype=ids.dtype)).nonzero()
    return int(found[0]) + 1 if len(found) else len(ids)


def _decode(ids: Tensor, tokenizer: PreTrainedTokenizerBase, one_line: bool) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return (text.partition(LINE_END)[0] if one_line else text).strip()
