"""llama.cpp, by its bindings `llama_cpp_py_sync`: what a GGUF file gives for some tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np


def is_there() -> bool:
    """Whether the bindings are installed."""
    return importlib.util.find_spec("llama_cpp_py_sync") is not None


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: str, context: int = 512, threads: int = 1) -> None:
        from llama_cpp_py_sync import Llama

        self._llama: Any = Llama(file, n_ctx=context, n_batch=context, n_threads=threads, n_gpu_layers=0)

    def close(self) -> None:
        """Let go of the file."""
        self._llama.close()

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, with those that every text begins or ends with."""
        return list(self._llama.tokenize(text))

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits of the token that follows these: [vocabulary], float32."""
        self._llama._clear_context_state()
        return self._after(tokens, 0)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """So many of the most probable tokens behind a prompt; the end of a text ends nothing."""
        self._llama._clear_context_state()
        written = [int(self._after(tokens, 0).argmax())]
        while len(written) < count:
            written.append(int(self._after(written[-1:], len(tokens) + len(written) - 1).argmax()))
        return written

    def _after(self, tokens: Sequence[int], place: int) -> np.ndarray:
        """The logits behind tokens, of which the first stands at a place of the context."""
        llama = self._llama
        llama._eval_tokens(list(tokens), place)
        pointer = llama._lib.llama_get_logits_ith(llama._ctx, -1)
        return np.frombuffer(llama._ffi.buffer(pointer, 4 * llama.n_vocab), dtype=np.float32).copy()
