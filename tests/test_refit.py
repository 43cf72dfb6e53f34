"""Refit: what a cut took from attention and FFN outputs comes back, as far as the units that stay can give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.config import LightConfig
from lightpeft.errors import LightPeftError
from lightpeft.models.linears import add_to_linear, dense_weight
from lightpeft.models.unwrap import base_linear, transformers_model
from lightpeft.plans.layout import kept_channels
from lightpeft.plans.records import PrunePlan
from lightpeft.prune import refit as refitting
from lightpeft.prune.refit import apply_refit, fit_refit
from lightpeft.prune.surgery import apply_plan
from lightpeft.recipe.pruner import EarlyPruner, cut
from lightpeft.saved.light_adapter import as_light, load_light

FAMILIES = ["bert", "distilbert", "llama-gqa", "gpt2", "opt", "phi3", "t5", "bart", "modernbert"]
BUDGET = {"heads": 0.5, "neurons": 0.5}


def student(name: str = "bert", **lora: Any) -> PeftModel:
    return tiny.without_dropout(tiny.with_lora(tiny.make(name), **lora))


def rows(model: nn.Module, count: int = 4) -> list[dict[str, Tensor]]:
    """Calibration batches, more tokens in all than any projection has inputs."""
    return [tiny.inputs_for(model, rows=8, length=16, seed=seed) for seed in range(count)]


def errors(model: PeftModel, plan: PrunePlan, wanted: dict[str, Tensor]) -> float:
    """Mean squared distance of the outputs that `plan` changes from those of before."""
    got = outputs(model, plan)
    return float(sum((got[name] - wanted[name]).square().mean() for name in wanted))


def outputs(model: PeftModel, plan: PrunePlan, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What each projection gives for the *dense* model's inputs of the calibration rows that stay."""
    inner = transformers_model(model)
    inputs = inputs or model.light_inputs  # type: ignore[assignment]
    result = {}
    for spec, kept, slot in refitting.outputs_changed(plan):
        name = spec.projections[slot]
        projection = inner.get_submodule(name)
        width = dense_weight(base_linear(inner, name)).shape[1]
        states = inputs[name]
        index = kept_channels(spec, kept, slot)
        with torch.no_grad():
            result[name] = projection(states if width == states.shape[-1] else states[..., index])
    return result


