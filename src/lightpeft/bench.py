"""Plain PEFT beside the light model: speed, memory and FLOPs, each subject in a process of its own, in alternation.

The same batches, padding, batch size and data type go to all. Only one process computes at a time, so that on a noisy
machine a drift falls on all subjects alike; ratios are taken within rounds.
"""

from __future__ import annotations

import copy
import multiprocessing
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from lightpeft import pipeline
from lightpeft.checkpoint import load_light
from lightpeft.config import RunConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.loading import add_peft, quiet_libraries
from lightpeft.pipeline import Workspace
from lightpeft.profiling import (
    PeakMemory,
    alternate,
    count_flops,
    hardware,
    measure_inference,
    measure_training,
    ratio,
    summarize,
)
from lightpeft.pruner import EarlyPruner
from lightpeft.records import EstimationRecord, write_json

SUBJECTS = ("plain", "estimation", "light")
"""Plain PEFT on the dense model, the estimation stage, and the pruned model."""
_MEASURED_STEPS = 3
"""Training steps of the memory measurement: the second allocates nothing new but the optimizer's state."""


def bench(config: RunConfig, rounds: int = 5, steps: int = 20, json: str | Path | None = None) -> dict[str, Any]:
    """Measure the run of `config` against plain PEFT, and write the result to `json`.

    A run that has not been pruned yet is estimated, planned and pruned first.

    Args:
        rounds: alternations; medians and quartiles are over rounds.
        steps: batches a round.

    Returns:
        By subject: samples/s in training and inference (merged weights where they can be merged), peak
        memory, FLOPs; ratios to plain PEFT; and the end-to-end time of a whole run computed from the medians,
        estimation included.
    """
    require(rounds >= 1 and steps >= 1, "bench.rounds and bench.steps start at 1")
    config = replace(config, method="light")
    work = pipeline.prepare(config)
    pipeline.estimate(work)
    pipeline.plan(work.run)
    pipeline.prune(work)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, config, steps)) for name in SUBJECTS}
        fixed = {name: worker.measure("fixed") for name, worker in workers.items()}
        training = alternate(_calls(workers, "training"), rounds)
        inference = alternate(_calls({n: workers[n] for n in ("plain", "light")}, "inference"), rounds)
    report = {
        "subjects": {
            name: {
                **fixed[name],
                "training_samples_per_second": asdict(summarize(training[name])),
                **({"inference_samples_per_second": asdict(summarize(inference[name]))} if name in inference else {}),
            }
            for name in SUBJECTS
        },
        "ratios": _ratios(training, inference, fixed),
        "end_to_end": _end_to_end(work, training),
        "rounds": rounds,
        "steps": steps,
        "values": {"training": training, "inference": inference},
        "hardware": hardware(),
        "config": asdict(config),
    }
    write_json(json or work.run.path / "bench.json", report)
    return report


class Worker:
    """A process that holds one subject's model and measures it when asked."""

    def __init__(self, subject: str, config: RunConfig, steps: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._far_end, subject, config, steps), daemon=True)

    def __enter__(self) -> Worker:
        self._process.start()
        self._far_end.close()  # so that the pipe ends when the process does
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=5)  # it ends with the pipe, unless it is in the middle of something
        self._process.terminate()
        self._process.join()

    def measure(self, what: str) -> Any:
        """Send a request ("fixed", "training" or "inference") and wait for the answer.

        Raises:
            LightPeftError: the measurement failed.
        """
        try:
            with suppress(BrokenPipeError):  # it ended, perhaps with a failure to be read
                self._pipe.send(what)
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise LightPeftError("a measuring process ended early; is there memory for three models?") from error
        if isinstance(answer, Failure):
            raise LightPeftError(f"measuring failed: {answer.reason}")
        return answer


class Failure:
    """What a measuring process answers when it cannot measure."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _serve(pipe: Connection, subject: str, config: RunConfig, steps: int) -> None:
    """Build the subject's model once, then answer requests until the pipe is closed."""
    quiet_libraries()
    try:
        measure = Subject(subject, config, steps)
        while True:
            pipe.send(getattr(measure, pipe.recv())())
    except EOFError:
        return
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error) if isinstance(error, LightPeftError) else traceback.format_exception_only(error)[-1]
        pipe.send(Failure(" ".join(reason.split())))


