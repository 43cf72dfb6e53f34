"""What a run needs, found before its model is loaded: against what real tensors take, and as users ask for it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lanes import telling
from lights import light_of
from tiny import inputs_for, make, with_lora
from torch import Tensor
from torch.utils._pytree import tree_leaves
from workbench import Workbench

from lightpeft.app import cli
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.checking import Check, check
from lightpeft.app.runs.checking.models import cut_evenly, shapes_of
from lightpeft.app.runs.subject import estimating
from lightpeft.compat.stand_ins import StorageWatch
from lightpeft.config import LightConfig, RunConfig, TrainingConfig
from lightpeft.errors import LightPeftError
from lightpeft.profiling.flops import count_flops
from lightpeft.profiling.rehearsal import Holding, rehearse_inference, rehearse_training, rehearsing
from lightpeft.profiling.sizes import count_parameters
from lightpeft.profiling.speed import measure_training
from lightpeft.training.acceleration import light_steps


class Counted(StorageWatch):
    """Real tensors, counted as stand-ins are."""

    def __init__(self) -> None:
        super().__init__()
        self._stand_ins: Any = nullcontext()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count_storage(tensor)
        return result


def on_meta(name: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return with_lora(make(name, **changes), trained=False)


def held(name: str, light: LightConfig | None, real: bool) -> Holding:
    """A step of plain LoRA, or (with settings) of estimation: in rehearsal, or with real tensors."""
    model = with_lora(make(name), trained=False) if real else on_meta(name)
    batch = inputs_for(with_lora(make(name)), padding="right", labels=True, rows=4, length=12)
    around = light_steps(model, light) if light is not None else nullcontext()

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters)

    def estimates(parameters: Any) -> torch.optim.Optimizer:
        config = RunConfig(light=light or light_of(), training=TrainingConfig(learning_rate=1e-3))
        work: Any = SimpleNamespace(config=config)
        return estimating(work, model)(parameters)

    maker = optimizer if light is None else estimates
    if not real:
        with rehearsing(model, "cpu") as watch:
            return rehearse_training(model, watch, shapes_of(batch), maker, around)
    with Counted() as watch:
        for tensor in [*model.parameters(), *model.buffers()]:
            watch.count_storage(tensor)
        given = {key: watch.count_storage(torch.empty_like(value)).copy_(value) for key, value in batch.items()}
        made = maker([parameter for parameter in model.parameters() if parameter.requires_grad])
        watch.peak = watch.now
        with around:
            measure_training(model, [given], lambda _: made, steps=1, warmup=0)
        return Holding(0, 0, watch.peak, 0, 0)


@pytest.mark.parametrize("light", [None, light_of(dropout=0.0)], ids=["plain", "estimation"])
@telling(
    "name",
    ["bert", "mpnet", "llama-gqa", "gpt2", "t5", "mixtral", "gpt_oss", "deepseek_v3"],
    {"bert", "llama-gqa", "mixtral"},
)
def test_a_rehearsal_holds_what_real_tensors_take(name: str, light: LightConfig | None) -> None:
    rehearsed, real = held(name, light, real=False), held(name, light, real=True)
    state = 2 * count_parameters(with_lora(make(name))).trainable * 4
    found = rehearsed.weights + rehearsed.trained + rehearsed.activations - state
    assert found == pytest.approx(real.activations, rel=0.002)
    assert rehearsed.flops > 0


@telling("name", ["bert", "llama-gqa", "mixtral", "qwen2_moe"], {"bert", "mixtral"})
def test_a_rehearsal_counts_what_real_steps_compute(name: str) -> None:
    model = with_lora(make(name))
    batch = inputs_for(model, padding="right", labels=True, rows=4, length=12)
    real = count_flops(model, batch)
    empty = on_meta(name)
    with rehearsing(empty, "cpu") as watch:
        trained = rehearse_training(empty, watch, shapes_of(batch), torch.optim.AdamW, nullcontext())
        inferred = rehearse_inference(empty, watch, shapes_of(batch), None)
    assert (trained.flops, inferred.flops) == (real.training, real.forward)
    assert inferred.activations < trained.activations and inferred.total < trained.total


def widths(name: str, light: LightConfig) -> list[int]:
    """Neurons of each block of a model of which nothing is known, behind the cut."""
    model = on_meta(name)
    cut_evenly(model, light)
    inner = [module for name, module in model.named_modules() if name.endswith("gate_proj.base_layer")]
    return [module.out_features for module in inner]


def test_a_cut_of_nothing_known_takes_about_the_same_part_everywhere() -> None:
    found = widths("llama-gqa", light_of(blocks=0.5, modules=0.0, ranks=0.5))
    assert len(set(found)) == len(found), "as where neurons of all blocks compete"
    assert all(12 <= width <= 36 for width in found) and 22 <= sum(found) / len(found) <= 26
    same = light_of(heads=0.5, neurons=0.5, modules=0.0, ranks=0.5, scope="layerwise")
    assert widths("llama-gqa", same) == [24] * len(found)


def test_kernels_of_every_shape_take_memory_on_a_cpu() -> None:
    """Those that are compiled: of products in half precision."""
    batch = inputs_for(with_lora(make("llama-gqa")), padding="right", labels=True, rows=4, length=12)

    def overhead(lengths: int, autocast: torch.dtype | None) -> int:
        model = on_meta("llama-gqa", num_hidden_layers=1)
        options: dict[str, Any] = {"autocast": autocast, "lengths": lengths}
        with rehearsing(model, "cpu") as watch:
            return rehearse_training(
                model, watch, shapes_of(batch), torch.optim.AdamW, nullcontext(), **options
            ).overhead

    once, three, many = (overhead(lengths, torch.bfloat16) for lengths in (1, 3, 10**6))
    assert once < three < many < 2**30 and many == overhead(10**7, torch.bfloat16), "no more than are kept"
    assert overhead(1, None) == overhead(3, None)


# -- of runs ---------------------------------------------------------------------------------------------------------


def checked(bench: Workbench, name: str = "run", **settings: Any) -> Check:
    return check(pipeline.prepare(bench.config(name, **settings)))


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral"])
def test_stages_of_a_run(tmp_path: Path, family: str) -> None:
    bench = Workbench(tmp_path, family)
    found = checked(bench, **{"light.remove.blocks": 0.5})
    assert list(found.stages) == ["plain", "estimate", "train", "evaluate"]
    plain, estimate, train, _ = found.stages.values()
    assert train.holding.weights < estimate.holding.weights == plain.holding.weights
    assert plain.steps == estimate.steps + train.steps
    assert found.fits and found.flops_of_plain < 1
    assert json.dumps(found.facts())
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "plain"},
        {"light.remove.blocks": "auto"},
        {"light.remove.depth": 0.5},
        {"peft": "bottleneck"},
        {"training.gradient_checkpointing": True, "model.dtype": "bfloat16"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_runs(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = checked(Workbench(tmp_path), **settings)
    assert all(need.holding.total > 0 and need.flops > 0 for need in found.stages.values())
    assert (list(found.stages) == ["plain"]) == ("method" in settings)


def test_what_does_not_fit(tmp_path: Path) -> None:
    """Activations, and weights by themselves."""
    work = pipeline.prepare(Workbench(tmp_path).config("run"))
    whole = check(work)
    need = whole.stages["plain"].holding
    found = check(work, need.weights + need.trained + need.overhead)
    assert not found.fits and found.left > 0
    assert any("set training.gradient_checkpointing" in line for line in found.summary())
    found = check(work, whole.available - whole.left)
    assert not found.fits and found.left == 0
    assert any("at any batch size" in line for line in found.summary())
    assert not any("at any batch size" in line for line in whole.summary())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.quantization": "nf4"}, "is quantized; leave model.quantization unset"),
        ({"model.low_memory": True}, "set model.low_memory to false"),
        ({"method": "full"}, "check does not support method full"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_is_not_gone_through(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    work = pipeline.prepare(Workbench(tmp_path).config("run", **settings))
    with pytest.raises(LightPeftError, match=said):
        check(work)


def test_steps_at_full_width_are_a_stage(tmp_path: Path) -> None:
    settings = {"light.after.keep": "full", "light.after.full_width_steps": 0.25, "light.remove.blocks": 0.5}
    work = pipeline.prepare(Workbench(tmp_path, "llama", "causal-lm").config("run", **settings))
    found = check(work)
    assert list(found.stages) == ["plain", "estimate", "train", "full width", "evaluate"]
    wide, small = found.stages["full width"], found.stages["train"]
    assert wide.steps == work.last_steps > 0 and wide.holding.weights > small.holding.weights
    assert sum(found.stages[name].steps for name in found.own if name != "evaluate") == work.steps


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = Workbench(tmp_path).yaml("tiny"), tmp_path / "needs.json"
    cli.main(["check", "--config", str(config), "--json", str(out)])
    shown = capsys.readouterr().out
    assert "estimate" in shown and "fits into" in shown
    assert all(len(line) <= 80 for line in shown.splitlines()[:7])
    facts = json.loads(out.read_text())
    a_byte_less = (facts["stages"][facts["largest"]]["total"] - 1) / 2**30
    cli.main(["check", "--config", str(config), "--memory", str(a_byte_less)])
    assert "does not fit" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        cli.main(["check", "--config", str(config), "--memory", "-1"])
    assert refused.value.code == 2 and "--memory: -1 GiB" in capsys.readouterr().err
