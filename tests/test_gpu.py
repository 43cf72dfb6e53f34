"""What a GPU may do otherwise than a CPU. Each check is a function of a device: `make test-all` runs it on the CPU,
`make test-gpu` on a CUDA device, where the first failure says what differs, in what precision, and by how much.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import thorough
from lights import light_of
from peft import PeftModel
from quantized import CONFIGS, SIZES, densified
from single_steps import gradients
from support import logits
from tiny import DROPPED, LAYOUTS, USUAL, inputs_for, make, masked, plan_for, relative_difference, with_lora
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import estimate, one_light_training, student
from transformers import AutoModelForCausalLM
from workbench import Workbench

from lightpeft import load_light, run
from lightpeft.machine import autocasting, has_bf16
from lightpeft.models.linears.bitsandbytes import prepare_quantized
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.live import move_batch, trainable
from lightpeft.profiling.memory import PeakMemory
from lightpeft.profiling.speed import measure_inference, measure_training
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan
from lightpeft.training.acceleration import accelerated

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
on_a_cpu = pytest.param("cpu", marks=thorough)
everywhere = pytest.mark.parametrize("device", [on_a_cpu, pytest.param("cuda", marks=on_a_gpu)])
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02, torch.int8: 0.25}
"""Relative difference that is left to another order of sums, by the type that they are computed in."""
FLOATS = [dtype for dtype in BOUNDS if dtype.is_floating_point]
FEW = ["bert", "llama-gqa"]
Step = tuple[Tensor, dict[str, Tensor]]
"""A loss, and the gradients of what trains, by name."""


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """Products of float32 in float32: TF32 keeps 10 bits, and would hide what is looked for."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Within the bound of a type; a failure says by how much not, and where."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} instead of {tuple(expected.shape)}"
    place = f"{what}, computed in {dtype} on {found.device}"
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    lost = int((~found.isfinite()).sum())
    assert not lost, f"{place}: {lost} of {found.numel()} values are NaN or infinite"
    difference, bound = relative_difference(found, expected), BOUNDS[dtype]
    assert difference < bound, f"{place}: relative difference {difference:.2e}, at most {bound:.0e} was expected"


def assert_steps_near(found: Step, expected: Step, dtype: torch.dtype, what: str) -> None:
    """The same loss, and the same gradients of all that trains, taken as one vector."""
    assert_near(found[0], expected[0], dtype, f"{what}, loss")
    assert found[1].keys() == expected[1].keys(), f"{what}: other parameters have a gradient"
    assert all(gradient.isfinite().all() for gradient in found[1].values()), f"{what}: a gradient is NaN or infinite"
    far = {name: (gradient.float() - expected[1][name].float()).norm() for name, gradient in found[1].items()}
    whole = torch.stack([gradient.float().norm() for gradient in expected[1].values()]).norm()
    difference, bound = float(torch.stack([*far.values()]).norm() / whole), BOUNDS[dtype]
    most = max(far, key=lambda name: float(far[name]))
    said = f"relative difference {difference:.2e}, at most {bound:.0e} was expected; most of it in {most}"
    assert difference < bound, f"{what}, gradients in {dtype} on {whole.device}: {said}"


