"""What is meant by a verb or an option that is not there: one line about it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from lightpeft.errors import nearest


def unknown_verb(word: str, known: Iterable[str]) -> str:
    """One line about a verb that there is not, with the one that is likely meant."""
    meant = nearest(word, known)
    if meant is None:
        return f"unknown verb {word}; lightpeft --help shows all that there are"
    return f"unknown verb {word}; did you mean {meant}?"


def unknown_option(words: Sequence[str], known: Collection[str], rows: str | None = None) -> str:
    """One line about words that no option takes, with the option that is likely meant.

    Args:
        words: what is left of a command line.
        known: the options that there are.
        rows: the one that takes a file of rows.
    """
    unknown = next((word.partition("=")[0] for word in words if re.match("--?[a-zA-Z]", word)), None)
    if unknown is None:
        meant = rows if rows and words[0].lower().endswith(_ROWS) else None
        return f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {meant} {words[0]}?" if meant else "")
    meant = meant_option(unknown, known)
    return f"unknown option {unknown}; " + (f"did you mean {meant}?" if meant else "--help shows all that there are")


def meant_option(word: str, known: Collection[str]) -> str | None:
    """The known option that somebody meant: called so elsewhere, in a section, or nearly so."""
    name = word.lstrip("-").replace("-", "_").lower()
    called = ELSEWHERE.get(name) or ELSEWHERE.get(name.rpartition(".")[2], name)
    for option in (f"--{called}", f"--{called.rpartition('.')[2]}"):
        of_mapping = called != name and option.rpartition(".")[0] in known
        if (option in known or of_mapping) and option != f"--{word}":
            return option
    in_section = [option for option in known if option.endswith(f".{name}")]
    of_section = [option for option in known if option.startswith(f"--{name}.")]
    if len(in_section) == 1 or of_section:
        return (in_section or of_section)[0]
    return nearest(word, set(known) - {"--help", "-h"})


_ROWS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""Ends of names of files with rows."""

ELSEWHERE: dict[str, str] = {
    "model": "model.name",
    "m": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "quantize": "model.quantization",
    "quantise": "model.quantization",
    "attention": "model.attn_implementation",
    "data": "data.train",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "train": "data.train",
    "train_file": "data.train",
    "eval": "data.test",
    "test": "data.test",
    "test_file": "data.test",
    "validation_file": "data.test",
    "task": "data.task",
    "task_name": "data.task",
    "max_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_train_samples": "data.limit_train",
    "max_eval_samples": "data.limit_test",
    "max_new_tokens": "data.answer_tokens",
    "text": "data.columns.text",
    "text_pair": "data.columns.text_pair",
    "label": "data.columns.label",
    "text_column_name": "data.columns.text",
    "label_column_name": "data.columns.label",
    "lr": "training.learning_rate",
    "learning_rate": "training.learning_rate",
    "e": "training.epochs",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "b": "training.batch_size",
    "bs": "training.batch_size",
    "train_batch_size": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.eval_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "warmup_ratio": "training.warmup",
    "wd": "trainer.weight_decay",
    "weight_decay": "trainer.weight_decay",
    "max_grad_norm": "trainer.max_grad_norm",
    "logging_steps": "trainer.logging_steps",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "r": "peft.r",
    "rank": "peft.r",
    "lora_r": "peft.r",
    "lora_rank": "peft.r",
    "alpha": "peft.lora_alpha",
    "lora_alpha": "peft.lora_alpha",
    "dropout": "peft.lora_dropout",
    "lora_dropout": "peft.lora_dropout",
    "lora_target": "peft.target_modules",
    "size": "peft.size",
    "sparsity": "light.target",
    "ratio": "light.target",
    "o": "output",
    "out": "output",
    "output_dir": "output",
    "output_file": "output",
    "overwrite_output_dir": "overwrite",
    "adapter": "peft",
    "device": "devices",
    "num_gpus": "devices",
    "base_model_name_or_path": "base",
}
"""What other tools call an option -> what it is called here."""
