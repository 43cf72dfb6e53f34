"""Completions of shared prompts: a prompt is computed once, and each of its completions goes on from its KV cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightpeft.models.batches import IGNORED
from lightpeft.models.unwrap import transformers_model

_NEEDED = {"attention_mask", "position_ids", "use_cache"}
"""Arguments of a model that can go on from the cache of a padded batch, beside the cache."""
_CACHES = ("cache", "past_key_values")
"""Names of the cache, as argument and in the output; newer releases of transformers have the first."""


def can_go_on(model: nn.Module) -> bool:
    """Return whether a model computes the tokens behind a prompt from the prompt's KV cache."""
    accepted = _accepted(model)
    return accepted >= _NEEDED and not accepted.isdisjoint(_CACHES)


def _accepted(model: nn.Module) -> set[str]:
    return set(inspect.signature(transformers_model(model).forward).parameters)


def completed(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    owners: Sequence[int],
    most_rows: int,
    most_tokens: int,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield the outputs that predict each token of the completions, and these tokens, longest completions first.

    Prompts are padded on the left, so that each is followed by its completions, and completions on the right.

    Args:
        prompts: token ids, at least one each.
        completions: token ids, at least one each.
        owners: index of the prompt of each completion.
        most_rows: most completions in a forward pass, of about the same length.
        most_tokens: most tokens of theirs in it, unless one has more.

    Yields:
        Indices of completions; `logits` of the model, [completions, longest of them, ...] on its device; and labels on
        the host, [completions, longest of them], with -100 behind the end of a completion.
    """
    device = next(model.parameters()).device
    tokens, real = _padded(prompts, "left", device)
    output = model(**_inputs(tokens, real, real.cumsum(-1) - 1), use_cache=True, **_last_only(model))
    order = sorted(range(len(completions)), key=lambda index: -len(completions[index]))
    start = 0
    while start < len(order):
        read = max(1, len(completions[order[start]]) - 1)  # the prompt's last token predicts the first
        chosen = order[start : start + max(1, min(most_rows, most_tokens // read))]
        start += len(chosen)
        owner = torch.tensor([owners[index] for index in chosen], device=device)
        rows = [completions[index] for index in chosen]
        states = output.logits[:, -1:][owner]
        if len(rows[0]) > 1:
            name = next(name for name in _CACHES if name in _accepted(model))
            cache = copy.deepcopy(getattr(output, name))  # a cache is changed by what goes on from it
            cache.batch_select_indices(owner)
            behind, also_real = _padded([ids[:-1] for ids in rows], "right", device)
            places = real.sum(-1, keepdim=True)[owner] + torch.arange(behind.shape[1], device=device)
            inputs = _inputs(behind, torch.cat([real[owner], also_real], 1), places)
            states = torch.cat([states, model(**inputs, **{name: cache}, use_cache=True).logits], 1)
        labels = pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True, padding_value=IGNORED)
        yield chosen, states, labels


def _inputs(tokens: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions.clamp_min(0)}


def _last_only(model: nn.Module) -> dict[str, Any]:
    """Return the argument that limits logits to the last place, if the model has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in _accepted(model) else {}


def _padded(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids with zeros as padding, and the mask of real ones: [rows, longest row] each."""
    tokens = pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in rows], batch_first=True, padding_side=side)
    real = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in rows], batch_first=True, padding_side=side)
    return tokens.to(device), real.to(device)