def given(model: nn.Module, device: str, **options: Any) -> dict[str, Tensor]:
    """A batch on the device, in the model's type."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    inputs = move_batch(inputs_for(model, **options), torch.device(device))
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def pair(
    name: str, device: str, budget: dict[str, Any], dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[PeftModel, PeftModel, PrunePlan]:
    """(masked reference, pruned model, plan), masked and cut on the device."""
    model = with_lora(make(name, **changes).to(dtype)).to(device)
    plan = plan_for(model, **budget)
    reference = masked(model, plan)
    apply_plan(model, plan)
    return reference, model, plan


# -- masks and surgery -------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_masks_and_surgery_give_the_same(name: str, dtype: torch.dtype, device: str) -> None:
    reference, pruned, _ = pair(name, device, DROPPED, dtype)
    for padding in ("right", "left", "none"):
        inputs = given(pruned, device, padding=padding)
        what = f"{name}, padded {padding}, pruned beside masked"
        assert_near(logits(pruned, inputs), logits(reference, inputs), dtype, what)


@everywhere
@pytest.mark.parametrize("name", LAYOUTS)
def test_surgery_leaves_what_it_leaves_on_a_cpu(name: str, device: str) -> None:
    """To the last bit, and all of it on the device."""
    model = with_lora(make(name))
    plan = plan_for(model, **DROPPED)
    there = copy.deepcopy(model).to(device)
    for each in (model, there):
        apply_plan(each, plan)
    places = {tensor.device.type for tensor in (*there.parameters(), *there.buffers())}
    assert places == {device}, f"{name}: parts of the pruned model are on {sorted(places)}"
    ours, theirs = model.state_dict(), there.state_dict()
    assert ours.keys() == theirs.keys()
    other = [key for key, tensor in ours.items() if not tensor.equal(theirs[key].cpu())]
    assert not other, f"{name}: {len(other)} of {len(ours)} tensors differ from those cut on the CPU, as {other[0]}"
    here = logits(model, given(model, "cpu"))
    assert_near(logits(there, given(there, device)), here, torch.float32, f"{name}, beside the CPU")


@everywhere
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["llama-gqa", "opt", "t5"])
def test_generates_the_same_tokens(name: str, cache: dict[str, Any], device: str) -> None:
    reference, pruned, _ = pair(name, device, DROPPED)
    inputs = given(pruned, device, padding="left", generate=True)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected, found = reference.generate(**inputs, **settings), pruned.generate(**inputs, **settings, **cache)
    other = int((found != expected).sum())
    assert not other, f"{name}, {cache}: {other} of {found.numel()} tokens differ on {device}"


@everywhere
@pytest.mark.parametrize("name", FEW)
def test_a_light_adapter_is_loaded_to_the_last_bit(name: str, device: str, tmp_path: Path) -> None:
    model = with_lora(make(name)).to(device)
    plan = plan_for(model, **DROPPED)
    apply_plan(model, plan)
    as_light(model, plan).save_pretrained(tmp_path)
    inputs = given(model, device)
    expected = logits(model, inputs)
    for base, place in ((make(name).to(device), None), (make(name), device)):
        found = logits(load_light(tmp_path, base, device=place), inputs)
        difference = relative_difference(found, expected)
        assert found.equal(expected), f"{name}, base first on {'the CPU' if place else device}: {difference:.2e}"


# -- attention ---------------------------------------------------------------------------------------------------------

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


@everywhere
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", FEW)
def test_kernels_of_attention(name: str, kernel: str, device: str) -> None:
    """Layers of unequal numbers of heads, in each kernel that PyTorch has on the device. Flash takes no padding."""
    if device == "cpu" and kernel == "efficient":
        pytest.skip("a kernel of GPUs")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    reference, pruned, _ = pair(name, device, USUAL, dtype)
    inputs = given(pruned, device, padding="none" if kernel == "flash" else "right")
    if kernel == "flash":
        del inputs["attention_mask"]
    with sdpa_kernel(KERNELS[kernel]):
        found = logits(pruned, inputs)
    assert_near(found, logits(reference, inputs), dtype, f"{name}, {kernel} attention")


@everywhere
@pytest.mark.parametrize("name", FEW)
def test_attention_of_another_package(name: str, device: str) -> None:
    """`flash_attention_2` where flash-attn is installed; on the CPU, `eager`, the other one."""
    if device == "cuda":
        pytest.importorskip("flash_attn")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    attention = "flash_attention_2" if device == "cuda" else "eager"
    _, pruned, _ = pair(name, device, USUAL, dtype, attn_implementation=attention)
    reference, _, _ = pair(name, device, USUAL, dtype)
    for padding in ("right", "left", "none"):
        inputs = given(pruned, device, padding=padding)
        what = f"{name}, {attention} beside sdpa, padded {padding}"
        assert_near(logits(pruned, inputs), logits(reference, inputs), dtype, what)


# -- estimation --------------------------------------------------------------------------------------------------------


def assert_scores(found: EstimationRecord, expected: EstimationRecord, bound: float, what: str) -> None:
    """The same scores under every criterion, up to a part of the largest one."""
    assert found.scores.keys() == expected.scores.keys()
    places = {score.device.type for score in found.scores.values()}
    assert places == {"cpu"}, f"{what}: scores of a record are on {sorted(places)}"
    far = {key: relative_difference(found.scores[key], value) for key, value in expected.scores.items()}
    key = max(far, key=lambda each: math.inf if math.isnan(far[each]) else far[each])
    assert far[key] <= bound, f"{what}: scores {key} differ by {far[key]:.2e} of the largest, at most {bound:.0e}"


@everywhere
@pytest.mark.parametrize("name", ["bert", "llama-classifier"])
def test_scores_are_those_of_a_cpu(name: str, device: str) -> None:
    records = [estimate(student(name).to(place), steps=4).record() for place in ("cpu", device)]
    assert_scores(records[1], records[0], 1e-3, f"{name}, estimated on {device}")
    assert records[0].fingerprint == records[1].fingerprint, f"{name}: another fingerprint of the base on {device}"


@everywhere
def test_a_stage_goes_on_from_its_state(device: str, tmp_path: Path) -> None:
    """What was saved is put on the device again, the state of the masks' optimizer included."""

    def stage(first: int, last: int) -> Estimator:
        estimator = Estimator(student().to(device), light_of(length=4))
        estimator.start(total_steps=None)
        if first:
            estimator.load_state(tmp_path)
        for step in range(first, last):
            data = inputs_for(estimator.model, labels=True, seed=step)
            estimator.model(**move_batch(data, torch.device(device))).loss.backward()
            estimator.step()
            estimator.model.zero_grad()
        return estimator

    whole = stage(0, 4).record()
    stage(0, 2).save_state(tmp_path)
    assert_scores(stage(2, 4).record(), whole, 1e-5, f"resumed on {device}")


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_in_half_precision(dtype: torch.dtype, device: str) -> None:
    """Under autocast, in float16 with a scaler, whose scale must not be in the scores."""
    records = []
    for half in (None, dtype):
        model = student().to(device)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=half is torch.float16)
        estimator = Estimator(model, light_of(length=2))
        estimator.start(total_steps=None)
        for step in range(2):
            data = inputs_for(model, labels=True, rows=8, length=20, seed=step)
            with autocasting(torch.device(device), half):
                loss = model(**move_batch(data, torch.device(device))).loss
            scaler.scale(loss).backward()
            estimator.step(grad_scale=scaler.get_scale())
        estimator.stop()
        records.append(estimator.record())
    for kind in ("heads", "neurons"):
        pairs = torch.stack([torch.cat(record.block_scores(kind, "taylor")) for record in records])
        alike, sizes = float(torch.corrcoef(pairs)[0, 1]), pairs.norm(dim=1)
        said = f"{kind}: scores in {dtype} on {device}, beside those in float32,"
        assert alike > 0.98, f"{said} correlate {alike:.3f}"
        assert abs(float(sizes[1] / sizes[0]) - 1) < 0.1, f"{said} are {float(sizes[1] / sizes[0]):.3g} times as large"


