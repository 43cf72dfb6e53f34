"""Settings and a tokenizer for TRL's trainers over tiny models."""

from __future__ import annotations

from typing import Any

import torch
from tiny import VOCABULARY, batch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{index}" for index in range(VOCABULARY - 3)]


SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 20,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1,
}
"""Of TRL's trainers, for short runs on a CPU."""


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**batch(padding="left")).logits
