"""A live model that can be asked: how rows are fed to it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from lightpeft.app.evaluation.batching import in_batches, usual_batch_size
from lightpeft.app.evaluation.generating import generate_texts
from lightpeft.app.tasks.tokens import Collator, take_rows
from lightpeft.console import bars
from lightpeft.errors import require
from lightpeft.machine import autocasting
from lightpeft.models.batches import IGNORED, without_labels
from lightpeft.models.head import lone_head, skip_head
from lightpeft.models.patching import in_mode
from lightpeft.models.sharding import without_graph
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.answering import fused_answers

AT_ONCE = 2**28
"""Bytes of a language model's logits, in float32, that are in memory at a time, if a row has no more."""


@dataclass(frozen=True)
class BatchedModel:
    """The `Respondent` there is: a model, and how rows become its batches."""

    model: nn.Module
    """A transformers or PEFT model; its training mode is restored afterwards."""
    collator: Collator
    """`task.collator(tokenizer)`."""
    batch_size: int | None
    """Rows a forward pass (of likelihood: options, of spans: windows); rows of similar length share one. None: as many
    as are usual on the device. A batch that does not fit into memory is halved."""
    autocast: torch.dtype | None = None
    """Half precision of the forward pass under autocast; None: that of the weights. Losses are computed in float32."""

    def outputs(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], dict[str, Tensor], Any]]:
        """Row numbers, the batch of them, and what the model gives for it; batch by batch, the longest rows first.

        Longest first: a batch that doesn't fit into memory fails, or is made smaller, at once.
        """
        return self._asked(encoded, description, without_labels)

    def next_logits(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Row numbers, logits at the places whose next token has a label in some row, and these labels.

        With a large vocabulary, logits take more memory than all else in the pass: a model that can be told computes no
        others, and those of a few rows at a time, whatever the size of a batch.
        """
        head = lone_head(self.model)
        for rows, batch, output in self._asked(encoded, description, _at_labels, head):
            places = _predicting(batch["labels"])
            states, labels = output.logits, batch["labels"][:, places + 1]
            if states.shape[1] != len(places):
                states = states[:, places.to(states.device)]
            if head is None:
                yield rows, states, labels
                continue
            size = max(1, AT_ONCE // max(1, 4 * len(places) * head.out_features))
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                with without_graph(self.model), autocasting(states.device, self.autocast):
                    logits = head(states[part])
                yield rows[part], logits, labels[part]

    def _asked(
        self,
        encoded: Dataset,
        description: str,
        inputs_of: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
        head: nn.Linear | None = None,
    ) -> Iterator[tuple[Sequence[int], dict[str, Tensor], Any]]:
        """What `outputs` yields, of what `inputs_of` makes of a batch.

        Args:
            head: what the model does without; who is asked in between finds it in place.
        """
        _require_rows(encoded)
        order = np.argsort(-np.asarray(encoded["length"][:]), kind="stable").tolist()
        device = next(self.model.parameters()).device
        accepted = _accepted_inputs(self.model)
        nothing_kept = {"use_cache": False} if "use_cache" in accepted else {}  # keys and values that nobody reads

        def compute(rows: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
            batch = self.collator(take_rows(encoded, rows))
            inputs = {name: value.to(device) for name, value in inputs_of(batch).items() if name in accepted}
            with without_graph(self.model), autocasting(device, self.autocast), skip_head(head):
                return batch, self.model(**inputs, **nothing_kept)

        with in_mode(self.model, training=False), fused_answers(self.model):
            size = self.batch_size or usual_batch_size(device, encoded["length"][order[0]])
            batches = in_batches(order, compute, size)
            for rows, (batch, output) in bars.progress(batches, math.ceil(len(order) / size), description):
                yield rows, batch, output

    def texts(self, encoded: Dataset, max_new_tokens: int, *, one_line: bool = False) -> list[str]:
        """What the model writes behind every row's tokens: see `generate_texts`."""
        _require_rows(encoded)
        assert self.collator.tokenizer is not None
        with in_mode(self.model, training=False), fused_answers(self.model):
            return generate_texts(
                self.model,
                encoded["input_ids"][:],
                self.collator.tokenizer,
                max_new_tokens=max_new_tokens,
                one_line=one_line,
                batch_size=self.batch_size,
                autocast=self.autocast,
            )


def _predicting(labels: Tensor) -> Tensor:
    """Places of [rows, length] labels whose next token has a label in some row: [places]."""
    return (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()


def _at_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs that ask a model for logits at these places alone."""
    return {**without_labels(batch), "logits_to_keep": _predicting(batch["labels"])}


def _require_rows(encoded: Dataset) -> None:
    require(len(encoded) > 0, "there are no rows to evaluate")


def _accepted_inputs(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Parameters of the transformers model's forward: not every model takes all that a tokenizer gives."""
    base = transformers_model(model)
    return inspect.signature(base.forward).parameters