# -- training ----------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_faster_steps_are_those_of_peft(name: str, dtype: torch.dtype, device: str) -> None:
    """The same loss, and gradients as near those of float32 as PEFT's are."""
    model = with_lora(make(name)).to(device)
    inputs = given(model, device, labels=True)
    exact = gradients(model, inputs)
    with autocasting(torch.device(device), None if dtype is torch.float32 else dtype), accelerated(model):
        found = gradients(model, inputs)
    assert_steps_near(found, exact, dtype, f"{name}, faster steps")


@everywhere
def test_a_light_trainer_cuts_and_trains(device: str, tmp_path: Path) -> None:
    trainer = one_light_training(tmp_path, use_cpu=device == "cpu", logging_steps=1)
    trainer.train()
    places = {parameter.device.type for parameter in trainer.model.parameters()}
    assert places == {device}, f"after the cut the model is on {sorted(places)}"
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 16 and all(map(math.isfinite, losses)), f"losses on {device}: {losses}"
    data = move_batch(inputs_for(trainer.model, labels=True), torch.device(device))
    losses = losses_of_steps(trainer.model, data, torch.optim.AdamW(trainable(trainer.model), lr=1e-2))
    said = f"on one batch behind the cut the loss went from {losses[0]:.3f} to {losses[-1]:.3f} on {device}"
    assert losses[-1] < 0.9 * losses[0], said


