"""A light classifier in ONNX Runtime and OpenVINO: does it answer what PyTorch answers, and how fast beside its base?

    python benchmarks/serving.py runs/movie_reviews/minilm_default

The light model, PEFT merged into it, and the untouched base with a head are written as graphs in some data types. All
answer the same held-out rows, one at a time and 32 at a time, on one thread each, in alternation; accuracy is that of
the light model on all held-out rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from publishing import check_counts, markdown_table, report, spread_text
from torch import Tensor
from transformers import PreTrainedModel

from lightpeft.adapters.merging import merged_copy
from lightpeft.app.exports.graphs import sessions
from lightpeft.app.exports.graphs.exporting import write_graph
from lightpeft.app.exports.graphs.runtimes import RUNTIMES, Runtime
from lightpeft.app.exports.graphs.tracing import make_traceable, reads
from lightpeft.app.folders.opening import open_result
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.workspace import Workspace
from lightpeft.errors import require
from lightpeft.models.loading import quiet_libraries
from lightpeft.profiling.comparing import alternate, ratio, summarize
from lightpeft.profiling.sizes import folder_bytes
from lightpeft.profiling.surroundings import version_of
from lightpeft.prune.light_model import LightModel

Inputs = dict[str, Tensor]
Answer = Callable[[Inputs], Tensor]
SIZES = (1, 32)
"""Rows at a time."""
WAYS = {
    "PyTorch, f32": None,
    "ONNX Runtime, f32": ("onnx", "f32", True),
    "ONNX Runtime, int8": ("onnx", "int8", True),
    "OpenVINO, f32": ("openvino", "f32", True),
    "OpenVINO, f32, computed as the CPU likes best": ("openvino", "f32", False),
    "OpenVINO, int8": ("openvino", "int8", False),
}
"""By name: runtime, data type of weights, and whether it computes in 32 bits; None: PyTorch."""


def measure(folder: Path, rounds: int, batches: int) -> dict[str, Any]:
    """Accuracy, times and sizes by way."""
    run = RunFolder.at(folder)
    work = pipeline.prepare(run.config)
    light = open_result(run, work.task)
    require(isinstance(light, LightModel), f"{folder} has no light model")
    models = {"light": make_traceable(merged_copy(light)), "dense": make_traceable(work.dense_model().model)}
    torch.set_num_threads(1)
    with TemporaryDirectory() as place:
        files, answers = served(models, work, Path(place))
        rows = {size: list(batched(work, size)) for size in SIZES}
        right = {name: answered(of["light"], rows[SIZES[-1]]) for name, of in answers.items()}
        speeds = {size: timed(answers, rows[size][:batches], rounds) for size in SIZES}
    first = next(iter(WAYS))
    return {
        "removed_of_blocks": light.light_plan.removed_of_blocks,
        "rows": len(work.task.test),
        "accuracy": {name: float((found == labels(rows[SIZES[-1]])).double().mean()) for name, found in right.items()},
        "same_as_pytorch": {name: int((found == right[first]).sum()) for name, found in right.items()},
        "bytes": files,
        "milliseconds_per_row": {
            size: {key: vars(summarize(values)) for key, values in of.items()} for size, of in speeds.items()
        },
        "light_over_dense": {
            size: {name: vars(ratio(of[f"{name}: dense"], of[f"{name}: light"])) for name in WAYS}
            for size, of in speeds.items()
        },
        "over_pytorch": {
            size: {name: vars(ratio(of[f"{first}: light"], of[f"{name}: light"])) for name in WAYS}
            for size, of in speeds.items()
        },
        "values": speeds,
    }


def served(
    models: Mapping[str, PreTrainedModel], work: Workspace, place: Path
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, Answer]]]:
    """Bytes of the files and what answers, by way and model."""
    sizes: dict[str, dict[str, int]] = {}
    answers: dict[str, dict[str, Answer]] = {}
    for name, way in WAYS.items():
        answers[name] = {}
        for key, model in models.items():
            if way is None:
                answers[name][key] = partial(in_pytorch, model)
                continue
            form, dtype, exact = way
            folder = place / f"{form}-{dtype}-{key}"
            if not folder.exists():
                folder.mkdir()
                write_graph(model, work.tokenizer, RUNTIMES[form], folder, dtype)
            sizes.setdefault(name, {})[key] = folder_bytes(folder)
            answers[name][key] = partial(in_runtime, sessions.load(form, folder, exact=exact))
    return sizes, answers


@torch.inference_mode()
def in_pytorch(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Logits."""
    given = {name: value for name, value in inputs.items() if name != "labels" and reads(model, name)}
    logits: Tensor = model(**given).logits
    return logits


