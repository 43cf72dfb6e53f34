"""What models would need that no machine of this project holds: Llama shapes on GPUs, on paper.

    python benchmarks/scale.py --out benchmarks/scale.json

`lightpeft check` of a run on a base that has a config and no weights: a decoder that learns completions, in bfloat16,
under gradient checkpointing; with 4 and with 8 blocks, and all others on the line through both. What one GPU holds
under FSDP2 is arithmetic on top of that:

    (frozen weights of the blocks) / GPUs  +  two whole blocks  +  embeddings and head  +  what trains  +  activations

Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from publishing import markdown_table, report
from transformers import LlamaConfig

from lightpeft.app.cli.command import quiet
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.checking import check
from lightpeft.config import run_config_from_dict
from lightpeft.profiling.rehearsal import Holding

SHAPES: dict[str, dict[str, int]] = {
    "Llama 8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "Llama 70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
}
COMMON = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
TINY = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 128}
GPUS = (1, 2, 4, 8, 16, 64)
FEW, MORE = 4, 8
"""Blocks of the models that are gone through."""
HELD = 80e9
"""Bytes of a GPU."""
PROMPT, COMPLETION = 768, 256
"""Tokens of a row."""


@dataclass(frozen=True)
class Sharded:
    """What FSDP2 makes of a model."""

    blocks: int
    outside: int
    """Bytes of embeddings and head, which every GPU gathers for a whole step."""

    def held(self, holding: Holding, gpus: int) -> float:
        """Bytes of one of so many GPUs."""
        inside = holding.weights - self.outside
        shared = inside / gpus + (2 * inside / self.blocks if gpus > 1 else 0)
        return shared + self.outside + holding.trained + holding.activations + holding.overhead


def base_without_weights(folder: Path, shape: Mapping[str, int], tokenizer: Path) -> None:
    """A model's folder as far as its shapes go."""
    LlamaConfig(**COMMON, **shape, tie_word_embeddings=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def needs(shape: Mapping[str, int], tokenizer: Path, rows: int, blocks: float) -> dict[str, Holding]:
    """What the stages of a run on a shape hold."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base_without_weights(folder / "base", shape, tokenizer)
        data = folder / "rows.jsonl"
        line = json.dumps({"prompt": " the" * PROMPT, "completion": " the" * (COMPLETION - 1)})
        data.write_text((line + "\n") * max(256, 4 * rows), encoding="utf-8")
        columns = {"prompt": "prompt", "completion": "completion", "max_length": PROMPT + COMPLETION}
        settings: dict[str, Any] = {
            "preset": "writer",
            "output": str(folder / "run"),
            "model": {"name": str(folder / "base"), "dtype": "bfloat16"},
            "data": {"task": "causal-lm", "train": str(data), **columns},
            "light": {"blocks": blocks, "least_examples": 64},
            "training": {"batch_size": rows, "gradient_checkpointing": True, "epochs": 100},
        }
        stages = check(pipeline.prepare(run_config_from_dict(settings)), int(HELD)).stages
        return {name: need.holding for name, need in stages.items()}


def measure(shapes: Mapping[str, Mapping[str, int]], tokenizer: Path, rows: int, blocks: float) -> dict[str, Any]:
    """By shape and stage: what it holds in all, and what one GPU holds."""
    found = {}
    for name, shape in shapes.items():
        few, more = (needs({**shape, "num_hidden_layers": depth}, tokenizer, rows, blocks) for depth in (FEW, MORE))
        depth = shape["num_hidden_layers"]
        sharded = Sharded(depth, 2 * 2 * COMMON["vocab_size"] * shape["hidden_size"])
        stages = {stage: at_depth(few[stage], more[stage], depth) for stage in ("plain", "estimate", "train")}
        found[name] = {stage: {**asdict(of), "gpus": _by_gpus(of, sharded)} for stage, of in stages.items()}
    return found


def at_depth(few: Holding, more: Holding, depth: int) -> Holding:
    """Of a model so deep, from two that are less so."""
    of_few, of_more, blocks = asdict(few), asdict(more), depth - FEW
    return Holding(**{name: of + (of_more[name] - of) * blocks // (MORE - FEW) for name, of in of_few.items()})


def _by_gpus(holding: Holding, sharded: Sharded) -> dict[str, float]:
    return {str(gpus): sharded.held(holding, gpus) for gpus in GPUS}


def markdown(results: dict[str, Any]) -> str:
    """One row a shape and stage; bold: it fits."""
    header = ("", "PFLOPs a step", *(f"{gpus} GPU{'s' if gpus > 1 else ''}, GB" for gpus in GPUS))
    return markdown_table(header, _rows(results))


def _rows(results: dict[str, Any]) -> Iterator[list[str]]:
    for shape, stages in results.items():
        for stage, of in stages.items():
            held = [f"**{size / 1e9:.0f}**" if size <= HELD else f"{size / 1e9:.0f}" for size in of["gpus"].values()]
            yield [f"{shape}, {stage}", f"{of['flops'] / 1e15:.1f}", *held]


def main(arguments: list[str] | None = None) -> int:
    """Compute and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, default=Path("demo/cache/smollm2"), help="folder with a tokenizer")
    parser.add_argument("--rows", type=int, default=8, help="rows a GPU and step")
    parser.add_argument("--blocks", type=float, default=0.4, help="part of the blocks that goes")
    parser.add_argument("--tiny", action="store_true", help="a shape that takes no time, to try the script out")
    parser.add_argument("--out", type=Path, help="JSON file for every number")
    options = parser.parse_args(arguments)
    quiet()
    shapes = {"tiny": TINY} if options.tiny else SHAPES
    about = {"rows": options.rows, "tokens": PROMPT + COMPLETION, "completion": COMPLETION, "blocks": options.blocks}
    return report(
        "scale",
        arguments,
        options.out,
        lambda: {**about, "results": measure(shapes, options.tokenizer, options.rows, options.blocks)},
        markdown,
    )


if __name__ == "__main__":
    sys.exit(main())
