"""Faster steps of light runs: what a model computes and learns is what PEFT and PyTorch would have made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from single_steps import LINEAR, applied, count_layers, gradients, mix, two_adapters, watch
from tiny import LAYOUTS, every_family, inputs_for, make, relative_difference, with_lora
from torch import Tensor, nn
from transformers import TrainerCallback
from workbench import Workbench

from lightpeft.app.runs import pipeline
from lightpeft.models.families.family_table import block_specs
from lightpeft.peft_kinds.sites import fused
from lightpeft.peft_kinds.sites.fused import fused_lora
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.profiling.flops import count_flops
from lightpeft.prune.importance import ModuleObserver
from lightpeft.training.acceleration import base_dropout


def assert_same(one: Any, other: Any, tolerance: float) -> None:
    assert relative_difference(one[0], other[0]) < tolerance
    assert one[1].keys() == other[1].keys() and one[1]
    largest = max(gradient.norm() for gradient in one[1].values())
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() <= tolerance * largest, name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Data types of the inputs of the layers that were computed in one step."""
    return applied(monkeypatch, fused._LoraLinear, lambda x: x.dtype)


class TestFusedLora:
    @pytest.mark.parametrize("name", LINEAR)
    def test_loss_and_gradients_are_those_of_peft(self, name: str, calls: list[torch.dtype]) -> None:
        model = with_lora(make(name))
        inputs = inputs_for(model, labels=True)
        expected = gradients(model, inputs)
        with fused_lora(model):
            found = gradients(model, inputs)
        assert len(calls) == count_layers(model) > 0
        assert_same(expected, found, 1e-4)

    @pytest.mark.parametrize("name", ["bert", "llama-gqa"])
    def test_counts_as_many_flops_as_peft(self, name: str, calls: list[torch.dtype]) -> None:
        model = with_lora(make(name))
        inputs = inputs_for(model, labels=True)
        expected = count_flops(model, inputs)
        with fused_lora(model):
            assert count_flops(model, inputs) == expected
        assert calls

    def test_bf16_autocast_rounds_as_peft_does(self, calls: list[torch.dtype]) -> None:
        model = with_lora(make("llama-gqa"))
        inputs = inputs_for(model, labels=True)
        exact = gradients(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            peft = gradients(model, inputs)
            with fused_lora(model):
                found = gradients(model, inputs)
        assert set(calls) == {torch.bfloat16}
        largest = max(gradient.norm() for gradient in exact[1].values())

        def error(other: Any) -> float:
            return float(max((exact[1][name] - other[1][name]).norm() for name in exact[1]) / largest)

        assert found[1].keys() == exact[1].keys()
        assert all(gradient.dtype == torch.float32 for gradient in found[1].values())
        assert error(found) < 1.5 * error(peft)

    def test_dropout_of_lora_is_the_same(self, calls: list[torch.dtype]) -> None:
        model = with_lora(make("bert"), lora_dropout=0.3).train()
        inputs = inputs_for(model, labels=True)
        with base_dropout(model, 0.0):
            expected = gradients(model, inputs)
            with fused_lora(model):
                found = gradients(model, inputs)
            model.eval()
            without = gradients(model, inputs)
        assert calls
        assert_same(expected, found, 1e-4)
        assert relative_difference(expected[0], without[0]) > 1e-3

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_modules_that_are_watched_in_some_steps(self, reentrant: bool, calls: list[torch.dtype]) -> None:
        """Checkpointing computes each pass twice, and has to in the same way, watched or not."""
        model = with_lora(make("llama-gqa")).train()
        inputs = inputs_for(model, labels=True)
        expected = gradients(model, inputs)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        blocks, due = block_specs(model.get_base_model()), [True, False, True]
        observer = ModuleObserver(model, find_sites(model, blocks), blocks, torch.device("cpu"), iter(due).__next__)
        counts = []
        with fused_lora(model):
            for _ in due:
                assert_same(expected, gradients(model, inputs), 1e-4)
                counts.append(len(calls))
        observer.detach()
        assert counts == [0, 2 * count_layers(model), 2 * count_layers(model)]

    @pytest.mark.parametrize(
        ("change", "settings"),
        [
            pytest.param(None, {"use_dora": True}, id="DoRA"),
            pytest.param(None, {"lora_bias": True}, id="bias of B"),
            pytest.param(lambda model: model.base_model.disable_adapter_layers(), {}, id="disabled"),
            pytest.param(lambda model: model.merge_adapter(), {}, id="merged"),
            pytest.param(lambda model: watch(model, "base_layer"), {}, id="watched base layer"),
            pytest.param(lambda model: watch(model, "lora_B"), {}, id="watched B"),
            pytest.param(lambda model: two_adapters(model), {}, id="two adapters"),
            pytest.param(lambda model: mix(model), {}, id="two data types"),
        ],
    )
    def test_what_has_more_to_it_is_left_to_peft(
        self, change: Callable[[PeftModel], Any] | None, settings: dict[str, Any], calls: list[torch.dtype]
    ) -> None:
        model = with_lora(make("bert"), **settings)
        if change is not None:
            change(model)
        inputs = inputs_for(model)
        expected = model(**inputs).logits
        with fused_lora(model):
            found = model(**inputs).logits
        assert not calls
        assert found.equal(expected)


class TestBaseDropout:
    @every_family()
    def test_without_dropout_training_computes_what_inference_does(self, name: str) -> None:
        model = make(name)
        inputs = inputs_for(model)
        with torch.no_grad():
            expected = model(**inputs).logits
            with base_dropout(model.train(), 0.0):
                found = model(**inputs).logits
        assert relative_difference(expected, found) < 1e-5

    def test_probabilities_come_back_and_peft_keeps_its_own(self) -> None:
        model = with_lora(make("bert"), lora_dropout=0.3)
        config = model.config.to_dict()
        before = probabilities(model)
        with base_dropout(model, 0.25):
            inside = probabilities(model)
            assert model.config.to_dict() == config
        assert probabilities(model) == before
        assert {p for name, p in inside.items() if "lora_dropout" in name} == {0.3}
        assert {p for name, p in inside.items() if "lora_dropout" not in name} == {0.25}
        assert 0.1 in before.values()

    def test_it_really_drops(self) -> None:
        model = make("opt", dropout=0.0).train()
        inputs = inputs_for(model)
        with torch.no_grad(), base_dropout(model, 0.5):
            assert relative_difference(model(**inputs).logits, model(**inputs).logits) > 1e-2


class TestCasts:
    """What several layers read is converted once."""

    @staticmethod
    def gradients(model: PeftModel, autocast: bool = True, shared: bool = True) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            if not shared:
                patch.setattr(fused._Casts, "of", lambda self, x, dtype: x.to(dtype))
            inputs = inputs_for(model)
            model.zero_grad()
            with fused_lora(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(**inputs).logits.float().square().mean().backward()
        return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_the_same_gradients(self, name: str) -> None:
        """As near to those in float32 as without."""
        model = with_lora(make(name))
        exact = self.gradients(model, autocast=False)
        errors = [float((self.gradients(model, shared=each) - exact).norm() / exact.norm()) for each in (True, False)]
        assert errors[0] < 1.3 * errors[1] + 1e-3 and errors[1] < 0.2

    def test_only_what_is_the_same(self) -> None:
        casts, x = fused._Casts(), torch.randn(2, 3)
        first = casts.of(x, torch.bfloat16)
        assert casts.of(x, torch.bfloat16) is first and casts.of(x, torch.float16) is not first
        again = casts.of(x, torch.bfloat16)
        x.add_(1)
        assert not casts.of(x, torch.bfloat16).equal(again), "it was changed in place"
        with torch.no_grad():
            x.requires_grad_(True)
            assert not casts.of(x, torch.bfloat16).requires_grad
        assert casts.of(x, torch.bfloat16).requires_grad
        with torch.inference_mode():
            y = torch.randn(2, 3)
            assert casts.of(y, torch.bfloat16) is casts.of(y, torch.bfloat16)
        casts.forget()
        assert casts._cast is None


def probabilities(model: nn.Module) -> dict[str, float]:
    return {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}


class TestRuns:
    """What runs of the command line make of it."""

    @pytest.fixture(scope="class")
    def bench(self, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
        return Workbench(tmp_path_factory.mktemp("acceleration"))

    @pytest.mark.parametrize(
        ("method", "changes", "fast"),
        [("light", {}, True), ("light", {"training.fast_steps": False}, False), ("plain", {}, False)],
    )
    def test_light_runs_are_faster_and_without_dropout_and_plain_ones_are_as_by_habit(
        self, bench: Workbench, calls: list[torch.dtype], method: str, changes: dict[str, Any], fast: bool
    ) -> None:
        seen: dict[int, float] = {}

        class Look(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                seen[state.global_step] = max(probabilities(kwargs["model"]).values())

        changes = {"light.rates.dropout": 0.0, "peft.lora_dropout": 0.0, "training.epochs": 1, **changes}
        pipeline.run(bench.config(f"{method}-{fast}", method=method, **changes), callbacks=[Look()])
        assert bool(calls) == fast
        assert len(seen) == 8 and {value == 0.0 for value in seen.values()} == {method == "light"}

    @pytest.mark.parametrize(("max_length", "width"), [(32, 24), (40, 24)])
    def test_batches_are_padded_to_a_multiple(self, bench: Workbench, max_length: int, width: int) -> None:
        work = pipeline.prepare(bench.config("padded", **{"data.max_length": max_length}))
        row = {"input_ids": list(range(3, 20)), "attention_mask": [1] * 17, "length": 17}
        assert work.collator([row])["input_ids"].shape == (1, width)

    @pytest.mark.parametrize(("max_length", "width"), [(30, 24), (34, 17)])
    def test_but_not_beyond_the_positions_of_the_model(self, bench: Workbench, max_length: int, width: int) -> None:
        work = pipeline.prepare(bench.config("limit", **{"data.max_length": max_length}))
        work.positions = 38
        row = {"input_ids": list(range(3, 20)), "attention_mask": [1] * 17, "length": 17}
        assert work.collator([row])["input_ids"].shape == (1, width)
