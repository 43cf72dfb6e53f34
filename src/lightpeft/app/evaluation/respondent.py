"""A live model as a `Respondent`: batches, autocast, and logits."""

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

from lightpeft.app.evaluation.batching import completions_at_once, in_batches, usual_batch_size
from lightpeft.app.evaluation.generating import generate_texts
from lightpeft.app.evaluation.shared_prompts import can_go_on, completed
from lightpeft.app.tasks.tokens import Collator, take_rows
from lightpeft.console import bars
from lightpeft.errors import require
from lightpeft.machine import autocasting
from lightpeft.models.batches import IGNORED, without_labels
from lightpeft.models.head import lone_head, skip_head
from lightpeft.models.patching import in_mode
from lightpeft.models.sharding import without_graph
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.inference import fused_inference

MOST_LOGIT_BYTES = 2**28
"""Most bytes of a language model's logits in memory at once, in float32; a single row may need more."""


@dataclass(frozen=True)
class BatchedModel:
    """A live model that answers encoded rows in batches: the `Respondent` of tasks."""

    model: nn.Module
    """A transformers or PEFT model; its training mode is restored after each call."""
    collator: Collator
    """`task.collator(tokenizer)`."""
    batch_size: int | None
    """Rows per forward pass (likelihood: options; spans: windows), sorted by length. None: the default of the device. A
    batch that does not fit into memory is halved."""
    autocast: torch.dtype | None = None
    """Autocast dtype of the forward pass; None: the dtype of the weights. Losses are computed in float32."""

    def outputs(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], dict[str, Tensor], Any]]:
        """Yield row numbers, their batch, and the model's output, batch by batch.

        The longest rows come first, so that a batch that does not fit into memory fails, or is halved, at once.
        """
        return self._forward_batches(encoded, description, without_labels)

    def next_logits(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Yield row numbers, logits at places whose next token has a label in some row, and these labels.

        Rows may have a column `prompt`: those with the same number have the same tokens up to their first label, which
        are then computed once. With a large vocabulary, logits take more memory than all else in the pass. A model with
        a separable head therefore computes no others, and only those of a few rows at a time, whatever the batch size.
        """
        head = lone_head(self.model)
        if "prompt" in encoded.column_names and can_go_on(self.model):
            batches = self._completions(encoded, description, head)
        else:
            batches = self._labeled(encoded, description, head)
        for rows, states, labels in batches:
            if head is None:
                yield rows, states, labels
                continue
            size = max(1, MOST_LOGIT_BYTES // max(1, 4 * labels.shape[1] * head.out_features))
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                with without_graph(self.model), autocasting(states.device, self.autocast):
                    logits = head(states[part])
                yield rows[part], logits, labels[part]

    def _labeled(
        self, encoded: Dataset, description: str, head: nn.Linear | None
    ) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Yield row numbers, outputs without `head` at places whose next token has a label, and these labels."""
        for rows, batch, output in self._forward_batches(encoded, description, _inputs_at_labels, head):
            places = _label_places(batch["labels"])
            states, labels = output.logits, batch["labels"][:, places + 1]
            yield rows, states if states.shape[1] == len(places) else states[:, places.to(states.device)], labels

    def _completions(
        self, encoded: Dataset, description: str, head: nn.Linear | None
    ) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Yield what `_labeled` does, for rows whose column `prompt` says which of them begin with the same prompt."""
        _require_rows(encoded)
        columns = encoded.select_columns(["input_ids", "labels", "prompt"])[:]
        starts = [sum(label == IGNORED for label in labels) for labels in columns["labels"]]
        rows_of: dict[int, list[int]] = {}
        for row, prompt in enumerate(columns["prompt"]):
            rows_of.setdefault(prompt, []).append(row)
        groups = sorted(rows_of.values(), key=lambda rows: -starts[rows[0]])
        device = next(self.model.parameters()).device
        size = completions_at_once(device, max(encoded["length"]), self.batch_size)
        at_once = min(size.prompts, len(groups))

        def compute(chosen: Sequence[int]) -> list[tuple[list[int], Tensor, Tensor]]:
            of_prompt = [groups[number] for number in chosen]
            rows = [row for group in of_prompt for row in group]
            prompts = [columns["input_ids"][group[0]][: starts[group[0]]] for group in of_prompt]
            completions = [columns["input_ids"][row][starts[row] :] for row in rows]
            owners = [index for index, group in enumerate(of_prompt) for _ in group]
            with without_graph(self.model), autocasting(device, self.autocast), skip_head(head):
                # where memory runs out there are fewer prompts, and then fewer completions together, too
                rows_at_once = max(1, size.rows * len(chosen) // at_once)
                parts = completed(self.model, prompts, completions, owners, rows_at_once, size.tokens)
                return [([rows[index] for index in indices], states, labels) for indices, states, labels in parts]

        with in_mode(self.model, training=False), fused_inference(self.model):
            batches = in_batches(range(len(groups)), compute, at_once)
            for _, parts in bars.progress(batches, math.ceil(len(groups) / at_once), description):
                yield from parts

    def _forward_batches(
        self,
        encoded: Dataset,
        description: str,
        inputs_of: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
        head: nn.Linear | None = None,
    ) -> Iterator[tuple[Sequence[int], dict[str, Tensor], Any]]:
        """Yield row numbers, batch and output of each batch, as `outputs` does.

        Args:
            inputs_of: returns the model inputs of a batch.
            head: layer that the forward pass skips; between two batches it is in place.
        """
        _require_rows(encoded)
        order = np.argsort(-np.asarray(encoded["length"][:]), kind="stable").tolist()
        device = next(self.model.parameters()).device
        accepted = _accepted_inputs(self.model)
        nothing_kept = {"use_cache": False} if "use_cache" in accepted else {}  # no KV cache, which nothing reads

        def compute(rows: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
            batch = self.collator(take_rows(encoded, rows))
            inputs = {name: value.to(device) for name, value in inputs_of(batch).items() if name in accepted}
            with without_graph(self.model), autocasting(device, self.autocast), skip_head(head):
                return batch, self.model(**inputs, **nothing_kept)

        with in_mode(self.model, training=False), fused_inference(self.model):
            size = self.batch_size or usual_batch_size(device, encoded["length"][order[0]])
            batches = in_batches(order, compute, size)
            for rows, (batch, output) in bars.progress(batches, math.ceil(len(order) / size), description):
                yield rows, batch, output

    def texts(self, encoded: Dataset, max_new_tokens: int, *, one_line: bool = False) -> list[str]:
        """Return the text that the model generates after every row's tokens (`generate_texts`)."""
        _require_rows(encoded)
        assert self.collator.tokenizer is not None
        with in_mode(self.model, training=False), fused_inference(self.model):
            return generate_texts(
                self.model,
                encoded["input_ids"][:],
                self.collator.tokenizer,
                max_new_tokens=max_new_tokens,
                one_line=one_line,
                batch_size=self.batch_size,
                autocast=self.autocast,
            )


def _label_places(labels: Tensor) -> Tensor:
    """Return the places whose next token has a label in some row: int [places], for labels [rows, length]."""
    return (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()


def _inputs_at_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return model inputs that request logits only at the places of `_label_places`."""
    return {**without_labels(batch), "logits_to_keep": _label_places(batch["labels"])}


def _require_rows(encoded: Dataset) -> None:
    require(len(encoded) > 0, "there are no rows to evaluate; give at least one")


def _accepted_inputs(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the model's forward: not every model accepts all columns of a tokenizer."""
    base = transformers_model(model)
    return inspect.signature(base.forward).parameters