def in_runtime(session: Any, inputs: Inputs) -> Tensor:
    """Logits."""
    logits: Tensor = session.run(inputs)["logits"]
    return logits


def batched(work: Workspace, size: int) -> Iterator[Inputs]:
    """All held-out rows in their order, so many at a time, padded to the longest."""
    rows = work.task.encode_test(work.task.test, work.tokenizer)
    collate = work.task.collator(work.tokenizer)
    for start in range(0, len(rows), size):
        inputs = collate([rows[index] for index in range(start, min(start + size, len(rows)))])
        inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
        yield {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def labels(batches: Sequence[Inputs]) -> Tensor:
    """The right classes."""
    return torch.cat([inputs["labels"] for inputs in batches])


def answered(answer: Answer, batches: Sequence[Inputs]) -> Tensor:
    """The most probable classes."""
    return torch.cat([answer(inputs).argmax(-1) for inputs in batches])


def timed(
    answers: Mapping[str, Mapping[str, Answer]], batches: Sequence[Inputs], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds a row, round by round, by "way: model"."""
    named = {f"{name}: {key}": answer for name, of in answers.items() for key, answer in of.items()}
    return alternate({name: partial(once, answer, batches) for name, answer in named.items()}, rounds)


def once(answer: Answer, batches: Sequence[Inputs]) -> float:
    """Milliseconds a row, behind one batch that is not counted."""
    answer(batches[0])
    started = time.perf_counter()
    for inputs in batches:
        answer(inputs)
    return 1e3 * (time.perf_counter() - started) / sum(len(inputs["input_ids"]) for inputs in batches)


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row a run and way."""
    header = ["", "accuracy", "as PyTorch", "MiB, light", "MiB, dense"]
    for size in SIZES:
        header += [f"ms a row, {size} at a time", "over PyTorch", "over dense"]
    rows = []
    for found in results.values():
        for name in WAYS:
            sizes = found["bytes"].get(name)
            row = [name, f"{found['accuracy'][name]:.4f}", f"{found['same_as_pytorch'][name]} of {found['rows']}"]
            row += [f"{sizes[key] / 2**20:.0f}" if sizes else "" for key in ("light", "dense")]
            for size in SIZES:
                row += [f"{found['milliseconds_per_row'][size][f'{name}: light']['median']:.2f}"]
                row += [spread_text(found[key][size][name]) for key in ("over_pytorch", "light_over_dense")]
            rows.append(row)
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished light runs that classify")
    parser.add_argument("--rounds", type=int, default=9, help="alternations")
    parser.add_argument("--batches", type=int, default=12, help="batches a round")
    parser.add_argument("--out", type=Path, help="where all numbers go")
    options = parser.parse_args(arguments)
    quiet_libraries()

    def found() -> dict[str, Any]:
        check_counts(options, "rounds", "batches")
        for runtime in RUNTIMES.values():
            check(runtime)
        results = {str(run): measure(run, options.rounds, options.batches) for run in options.runs}
        runtimes = {runtime.tool: version_of(runtime.tool) for runtime in RUNTIMES.values()}
        return {"rounds": options.rounds, "batches": options.batches, "runtimes": runtimes, "results": results}

    return report("serving", arguments, options.out, found, markdown)


def check(runtime: Runtime) -> None:
    """Raise `LightPeftError` unless the runtime is here in all data types."""
    require(find_spec(runtime.tool), f'{runtime.title} is not here; pip install "lightpeft[{runtime.name}]"')
    for dtype in runtime.writers:
        runtime.check(dtype)


if __name__ == "__main__":
    sys.exit(main())
