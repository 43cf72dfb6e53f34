"""What is meant by an option that is not there, or by a value that it does not take: one line about it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from lightpeft.config import RunConfig, run_config_from_dict
from lightpeft.errors import LightPeftError, nearest, one_line

_REFUSED = re.compile(r'Parser key "(?P<key>[\w.]+)".*(Got value|Given value): (?P<value>.*)')
"""What jsonargparse says of a value of the wrong type."""
_NO_SECTION = re.compile(r"""Parser key "(?P<key>\w+)": Unable to load config '(?P<value>[^']*)'""")
"""What it says of a value for a whole section."""


def explained(message: str, known: Collection[str], arguments: list[str]) -> str:
    """jsonargparse's message as one line; for an unknown option, with the one that is likely meant.

    Args:
        known: the options that there are.
        arguments: the command line.
    """
    line = one_line(message)
    refused, section = _REFUSED.search(line), _NO_SECTION.search(line)
    if refused is not None:
        return _refusal(refused["key"], refused["value"])
    if section is not None:
        meant = meant_option(section["key"], known)
        return f"--{section['key']} takes a YAML file, and {section['value']} is none; did you mean {meant}?"
    given = [word.partition("=")[0] for word in arguments if re.match("--?[a-zA-Z]", word)]
    unknown = next((word for word in given if f" {word}" in line), None)
    if not known or unknown is None or not ("nrecognized" in line or "ambiguous" in line):
        return line
    meant = meant_option(unknown, known)
    return f"unknown option {unknown}; " + (f"did you mean {meant}?" if meant else "--help shows all that there are")


def meant_option(word: str, known: Collection[str]) -> str | None:
    """The known option that somebody meant: called so elsewhere, in a section, or nearly so."""
    name = word.lstrip("-").replace("-", "_").lower()
    called = _ELSEWHERE.get(name, name)
    for option in (f"--{called}", f"--{called.rpartition('.')[2]}"):
        if option in known and option != f"--{word}":
            return option
    in_section = [option for option in known if option.endswith(f".{name}")]
    of_section = [option for option in known if option.startswith(f"--{name}.")]
    if len(in_section) == 1 or of_section:
        return (in_section or of_section)[0]
    return nearest(word, set(known) - {"--help", "-h"})


def _refusal(key: str, value: str) -> str:
    """What the config says of the value, which is the same line as for a YAML file."""
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    if nested.keys() <= {field.name for field in dataclasses.fields(RunConfig)}:
        try:
            run_config_from_dict(nested)
        except LightPeftError as error:
            return str(error)
    return f"option --{key} is {value!r}; --help tells what it takes"


_ELSEWHERE: dict[str, str] = {
    "model": "model.name",
    "m": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantise",
    "load_in_8bit": "model.quantise",
    "quantize": "model.quantise",
    "attn_implementation": "model.attention",
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
    "text_column_name": "data.text",
    "label_column_name": "data.label",
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
    "wd": "training.weight_decay",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "dropout": "lora.dropout",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
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
