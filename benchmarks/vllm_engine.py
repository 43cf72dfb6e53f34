"""vLLM in a process of its own, in an environment of its own: it holds transformers back further than lightpeft can go.

    LIGHTPEFT_VLLM=.venv-vllm/bin/python python benchmarks/vllm_speed.py ...

`make test-vllm` makes such an environment. Run as a program, this file is what runs there: it reads questions, a line
of JSON each, and answers with a line each; all else that vLLM says goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

PYTHON = "LIGHTPEFT_VLLM"
"""Environment variable: the Python of that environment."""
DEFAULTS = {"dtype": "float32", "enforce_eager": True}

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # so that OMP_NUM_THREADS counts
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of vLLM's environment, where it sets no others."""


@dataclass(frozen=True)
class Written:
    """The continuations that vLLM wrote for some prompts."""

    tokens: list[list[int]]
    seconds: float
    """From the first prompt to the last token."""


class Refused(Exception):
    """vLLM does not serve this model so."""


class Vllm:
    """One such process, which serves one model at a time; leaving the context ends it."""

    def __init__(self, python: str, log: IO[str] | None = None) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(Path(python).absolute()), __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**SETTINGS, **kept}
        )
        self.version = str(self._answer()["version"])

    def ask(self, model: str | Path, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> Written:
        """Continue prompts greedily, all at once, for as many tokens each; the end of a text ends nothing.

        Args:
            model: a folder, loaded unless the last question was about it with the same options.
            options: of vLLM's `LLM`.

        Raises:
            Refused: vLLM refused it, or died.
        """
        question = {"model": str(model), "prompts": prompts, "tokens": tokens, "options": {**DEFAULTS, **options}}
        assert self._process.stdin is not None
        _say(question, self._process.stdin)
        return Written(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Refused(f"vLLM's process ended: {self._process.wait()}")
        answer = json.loads(line)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return dict(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def _say(thing: Any, stream: IO[str]) -> None:
    stream.write(json.dumps(thing) + "\n")
    stream.flush()


def serve(questions: IO[str], answers: IO[str]) -> None:
    """Say which vLLM this is, then answer until there are no more questions."""
    from vllm import LLM, SamplingParams, TokensPrompt, __version__
    from vllm.distributed import cleanup_dist_env_and_memory

    _say({"version": __version__}, answers)
    engine: Any = None
    loaded: Any = None
    for line in questions:
        asked = json.loads(line)
        try:
            if loaded != (asked["model"], asked["options"]):
                engine = loaded = None
                cleanup_dist_env_and_memory()
                engine = LLM(asked["model"], **asked["options"])
                loaded = (asked["model"], asked["options"])
            prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in asked["prompts"]]
            greedy = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
            started = time.perf_counter()
            written = engine.generate(prompts, greedy, use_tqdm=False)
            seconds = time.perf_counter() - started
            answer = {"tokens": [list(each.outputs[0].token_ids) for each in written], "seconds": seconds}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            answer = {"refused": f"{type(error).__name__}: {error}"}
        _say(answer, answers)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as alone:  # vLLM speaks on stdout, too
        os.dup2(2, 1)
        serve(sys.stdin, alone)
