"""llama.cpp, by its bindings `llama_cpp_py_sync`: what a GGUF file gives for some tokens.

    python -m lightpeft.compat.llama_cpp FILE < question.json

A file that llama.cpp does not like may end the process, so that it is asked in one of its own.
"""

from __future__ import annotations

import importlib.util
import json
import sys
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
        """What comes after these tokens: [vocabulary], float32."""
        llama = self._llama
        llama._clear_context_state()
        return self._read(llama._eval_tokens(list(tokens), 0))

    def greedy(self, tokens: Sequence[int], count: int, end: int | None = None) -> list[int]:
        """The most probable tokens behind a prompt, until `end` or so many."""
        llama = self._llama
        written: list[int] = []
        llama._clear_context_state()
        place = llama._eval_tokens(list(tokens), 0)
        while len(written) < count:
            written.append(int(self._read(place).argmax()))
            if written[-1] == end or len(written) == count:
                break
            place = llama._eval_tokens(written[-1:], place)
        return written

    def _read(self, place: int) -> np.ndarray:
        llama = self._llama
        pointer = llama._lib.llama_get_logits_ith(llama._ctx, -1)
        values = np.frombuffer(llama._ffi.buffer(pointer, 4 * llama.n_vocab), dtype=np.float32)
        return values.copy()


def answer(file: str, question: dict[str, Any]) -> dict[str, Any]:
    """Tokens of `texts`, and what comes after `tokens`."""
    loaded = LlamaCpp(file)
    tokens = [loaded.tokenize(text) for text in question["texts"]]
    found = {"tokens": tokens, "logits": loaded.logits(question["tokens"]).tolist()}
    loaded.close()
    return found


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(answer(sys.argv[1], json.load(sys.stdin))) + "\n")
