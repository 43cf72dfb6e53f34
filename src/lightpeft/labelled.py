"""The language-modelling head, computed in training only where the loss reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss

from lightpeft.forwards import instead
from lightpeft.sites import transformers_model
from lightpeft.tasks.tokens import IGNORED


@contextmanager
def labelled_head(model: nn.Module) -> Iterator[None]:
    """Inside the block a causal language model in training computes logits of those tokens alone that have a label.

    Prompts and padding have none, and a vocabulary is much wider than a hidden state: the head and the softmax over its
    output take a good part of a step's time and most of its memory. The loss is the same but for the order of its sum.
    `logits` of a model's output in training are then [1, labelled tokens, vocabulary].

    The first batch is computed as usual, to see that the model hands the head's logits to transformers' loss. Models
    that do not, have no head, or have a loss of their own are left alone, and so are calls without labels.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    inner = transformers_model(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if type(head) is not nn.Linear or getattr(inner, "loss_function", None) is not ForCausalLMLoss:
        yield
        return
    own = vars(inner).get("_loss_function")
    labelled = _Labelled(head.forward)
    handles = [
        inner.register_forward_pre_hook(labelled.begin, with_kwargs=True),
        inner.register_forward_hook(labelled.end),
    ]
    try:
        with instead(head, labelled.project):
            inner.loss_function = labelled.loss
            yield
    finally:
        for handle in handles:
            handle.remove()
        del inner._loss_function
        if own is not None:
            inner.loss_function = own


class _Labelled:
    """One model's head and loss."""

    def __init__(self, project: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            project: the head's own forward: hidden states to logits.
        """
        self._project = project
        self._next: Tensor | None = None
        """Label of each position's next token, [rows, length]; None: logits are wanted everywhere."""
        self._selected = False
        """Whether the logits of the call under way are those of labelled tokens alone."""
        self._usual: bool | None = None
        """Whether the model's logits go to its loss as they come; None: not seen yet."""

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: which logits the loss will read."""
        labels = kwargs.get("labels")
        wanted = module.training and isinstance(labels, Tensor) and labels.dim() == 2
        elsewhere = kwargs.get("shift_labels") is not None or kwargs.get("logits_to_keep")
        self._next = pad(labels, (0, 1), value=IGNORED)[:, 1:] if wanted and not elsewhere else None
        self._selected = False

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model: one that never came by its loss function has a loss of its own."""
        if self._next is not None:
            self._usual = bool(self._usual)
            self._next = None

    def project(self, hidden: Tensor) -> Tensor:
        """The head's forward: [rows, length, hidden] -> [1, labelled tokens, vocabulary], or logits of all tokens."""
        if self._next is None or not self._usual or hidden.shape[:-1] != self._next.shape:
            return self._project(hidden)
        self._selected = True
        return self._project(hidden[self._next.to(hidden.device) != IGNORED])[None]

    def loss(self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' loss, of the logits that are there."""
        if self._selected and self._next is not None:
            kwargs["shift_labels"] = self._next[self._next != IGNORED][None]
        elif self._next is not None:
            self._usual = logits.shape[:-1] == self._next.shape
        return ForCausalLMLoss(logits, labels, vocab_size, *args, **kwargs)