class Subject:
    """One subject's model and the batches that all subjects share."""

    def __init__(self, name: str, config: RunConfig, steps: int) -> None:
        set_seed(config.seed)
        self.config = config
        work = pipeline.prepare(config)
        self.batches = sample_batches(work, steps)
        self.model, self.optimizer = BUILDERS[name](work)

    def fixed(self) -> dict[str, Any]:
        """Peak memory of training and FLOPs of one batch, which do not vary."""
        with PeakMemory(self.model) as memory:
            self._train(self.batches[:_MEASURED_STEPS])
        flops = count_flops(self.model, max(self.batches, key=lambda batch: batch["input_ids"].numel()))
        return {
            "peak_memory_bytes": memory.bytes,
            "peak_memory_method": memory.method,
            "flops": {"forward": flops.forward, "training": flops.training},
        }

    def training(self) -> float:
        """Training samples a second: forward, backward, clipping and optimizer step."""
        return self._samples() / sum(self._train(self.batches))

    def inference(self) -> float:
        """Inference samples a second, with merged weights where they can be merged."""
        if isinstance(self.model, PeftModel) and self.config.peft == "lora":
            self.model = copy.deepcopy(self.model).merge_and_unload()
        return self._samples() / sum(measure_inference(self.model, self.batches, bf16=self.config.training.bf16))

    def _samples(self) -> int:
        return sum(len(batch["input_ids"]) for batch in self.batches)

    def _train(self, batches: Sequence[Mapping[str, Any]]) -> list[float]:
        training = self.config.training
        return measure_training(
            self.model, batches, self.optimizer, bf16=training.bf16, max_grad_norm=training.max_grad_norm
        )


def sample_batches(work: Workspace, steps: int) -> list[dict[str, Any]]:
    """The first batches that a run would train on: of similar length, padded to the longest."""
    size = work.config.training.batch_size
    lengths = work.train_rows["length"][:]
    sampler = LengthGroupedSampler(size, lengths=lengths, generator=torch.Generator().manual_seed(work.config.seed))
    order = list(sampler)
    # the sampler puts the longest batch first; take batches all over the epoch
    starts = range(0, max(len(order) - size, 0) + 1, size)
    picked = [starts[index * len(starts) // steps] for index in range(min(steps, len(starts)))]
    rows = [work.train_rows.select(order[start : start + size]).to_list() for start in picked]
    return [work.collator(batch) for batch in rows]


def _plain(work: Workspace) -> tuple[nn.Module, Callable[..., torch.optim.Optimizer]]:
    config = work.config
    return add_peft(pipeline.dense_model(work), replace(config, method="plain")), _adamw(work)


def _estimation(work: Workspace) -> tuple[nn.Module, Callable[..., torch.optim.Optimizer]]:
    """The dense model with all PEFT modules, masks and observers on; the masks train in the optimizer's step."""
    config = work.config
    model = add_peft(pipeline.dense_model(work), config)
    pruner = EarlyPruner(model, replace(config.light, length=10**9))
    pruner.start()

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made = _adamw(work)(parameters)
        made.register_step_pre_hook(lambda *_: pruner.step())
        return made

    return model, optimizer


def _light(work: Workspace) -> tuple[nn.Module, Callable[..., torch.optim.Optimizer]]:
    return load_light(work.run.pruned, pipeline.dense_model(work).model, is_trainable=True), _adamw(work)


BUILDERS = {"plain": _plain, "estimation": _estimation, "light": _light}
"""Subject -> its model and the factory of its optimizer."""


def _adamw(work: Workspace) -> Callable[..., torch.optim.Optimizer]:
    training = work.config.training
    return lambda parameters: torch.optim.AdamW(
        parameters, lr=training.learning_rate, weight_decay=training.weight_decay
    )


def _calls(workers: Mapping[str, Worker], what: str) -> dict[str, Callable[[], float]]:
    return {name: lambda worker=worker: worker.measure(what) for name, worker in workers.items()}  # type: ignore[misc]


def _ratios(
    training: Mapping[str, list[float]], inference: Mapping[str, list[float]], fixed: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Light over plain PEFT, and estimation over plain PEFT; paired by round where rounds exist."""
    return {
        "training_throughput": asdict(ratio(training["light"], training["plain"])),
        "inference_throughput": asdict(ratio(inference["light"], inference["plain"])),
        "estimation_throughput": asdict(ratio(training["estimation"], training["plain"])),
        "peak_memory": fixed["light"]["peak_memory_bytes"] / max(fixed["plain"]["peak_memory_bytes"], 1),
        "training_flops": fixed["light"]["flops"]["training"] / fixed["plain"]["flops"]["training"],
        "inference_flops": fixed["light"]["flops"]["forward"] / fixed["plain"]["flops"]["forward"],
    }


def _end_to_end(work: Workspace, training: Mapping[str, list[float]]) -> dict[str, float]:
    """Seconds of whole runs of equal steps, from the medians; light counts estimation and surgery."""
    step_seconds = {
        name: work.config.training.batch_size * work.config.training.gradient_accumulation / summarize(values).median
        for name, values in training.items()
    }
    estimation_steps = EstimationRecord.load(work.run.estimation).meta["steps"]
    surgery = work.run.stage_seconds().get("prune", 0.0)
    estimation = estimation_steps * step_seconds["estimation"]
    light = estimation + surgery + (work.steps - estimation_steps) * step_seconds["light"]
    plain = work.steps * step_seconds["plain"]
    return {
        "steps": work.steps,
        "estimation_steps": estimation_steps,
        "plain_seconds": plain,
        "light_seconds": light,
        "light_estimation_seconds": estimation,
        "light_over_plain": light / plain,
    }
