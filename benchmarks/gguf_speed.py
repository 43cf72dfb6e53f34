"""A light model in llama.cpp: does it write what PyTorch writes, and how fast beside its dense base?

    python benchmarks/gguf_speed.py runs/socialiqa/writers/cells/smollm2/socialiqa/40_of_the_blocks/0 --rows 20

The light model, PEFT merged into it, and the untouched base are written as GGUF files in some data types. Both continue
the same prompts greedily for as many tokens, one thread each, in alternation. PyTorch continues them in float32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from llama_cpp import LlamaCpp, is_there
from publishing import check_counts, markdown_table, report, spread_text
from transformers import PreTrainedModel

from lightpeft.adapters.merging import merged_copy
from lightpeft.app.exports.gguf.writing import write_gguf
from lightpeft.app.folders.opening import open_result
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.errors import require
from lightpeft.models.loading import quiet_libraries
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.comparing import alternate, ratio
from lightpeft.prune.light_model import LightModel

TYPES = ("f32", "bf16", "q8_0")


def measure(folder: Path, rows: int, tokens: int, types: Sequence[str]) -> dict[str, Any]:
    """Texts, speeds and sizes by data type."""
    require(is_there(), "llama.cpp is not here; pip install llama-cpp-py-sync")
    run = RunFolder.at(folder)
    work = pipeline.prepare(run.config)
    light = open_result(run, work.task)
    require(isinstance(light, LightModel), f"{folder} has no light model")
    small, dense = merged_copy(light), work.dense_model().model
    test = work.task.test.select(range(min(rows, len(work.task.test))))
    prompts = [list(ids) for ids in work.task.encode_inputs(test, work.tokenizer)["input_ids"]]
    expected = [continued(small.float().eval(), prompt, tokens) for prompt in prompts]
    plans = {"light": light.light_plan, "dense": nothing_gone(light.light_plan)}
    found = {}
    for kind in types:
        with TemporaryDirectory() as place, silence():
            files = {name: Path(place) / f"{name}.gguf" for name in plans}
            for name, model in (("light", small), ("dense", dense)):
                write_gguf(model, plans[name], work.tokenizer, files[name], kind)  # type: ignore[arg-type]
            found[kind] = compare(files, prompts, expected, tokens)
    return {"removed_of_blocks": light.light_plan.removed_of_blocks, "types": found}


def nothing_gone(plan: PrunePlan) -> PrunePlan:
    """The plan of the dense model."""
    whole = [
        BlockPlan(*(tuple(range(count)) for count in (spec.heads, spec.kv_heads, spec.neurons))) for spec in plan.specs
    ]
    return replace(plan, blocks=tuple(whole), sites={})


@torch.inference_mode()
def continued(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """The most probable tokens behind a prompt; the end of a text ends nothing."""
    ids = torch.tensor([list(prompt)])
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return written[0, ids.shape[1] :].tolist()


def compare(
    files: dict[str, Path], prompts: Sequence[list[int]], expected: Sequence[list[int]], tokens: int
) -> dict[str, Any]:
    """Both files, prompt by prompt."""
    models = {name: LlamaCpp(str(file)) for name, file in files.items()}
    texts: dict[str, list[list[int]]] = {name: [] for name in models}

    def write(name: str) -> float:
        prompt, started = prompts[len(texts[name])], time.perf_counter()
        texts[name].append(models[name].greedy(prompt, tokens))
        return len(texts[name][-1]) / (time.perf_counter() - started)

    speeds = alternate({name: partial(write, name) for name in models}, len(prompts))
    for model in models.values():
        model.close()
    return {
        "same_texts": sum(own == its for own, its in zip(texts["light"], expected, strict=True)),
        "texts": len(prompts),
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "speed_ratio": vars(ratio(speeds["light"], speeds["dense"])),
        "file_bytes": {name: file.stat().st_size for name, file in files.items()},
        "values": speeds,
    }


@contextmanager
def silence() -> Iterator[None]:
    """Discard the messages that llama.cpp writes to stderr, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row a run and data type."""
    header = ("", "light, tokens/s", "dense, tokens/s", "speed", "light, MiB", "dense, MiB", "PyTorch's texts")
    return markdown_table(
        header,
        [
            [
                f"{run['removed_of_blocks']:.0%} of the blocks gone, {kind}",
                *(f"{found['tokens_per_second'][name]:.1f}" for name in ("light", "dense")),
                spread_text(found["speed_ratio"]),
                *(f"{found['file_bytes'][name] / 2**20:.0f}" for name in ("light", "dense")),
                f"{found['same_texts']} of {found['texts']}",
            ]
            for run in results.values()
            for kind, found in run["types"].items()
        ],
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="gguf_speed", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished light runs")
    parser.add_argument("--rows", type=int, default=20, help="held-out prompts")
    parser.add_argument("--tokens", type=int, default=32, help="written behind each")
    parser.add_argument("--types", nargs="+", default=TYPES, choices=("f32", "f16", "bf16", "q8_0"))
    parser.add_argument("--out", type=Path, help="where all numbers go")
    options = parser.parse_args(arguments)
    quiet_libraries()

    def found() -> dict[str, Any]:
        check_counts(options, "rows", "tokens")
        sizes = {"rows": options.rows, "tokens": options.tokens}
        results = {str(run): measure(run, options.rows, options.tokens, options.types) for run in options.runs}
        return {**sizes, "results": results}

    return report("gguf_speed", arguments, options.out, found, markdown)


if __name__ == "__main__":
    sys.exit(main())
