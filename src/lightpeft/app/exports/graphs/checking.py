"""Whether a runtime computes from a written graph what the model computes here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.app.exports.agreement import Agreement
from lightpeft.app.exports.graphs.runtimes import Runtime, Session, foreign
from lightpeft.app.exports.graphs.tracing import example, positions, reads, writes
from lightpeft.errors import require
from lightpeft.models.families.registry import max_positions

_SHAPES = ((1, 5), (4, 12))
"""Rows and tokens of batches, other than what is traced."""
_STEPS = 4
"""Tokens that are written, one at a time, behind each batch."""
_TOLERANCES = {"f32": 1e-3, "f16": 0.03, "int8": 0.3}
"""Of the relative difference of logits: 32 bits give 1e-6, 8 bits of random weights a tenth, and other weights 1."""


@torch.no_grad()
def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, runtime: Runtime, folder: Path, dtype: str
) -> Agreement | None:
    """Load what was written and compare, on padded batches of other shapes than what was traced; None where the
    runtime is not installed.

    Raises:
        LightPeftError: the runtime does not take the file, or computes something else.
    """
    if not runtime.is_there:
        return None
    room = (max_positions(model.config) or 512) - _STEPS
    batches = [example(model, tokenizer, rows, min(tokens, room), left=writes(model)) for rows, tokens in _SHAPES]
    answers = _written if writes(model) else _answered
    with foreign(f"{runtime.title} does not take the file"):
        pairs = [pair for inputs in batches for pair in answers(model, runtime.open(folder), inputs)]
    agreement = Agreement.of(pairs)
    differ = f"logits differ by {agreement.difference:.0%}"
    require(
        agreement.difference < _TOLERANCES[dtype], f"{runtime.title} computes something else from the file: {differ}"
    )
    return agreement


def _answered(model: PreTrainedModel, session: Session, inputs: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of one call."""
    own, theirs = model(**inputs), session.run(inputs)
    for name, values in theirs.items():
        yield _seen(own[name], inputs["attention_mask"]), _seen(values, inputs["attention_mask"])


def _seen(logits: Tensor, mask: Tensor) -> Tensor:
    """Zeros where logits are of padding, of which nothing is promised."""
    if logits.shape[: mask.dim()] != mask.shape:
        return logits
    return logits.masked_fill((mask == 0).view(*mask.shape, *[1] * (logits.dim() - mask.dim())), 0)


def _written(model: PreTrainedModel, session: Session, inputs: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits behind a batch, and behind each of some tokens that the model writes; the model reads all anew."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    news = ids
    for _ in range(_STEPS):
        places = positions(mask)
        placed = {"position_ids": places} if reads(model, "position_ids") else {}
        own = model(input_ids=ids, attention_mask=mask, **placed, use_cache=False).logits[:, -1]
        given = {"input_ids": news, "attention_mask": mask, "position_ids": places[:, -news.shape[1] :]}
        yield own, session.run(given)["logits"][:, -1]
        news = own.argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, news], 1), torch.cat([mask, torch.ones_like(news)], 1)
