r"""A merged light model in vLLM: does it write what PyTorch writes, and how fast beside its dense base?

    make test-vllm  # makes the environment with vLLM and the plug-in
    lightpeft run --config configs/socialiqa/smollm2_writer.yaml --output runs/socialiqa/smollm2_vllm \
        --light 0.4 --light.estimate.length 0.5 \
        --data.limit_train 256 --data.limit_test 64 --training.epochs 1
    LIGHTPEFT_VLLM=.venv-vllm/bin/python python benchmarks/vllm_speed.py runs/socialiqa/smollm2_vllm

Two processes of vLLM hold one model each, the light one with PEFT merged into it and the untouched base. In float32,
on as many threads as `OMP_NUM_THREADS` says, they continue the same held-out prompts greedily, all at once and the
first four one after another, in alternation. PyTorch continues all of them, too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf_speed import continued
from publishing import check_counts, markdown_table, report, spread_text
from vllm_engine import PYTHON, Refused, Vllm, Written

from lightpeft.adapters.merging import load_merged, save_merged
from lightpeft.app.folders.opening import open_result
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.errors import LightPeftError, require
from lightpeft.models.loading import quiet_libraries
from lightpeft.profiling.comparing import alternate, ratio, summarize
from lightpeft.profiling.sizes import folder_bytes
from lightpeft.prune.light_model import LightModel

Ask = Callable[[Sequence[list[int]]], Written]
WAYS = ("all at once", "one after another")


def measure(folder: Path, python: str, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Texts, speeds and sizes."""
    run = RunFolder.at(folder)
    work = pipeline.prepare(run.config)
    light = open_result(run, work.task)
    require(isinstance(light, LightModel), f"{folder} has no light model")
    test = work.task.test.select(range(min(rows, len(work.task.test))))
    prompts = [list(ids) for ids in work.task.encode_inputs(test, work.tokenizer)["input_ids"]]
    with TemporaryDirectory() as place, ExitStack() as served:
        folders = {name: Path(place) / name for name in ("light", "dense")}
        save_merged(light, folders["light"], work.tokenizer)
        work.dense_model().model.save_pretrained(folders["dense"])
        work.tokenizer.save_pretrained(folders["dense"])
        whole = load_merged(folders["light"]).float()
        expected = [continued(whole, prompt, tokens) for prompt in prompts]
        log = served.enter_context((Path(place) / "log").open("w"))
        engines = {name: served.enter_context(Vllm(python, log)) for name in folders}
        sizes: dict[str, Any] = {"tokens": tokens, "max_model_len": max(map(len, prompts)) + tokens}
        sizes["enable_prefix_caching"] = False  # the same prompts come again
        asks: dict[str, Ask] = {name: partial(engine.ask, folders[name], **sizes) for name, engine in engines.items()}
        written = {name: ask(prompts) for name, ask in asks.items()}  # also warms up
        return {
            "vllm": engines["light"].version,
            "removed_of_blocks": light.light_plan.removed_of_blocks,
            "same_texts": sum(a == b for a, b in zip(written["light"].tokens, expected, strict=True)),
            "texts": len(prompts),
            "bytes": {name: folder_bytes(each) for name, each in folders.items()},
            **compared(asks, prompts, tokens, rounds),
        }


def compared(asks: Mapping[str, Ask], prompts: Sequence[list[int]], tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens written a second, by way and model."""

    def at_once(ask: Ask) -> float:
        return len(prompts) * tokens / ask(prompts).seconds

    def one_by_one(ask: Ask) -> float:
        few = prompts[:4]
        return len(few) * tokens / sum(ask([prompt]).seconds for prompt in few)

    values = {}
    for way, once in zip(WAYS, (at_once, one_by_one), strict=True):
        values[way] = alternate({name: partial(once, ask) for name, ask in asks.items()}, rounds)
    return {
        "speed_ratio": {way: vars(ratio(of["light"], of["dense"])) for way, of in values.items()},
        "tokens_per_second": values,
    }


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row a run and way."""
    header = ("", "light, tokens/s", "dense, tokens/s", "speed", "light, MiB", "dense, MiB", "PyTorch's texts")
    return markdown_table(
        header,
        [
            [
                f"{found['removed_of_blocks']:.0%} of the blocks gone, {way}",
                *(f"{summarize(values[name]).median:.1f}" for name in ("light", "dense")),
                spread_text(found["speed_ratio"][way]),
                *(f"{found['bytes'][name] / 2**20:.0f}" for name in ("light", "dense")),
                f"{found['same_texts']} of {found['texts']}",
            ]
            for found in results.values()
            for way, values in found["tokens_per_second"].items()
        ],
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="vllm_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished light runs that write")
    parser.add_argument("--rows", type=int, default=16, help="held-out prompts")
    parser.add_argument("--tokens", type=int, default=32, help="written behind each")
    parser.add_argument("--rounds", type=int, default=7, help="alternations")
    parser.add_argument("--out", type=Path, help="where all numbers go")
    options = parser.parse_args(arguments)
    quiet_libraries()

    def found() -> dict[str, Any]:
        python = os.environ.get(PYTHON)
        require(python, f"{PYTHON} does not say which Python has vLLM and plugins/vllm; make test-vllm makes one")
        check_counts(options, "rows", "tokens", "rounds")
        sizes = {"rows": options.rows, "tokens": options.tokens, "rounds": options.rounds}
        try:
            results = {str(run): measure(run, str(python), **sizes) for run in options.runs}
        except Refused as error:
            raise LightPeftError(f"vLLM does not serve this: {error}") from error
        return {**sizes, "results": results}

    return report("vllm_speed", arguments, options.out, found, markdown)


if __name__ == "__main__":
    sys.exit(main())