def remember_inputs(model: PeftModel, plan: PrunePlan, batches: list[dict[str, Tensor]]) -> None:
    """Keep the real tokens that reach each projection of the dense model."""
    inner = transformers_model(model)
    seen: dict[str, list[Tensor]] = {}
    real = refitting.RealTokens(model)
    handles = [
        inner.get_submodule(spec.projections[slot]).register_forward_pre_hook(
            lambda module, args, spec=spec, slot=slot: seen.setdefault(spec.projections[slot], []).append(
                real.select(args[0], spec, slot)
            )
        )
        for spec, _, slot in refitting.outputs_changed(plan)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in (*handles, real):
        handle.remove()
    model.light_inputs = {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_step_brings_outputs_nearer(name: str) -> None:
    distance = {}
    for rank in (None, 0, 2, 64):
        model = student(name)
        plan = tiny.plan_for(model, **BUDGET)
        batches = rows(model)
        remember_inputs(model, plan, batches)
        wanted = outputs(model, plan)
        refit = {} if rank is None else fit_refit(model, plan, lambda batches=batches: batches, rank, torch.float32)
        assert set(refit) == (set() if rank is None else set(wanted))
        apply_plan(model, plan)
        apply_refit(model, refit)
        distance[rank] = errors(model, plan, wanted)
    assert distance[64] < 0.9 * distance[2] and distance[2] < 0.98 * distance[0] and distance[0] < distance[None]


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def first_neurons(model: PeftModel) -> PrunePlan:
    """A plan that takes the last neuron of every FFN and nothing else."""
    plan = tiny.plan_for(model, heads=0, neurons=0, modules=0, ranks=0)
    data = plan.to_dict()
    for spec, block in zip(plan.specs, data["blocks"], strict=True):
        block["neurons"] = f"0-{spec.neurons - 2}"
    return PrunePlan.from_dict(data)


def change_last_neuron(model: PreTrainedModel, change: Any) -> None:
    for spec in tiny.block_specs(model):
        incoming = model.get_submodule(spec.projections["ffn_in"])
        with torch.no_grad():
            change(incoming.weight, incoming.bias)


def constant(weight: Tensor, bias: Tensor) -> None:
    weight[-1] = 0


def twin(weight: Tensor, bias: Tensor) -> None:
    weight[-1], bias[-1] = weight[3], bias[3]


@pytest.mark.parametrize(("change", "rank"), [(constant, 0), (twin, 1)])
@pytest.mark.parametrize("name", ["bert", "opt"])
def test_what_the_rest_can_give_comes_back_whole(
    name: str, change: Any, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neuron that gives a constant, and one that gives what another gives, with and without LoRA around them."""
    monkeypatch.setattr(refitting, "_RIDGE", 1e-7)
    base = tiny.make(name)
    change_last_neuron(base, change)
    targets = [spec.projections["ffn_out"] for spec in tiny.block_specs(base)]
    model = tiny.without_dropout(tiny.with_lora(base, target_modules=targets))
    plan = first_neurons(model)
    batches = rows(model)
    before = logits(model, batches[0])
    refit = fit_refit(model, plan, lambda: batches, rank, torch.float32)
    apply_plan(model, plan)
    assert tiny.relative_difference(logits(model, batches[0]), before) > 1e-3
    apply_refit(model, refit)
    assert tiny.relative_difference(logits(model, batches[0]), before) < 1e-3


def test_what_removed_lora_learned_is_kept() -> None:
    """All neurons but one stay; of the LoRA on FFN-out none does."""
    distances = []
    for rank in (0, 32):
        model = student(target_modules=[s.projections["ffn_out"] for s in tiny.block_specs(tiny.make("bert"))])
        plan = first_neurons(model)
        plan = PrunePlan.from_dict({**plan.to_dict(), "sites": dict(list(plan.to_dict()["sites"].items())[:1])})
        batches = rows(model)
        before = logits(model, batches[0])
        refit = fit_refit(model, plan, lambda batches=batches: batches, rank, torch.float32)
        apply_plan(model, plan)
        apply_refit(model, refit)
        distances.append(tiny.relative_difference(logits(model, batches[0]), before))
    assert distances[1] < 0.5 * distances[0]


def test_fitting_leaves_every_module_in_its_own_mode() -> None:
    model = student()
    model.train()
    transformers_model(model).bert.embeddings.eval()  # as users keep the dropout of a part off
    modes = [module.training for module in model.modules()]
    fit_refit(model, tiny.plan_for(model, **BUDGET), lambda: rows(model))
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


def test_groups_of_moments_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = student("llama-gqa")
    plan = tiny.plan_for(model, **BUDGET)
    batches = rows(model)
    calls: list[int] = []

    def calibration() -> list[dict[str, Tensor]]:
        calls.append(1)
        return batches

    together = fit_refit(model, plan, calibration, 4)
    assert len(calls) == 1
    monkeypatch.setattr(refitting, "_MOMENT_BYTES", 1)
    apart = fit_refit(model, plan, calibration, 4)
    assert len(calls) == 1 + len(together)
    assert all(torch.equal(apart[name].bias, together[name].bias) for name in together)


def test_padding_is_not_seen() -> None:
    model = student()
    plan = tiny.plan_for(model, **BUDGET)
    padded = tiny.inputs_for(model, rows=8, length=16)
    rows_alone = [
        {name: value[row : row + 1][:, padded["attention_mask"][row].bool()] for name, value in padded.items()}
        for row in range(8)
    ]
    one, other = (fit_refit(model, plan, lambda b=b: b, 0, torch.float32) for b in ([padded], rows_alone))
    for name, correction in one.items():
        torch.testing.assert_close(correction.bias, other[name].bias, rtol=1e-3, atol=1e-4)


def test_shared_tensors_stay_as_they_are() -> None:
    layer = nn.Linear(3, 2, bias=False)
    weight = layer.weight
    before = weight.detach().clone()
    delta, bias = torch.ones(2, 3), torch.tensor([1.0, 2.0])
    add_to_linear(layer, delta, bias)
    assert torch.equal(weight, before)
    assert torch.equal(layer.weight, before + 1)
    assert torch.equal(layer.bias, bias)
    assert not layer.bias.requires_grad


def test_a_refit_of_other_sizes_changes_nothing() -> None:
    model = student()
    plan = tiny.plan_for(model, **BUDGET)
    refit = fit_refit(model, plan, lambda: rows(model), 2)
    weights = {name: base_linear(model, name).weight for name in refit}
    with pytest.raises(LightPeftError, match="other sizes"):
        apply_refit(model, refit)  # the model is dense still
    assert all(base_linear(model, name).weight is weight for name, weight in weights.items())


@pytest.mark.parametrize("kind", [{"use_dora": True}, {}])
def test_modules_that_are_no_matrix_beside_the_weight_are_left_alone(kind: dict[str, Any]) -> None:
    model = student(**kind)
    plan = tiny.plan_for(model, modules=0, **BUDGET)
    assert bool(fit_refit(model, plan, lambda: rows(model), 2)) == (not kind)


# Through the pruner and on disk


def light(folder: Path, **config: Any) -> tuple[PeftModel, Path]:
    base = tiny.make("llama-gqa")
    base.save_pretrained(folder / "base")
    base.config.name_or_path = str(folder / "base")
    model = tiny.without_dropout(tiny.with_lora(base))
    plan = tiny.plan_for(model, **BUDGET)
    result = cut(model, plan, LightConfig(**config), lambda: rows(model))
    result.save_pretrained(folder / "light")
    return result.eval(), folder / "light"


@pytest.mark.parametrize("form", ["bias", "low_rank"])
def test_loaded_again_bit_by_bit(tmp_path: Path, form: str) -> None:
    model, folder = light(tmp_path, refit=form, refit_rank=4)
    inputs = tiny.inputs_for(model, "left")
    assert (folder / "refit.safetensors").is_file()
    loaded = load_light(folder)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_light(tmp_path / "again"), inputs), logits(model, inputs))
    without, plain = light(tmp_path / "without")
    assert not (plain / "refit.safetensors").exists()
    assert not torch.equal(logits(without, inputs), logits(model, inputs))


def test_an_altered_or_missing_refit_is_refused(tmp_path: Path) -> None:
    _, folder = light(tmp_path, refit="bias")
    file = folder / "refit.safetensors"
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file)
    with pytest.raises(LightPeftError, match="altered"):
        load_light(folder)
    file.unlink()
    with pytest.raises(LightPeftError, match="missing"):
        load_light(folder)


def test_saved_again_without_refit_no_old_one_is_left(tmp_path: Path) -> None:
    light(tmp_path, refit="bias")
    _, folder = light(tmp_path)
    assert not (folder / "refit.safetensors").exists()
    load_light(folder)
    (folder / "refit.safetensors").write_bytes(b"of somebody else")
    load_light(folder)


def test_refit_needs_rows() -> None:
    model = student()
    pruner = EarlyPruner(model, LightConfig(refit="bias", **BUDGET))
    with pytest.raises(LightPeftError, match="prune\\(calibration="):
        pruner.prune(tiny.plan_for(model, **BUDGET))
    assert as_light(model, tiny.plan_for(model)).light_refit == {}