def losses_of_steps(model: nn.Module, data: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    """The losses of six steps on one batch."""
    losses = []
    for _ in range(6):
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


WAYS: dict[str, dict[str, Any]] = {
    "float32": {"training.precision": "float32"},
    "bf16": {"training.precision": "bf16"},
    "fp16": {"training.precision": "fp16"},
    "cached prefix": {"light.modules.blocks": 0.5},
    "weights on disk": {"model.low_memory": True},
}
"""Settings of runs that move tensors between host and device in their own ways."""


def runs() -> list[Any]:
    """Runs take the device that is there. That a CPU trains in float16 has to be made up, as test_float16.py does."""
    cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a run takes the CUDA device that is here")
    cases = [pytest.param("cpu", way, marks=[cpu, thorough]) for way in WAYS if way != "fp16"]
    return cases + [pytest.param("cuda", way, marks=on_a_gpu) for way in WAYS]


@pytest.mark.parametrize(("device", "way"), runs())
@pytest.mark.parametrize("family", FEW)
def test_a_run_learns(family: str, way: str, device: str, tmp_path: Path) -> None:
    if device == "cpu" and family != "bert" and way not in ("float32", "bf16"):
        pytest.skip("one family says it on a CPU")
    if way == "bf16" and device == "cuda" and not has_bf16():
        pytest.skip("this GPU has no bfloat16")
    bench = Workbench(tmp_path, family.partition("-")[0], "classification")
    result = run(bench.config("run", **WAYS[way]))
    loss, untrained = result["metrics"]["loss"], math.log(2)
    assert loss < untrained - 0.02, f"{family}, {way}, on {device}: loss {loss:.3f}, untrained {untrained:.3f}"
    light = load_light(tmp_path / "run" / "adapter", device=device)
    places = {parameter.device.type for parameter in light.parameters()}
    assert places == {device}, f"{family}, {way}: loaded on {sorted(places)}"


# -- 4 and 8 bits ------------------------------------------------------------------------------------------------------

NARROW = {"hidden_size": 160, "intermediate_size": 224, "head_dim": 16}
"""Sizes that are no multiples of a block of 64, which kernels treat apart."""


def load_quantized(folder: Path, kind: str, device: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CONFIGS[kind](), dtype=torch.float32, device_map={"": device}
    )
    prepare_quantized(model)
    return model


@everywhere
@pytest.mark.parametrize("sizes", [SIZES, NARROW], ids=["whole blocks", "narrow"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_quantized_bases(kind: str, sizes: dict[str, Any], device: str, tmp_path: Path) -> None:
    """Cut, it computes with the weights that it stands for, learns, and is loaded to the last bit."""
    make("llama-gqa", **sizes).save_pretrained(tmp_path / "base")
    model = with_lora(load_quantized(tmp_path / "base", kind, device), lora_dropout=0.0)
    plan = plan_for(model, heads=0.5, neurons=0.5, modules=0.3, multiple_of=64 if sizes is SIZES else 1)
    apply_plan(model, plan)
    inputs = given(model, device)
    dense = densified(model).to(device)
    computed = torch.int8 if kind == "int8" else torch.float32  # it rounds what goes in, too; others the weights alone
    one_token = {name: value[:1, :1] for name, value in inputs.items()}  # for which there are kernels of their own
    for what, data in (("a batch", inputs), ("one token", one_token)):
        name = f"{kind} beside its weights in a dense model, {what}"
        assert_near(logits(model, data), logits(dense, data), computed, name)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    data = move_batch(inputs_for(model, labels=True), torch.device(device))
    losses = losses_of_steps(model.train(), data, optimizer)
    assert losses[-1] < 0.9 * losses[0], f"{kind} on {device}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    expected = logits(model.eval(), inputs)
    as_light(model, plan).save_pretrained(tmp_path / "light")
    loaded = load_light(tmp_path / "light", base=load_quantized(tmp_path / "base", kind, device))
    found = logits(loaded, inputs)
    assert found.equal(expected), f"{kind} on {device}, loaded: {relative_difference(found, expected):.2e}"


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "device"),
    [pytest.param("bert", "cpu", marks=thorough), *(pytest.param(name, "cuda", marks=on_a_gpu) for name in FEW)],
)
def test_compiled(name: str, device: str) -> None:
    """Layers of unequal widths, forward and backward: what Inductor makes for a GPU; for the CPU, the graph alone."""
    _, pruned, _ = pair(name, device, DROPPED)
    inputs = given(pruned, device, labels=True)
    torch.compiler.reset()
    compiled = torch.compile(pruned, backend="inductor" if device == "cuda" else "aot_eager")
    plain, found = (gradients(each, inputs) for each in (pruned, Named(pruned, compiled)))
    torch.compiler.reset()
    assert_steps_near(found, plain, torch.float32, f"{name}, compiled")


class Named:
    """A compiled model that gives the names of parameters of the model that it was made of."""

    def __init__(self, model: nn.Module, compiled: Callable[..., Any]) -> None:
        self.zero_grad, self.named_parameters, self._compiled = model.zero_grad, model.named_parameters, compiled

    def __call__(self, **inputs: Tensor) -> Any:
        return self._compiled(**inputs)


# -- memory and time ---------------------------------------------------------------------------------------------------

LARGE = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 67}
"""Weights of blocks that are much more than what an allocator rounds."""


