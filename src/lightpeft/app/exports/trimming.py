"""Trim the vocabulary of a transformers model to the tokens of some texts, without a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.app.folders.forms import WholeModel
from lightpeft.app.folders.opening import find_model
from lightpeft.app.tasks.rows.inputs import read_inputs
from lightpeft.app.tasks.rows.reading import read_rows
from lightpeft.errors import require
from lightpeft.files import check_vacant, replacing_folder
from lightpeft.models.loading import load_model
from lightpeft.models.task_heads import TaskHead
from lightpeft.models.tokenizers import check_vocabulary, load_tokenizer
from lightpeft.models.vocabulary.live import cut_vocabulary
from lightpeft.saving.whole_config import CONFIG_FILE

AT_ONCE = 1024
"""Texts per call of the tokenizer."""


@dataclass(frozen=True)
class Size:
    """Tokens, parameters and bytes of a model."""

    tokens: int
    parameters: int
    weights_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Size:
        """Measure a live model; tied weights count once."""
        weights = [*model.parameters()]
        tokens = model.config.get_text_config().vocab_size
        total_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        return cls(tokens, sum(weight.numel() for weight in weights), total_bytes)


@dataclass(frozen=True)
class Trimmed:
    """Result of `trim`: sizes before and after."""

    before: Size
    after: Size
    untrained: Sequence[str]
    """Modules without weights in the checkpoint, which are random."""


def trim(name: str, folder: str | Path, data: str, column: str | None = None, *, allow_pickle: bool = False) -> Trimmed:
    """Write a model and its tokenizer with only the tokens of some texts, for `from_pretrained`.

    Texts whose tokens all stay give the same outputs as before. Other texts are split into more tokens.

    Example:
        trim("sentence-transformers/all-MiniLM-L6-v2", "small", "reviews.csv", "review")

    Args:
        name: folder of a transformers model, or its name on the hub.
        folder: output folder; it must be new or empty.
        data: text lines (.txt), a table (.csv, .tsv, .json, .jsonl, .parquet), or a data set of the hub.
        column: column with the texts; None: every text of a row counts.
        allow_pickle: accept pickled weights, of which only tensors are unpickled.

    Raises:
        LightPeftError: the rows have no token that the model knows, the folder is not empty, it is no transformers
            model, or one whose tokens or tokenizer cannot be cut. Nothing is half-written.
    """
    folder = Path(folder)
    check_vacant(folder, replaceable=False, overwrite=False)
    texts = list(_texts_of(_rows(data, column), column))
    found = find_model(name, settings={"dtype": "auto", "allow_pickle": allow_pickle})
    own = f"{name} is a {found.form}; give a transformers model: a light model keeps fewer tokens by its run's setting"
    require(isinstance(found, WholeModel), f"{own} light.remove.vocabulary: task")
    tokenizer = load_tokenizer(found.model, found.config)
    check_vocabulary(tokenizer, found.config)
    rows = _tokens(texts, tokenizer, data)
    loaded = load_model(found.model, _own_head(found.config, name), to_prune=False)
    before = Size.of(loaded.model)
    small = cut_vocabulary(loaded.model, tokenizer, rows)
    with replacing_folder(folder, last=CONFIG_FILE) as temporary:
        loaded.model.save_pretrained(temporary)
        small.save_pretrained(temporary)
    return Trimmed(before, Size.of(loaded.model), loaded.new_modules)


def _rows(data: str, column: str | None) -> Dataset:
    is_lines = Path(data).suffix.lower() == ".txt"
    rows = read_inputs(Path(data), column or "text", "--data") if is_lines else read_rows(data, "--data")
    missing = f'--data: {data} has no column "{column}"; its columns are {", ".join(rows.column_names)}'
    require(column is None or column in rows.column_names, missing)
    return rows


def _texts_of(rows: Dataset, column: str | None) -> Iterator[str]:
    for name in rows.column_names if column is None else [column]:
        yield from _texts_in(rows[name][:])


def _texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a nested value, such as a list of chat messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(each)


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, data: str) -> list[set[int]]:
    """Return the token ids of the texts, one set per `AT_ONCE` texts."""
    parts = (texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE))
    sets = [{token for row in tokenizer(part)["input_ids"] for token in row} for part in parts]
    known = set().union(*sets) - set(tokenizer.all_special_ids)
    require(known, f"--data: no text of {data} has a token that the model knows; give texts of its language")
    return sets


def _own_head(config: PretrainedConfig, name: str) -> TaskHead:
    """Return the class that the model was saved with, as a task head."""
    (architecture, *_) = config.architectures or ("AutoModel",)
    known = getattr(transformers, architecture, None)
    require(known is not None, f"{name} is a {architecture}, which transformers does not have; it cannot be trimmed")
    return TaskHead("own", known, None)
