"""Labels for new texts from a saved light adapter: all it takes is in the adapter's folder and its base."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from datasets import Dataset

from lightpeft.checkpoint import LightModel, load_light, read_description
from lightpeft.config import ModelConfig
from lightpeft.errors import require
from lightpeft.evaluation import check_predictions_path, predict_proba, read_inputs, write_predictions
from lightpeft.loading import accelerator, load_tokenizer
from lightpeft.sites import transformers_model
from lightpeft.tasks import encode_texts, ensure_pad_token, text_collator


def predict(
    model: str | Path,
    source: str | Path,
    output: str | Path | None = None,
    base: str | Path | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    batch_size: int = 64,
    bf16: bool = False,
) -> None:
    """Label the rows of a file and write them with a probability for every label.

    Args:
        model: light adapter folder, or the folder of a finished run.
        source: text lines (.txt, or "-" for standard input) or a table (.csv, .tsv, .json, .jsonl, .parquet).
        output: .csv or .jsonl file; None: CSV on standard output.
        base: name or folder of the base, if it is not where it was.
        text: column with the text; None: as in training.
        text_pair: column with the second text; None: as in training.
        batch_size: rows a forward pass.
        bf16: compute in bfloat16.

    Raises:
        LightPeftError: bad input, or an adapter that does not classify.
    """
    require(batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1")
    folder = adapter_folder(model)
    if output is not None:
        check_predictions_path(Path(output))
    facts = read_description(folder)["task"]
    classifies = facts.get("answer") == "head" and facts["entry"]["kind"] == "classification"
    require(classifies, f"{folder} does not classify texts, so there are no labels to predict")
    columns = facts["entry"]["columns"]
    text, text_pair = text or columns.get("text", "text"), text_pair or columns.get("text_pair")
    rows = read_inputs(sys.stdin if str(source) == "-" else Path(source), text, text_pair)
    light = load_light(folder, base, device=accelerator())
    probabilities = classify(light, rows, text, text_pair, base=base, batch_size=batch_size, bf16=bf16)
    write_predictions(None if output is None else Path(output), rows, facts["labels"], probabilities)


def classify(
    light: LightModel,
    rows: Dataset,
    text: str,
    text_pair: str | None = None,
    *,
    base: str | Path | None = None,
    batch_size: int = 64,
    bf16: bool = False,
) -> np.ndarray:
    """Class probabilities of rows, float32 [rows, labels]."""
    inner = transformers_model(light)
    name = str(base) if base is not None else inner.config._name_or_path
    tokenizer = load_tokenizer(ModelConfig(name=name, gguf_file=getattr(inner, "light_gguf_file", None)))
    ensure_pad_token(tokenizer, inner.config)
    encoded = encode_texts(rows, text, text_pair, tokenizer, light.light_task["max_length"])
    return predict_proba(light, encoded, text_collator(tokenizer), batch_size, bf16)


def adapter_folder(path: str | Path) -> Path:
    """The light adapter at a path: the folder itself, or `adapter/` of a run."""
    path = Path(path)
    return path / "adapter" if (path / "adapter").is_dir() else path