def held(model: nn.Module, device: str) -> int:
    """Bytes that a model holds: what the CUDA allocator gave out, or on the CPU its tensors' storages."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@everywhere
@pytest.mark.parametrize("name", FEW)
def test_surgery_gives_memory_back(name: str, device: str) -> None:
    model = with_lora(make(name, **LARGE)).to(device)
    plan = plan_for(model, **USUAL)
    before = held(model, device)
    apply_plan(model, plan)
    freed, removed = before - held(model, device), 4 * plan.removed_parameters
    assert freed > 0.95 * removed, f"{name}: {freed:,} bytes are free on {device} of {removed:,} that were cut"


@everywhere
def test_peaks_are_those_of_the_device(device: str) -> None:
    """In the allocator's numbers a step of the light model takes less than one of the dense model by the weights that
    are gone, at least; the resident memory of a process, which is read on a CPU, says less."""
    peaks, removed = [], 0
    for light in (False, True):
        model = with_lora(make("llama-gqa", **LARGE)).to(device)
        if light:
            plan = plan_for(model, **USUAL)
            apply_plan(model, plan)
            removed = 4 * plan.removed_parameters
        data = inputs_for(model, labels=True, rows=8, length=64, padding="none")
        with PeakMemory(model) as memory:
            measure_training(model, [data], torch.optim.SGD, steps=2, warmup=1)
        assert (memory.method == "cuda") == (device == "cuda")
        peaks.append(memory.bytes)
        del model
    if device == "cuda":
        said = f"dense {peaks[0]:,} bytes, light {peaks[1]:,}, with {removed:,} bytes of weights less"
        assert peaks[0] - peaks[1] > 0.95 * removed, said


@everywhere
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_steps_are_timed(dtype: torch.dtype | None, device: str) -> None:
    model = with_lora(make("bert")).to(device)
    data = [inputs_for(model, labels=True)]
    trained = measure_training(model, data, torch.optim.SGD, steps=3, warmup=1, autocast=dtype)
    answered = measure_inference(model, data, steps=3, warmup=1, autocast=dtype)
    assert len(trained) == len(answered) == 3 and min(*trained, *answered) > 0
