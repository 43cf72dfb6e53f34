"""Whether llama.cpp computes from a GGUF file what the model computes here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.app.exports.agreement import Agreement
from lightpeft.app.exports.gguf.architectures import reach
from lightpeft.compat import llama_cpp
from lightpeft.errors import one_line, require
from lightpeft.models.patching import in_mode

_TEXTS = (
    "Tracy bought 12,345 apples at 9.99 each. Why didn't she ask?\n\nShe'll tell:",
    "Größe, naïve café; 東京と大阪 🙂  two spaces,\ttab",
)
"""What is tokenised on both sides; what comes after the first text is compared."""
_TOLERANCE = 0.2
"""Of the relative difference of logits: 8 bits, or a KV cache in 16, give some hundredths, and other weights 1."""


@torch.no_grad()
def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> Agreement | None:
    """Load the file in llama.cpp, in a process of its own, and compare; None where its bindings are not installed.

    Raises:
        LightPeftError: llama.cpp does not take the file, splits texts into other tokens, or computes something else.
    """
    if not llama_cpp.is_there():
        return None
    tokens = [tokenizer(text)["input_ids"] for text in _TEXTS]
    read = tokens[0][: reach(model.config)]
    given = _ask(file, {"texts": _TEXTS, "tokens": read})
    require(given["tokens"] == tokens, "llama.cpp splits texts into other tokens than the tokenizer does")
    with in_mode(model, training=False):
        own = model(input_ids=torch.tensor([read], device=model.device)).logits[0, -1].float().cpu()
    theirs = torch.tensor(given["logits"])[: len(own)]
    agreement = Agreement.of([(own - own.mean(), theirs - theirs.mean())])  # what is added to all changes nothing
    differ = f"logits differ by {agreement.difference:.0%}"
    require(agreement.difference < _TOLERANCE, f"llama.cpp computes something else from the file: {differ}")
    return agreement


def _ask(file: Path, question: dict[str, Any]) -> Any:
    """What a process of its own answers, which may die of the file.

    Raises:
        LightPeftError: it did, or refused it, or llama.cpp cannot be loaded there.
    """
    command = [sys.executable, "-m", llama_cpp.__name__, str(file)]
    answer = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=False)
    said = (answer.stderr.splitlines() or ["it said nothing"])[-1]
    require(answer.returncode == 0, f"llama.cpp does not take the file ({answer.returncode}): {one_line(said, 200)}")
    return json.loads(answer.stdout.splitlines()[-1])
