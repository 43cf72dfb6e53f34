"""A tokenizer of pieces, as Llama 2 has it."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Tracy bought 12,345 apples at 9.99 each.",
    "Größe, naïve café; 東京と大阪 🙂",
    "Why didn't she ask?\n\nShe'll tell.",
]


def tokenizer_of_pieces(normalizer: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it: pieces, and bytes for what is in none of them."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(TEXTS[:1] * 3 + ["she bought ten apples"] * 5, trainers.BpeTrainer(vocab_size=60))
    facts = json.loads(learned.to_str())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *facts["model"]["vocab"]]
    facts["model"] |= {"vocab": {name: at for at, name in enumerate(names)}, "byte_fallback": True, "fuse_unk": True}
    facts["model"]["unk_token"] = "<unk>"
    tokenizer = Tokenizer.from_str(json.dumps({**facts, "pre_tokenizer": None}))
    spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizer or normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)
