"""Stock PEFT, transformers and their hub never take a light adapter for one over the dense base; all else is PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import logits
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from tiny import make, plan_for, refusal, relative_difference, task_type
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers import TrainingArguments as Arguments

from lightpeft import LightModel, load_light
from lightpeft.models.families.family_table import block_specs
from lightpeft.peft_kinds.bottleneck import BottleneckConfig
from lightpeft.peft_kinds.sites.config_file import read_config
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan

NOTHING: dict[str, Any] = {"heads": 0.0, "neurons": 0.0, "modules": 0.5, "ranks": 0.5}
"""Modules and ranks go, and nothing of the base."""
DEPTH: dict[str, Any] = {"heads": 0.0, "neurons": 0.0, "depth": 1 / 3}


def lora(base: PreTrainedModel, **settings: Any) -> LoraConfig:
    targets = [name for block in block_specs(base) for name in block.projections.values()]
    return LoraConfig(**{"r": 4, "target_modules": targets, "task_type": task_type(base), **settings})


KINDS: dict[str, Callable[[PreTrainedModel], PeftConfig]] = {
    "lora": lora,
    "dora": lambda base: lora(base, use_dora=True),
    "rslora": lambda base: lora(base, use_rslora=True),
    "ia3": lambda base: IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "bottleneck": lambda base: BottleneckConfig(placement="houlsby", size=5, task_type="CAUSAL_LM"),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a dense decoder."""
    make("llama-gqa").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def light_of(base: Path, kind: str = "lora", adapter_name: str = "default", **budget: Any) -> LightModel:
    dense = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(dense, KINDS[kind](dense), adapter_name)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() > 1:  # as if trained
            parameter.data.add_(0.1)
            assert adapter_name in name
    plan = plan_for(model, **budget)
    apply_plan(model, plan)
    return as_light(model.eval(), plan)


# Loading with something else than load_light


def ways_in(base: Path, folder: Path) -> dict[str, Callable[[], Any]]:
    """How people load an adapter who do not know that it is a light one."""
    dense = AutoModelForCausalLM.from_pretrained(base)
    return {
        "PeftModel": lambda: PeftModel.from_pretrained(dense, str(folder)),
        "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(str(folder)),
        "PeftConfig": lambda: PeftConfig.from_pretrained(str(folder)),
        "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(folder),
        "load_adapter": lambda: dense.load_adapter(str(folder)),
        "another adapter": lambda: get_peft_model(dense, lora(dense)).load_adapter(str(folder), "second"),
        "hotswap": lambda: hotswap_adapter(get_peft_model(dense, lora(dense)), str(folder), "default"),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [{}, DEPTH], ids=["narrower", "shallower"])
def test_every_other_loader_names_the_right_one(kind: str, budget: dict[str, Any], base: Path, tmp_path: Path) -> None:
    light = light_of(base, kind, **budget)
    light.save_pretrained(tmp_path / "light")
    for way, load in ways_in(base, tmp_path / "light").items():
        with pytest.raises(KeyError, match=r"load it with lightpeft\.load_light"):
            pytest.fail(f"{way} gave a {type(load()).__name__}")
    assert logits(load_light(tmp_path / "light")).equal(logits(light))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bottleneck"])
def test_peft_loads_what_cuts_nothing_of_the_base(kind: str, base: Path, tmp_path: Path) -> None:
    light = light_of(base, kind, **NOTHING)
    light.save_pretrained(tmp_path / "light")
    dense = AutoModelForCausalLM.from_pretrained(base)
    stock = PeftModel.from_pretrained(dense, str(tmp_path / "light")).eval()
    assert relative_difference(logits(stock), logits(light)) == 0
    assert logits(load_light(tmp_path / "light")).equal(logits(light))


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"peft_type": "XX"}', '{"peft_config": 3}', '{"peft_type": ["LORA"]}', "x"]
)
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    assert str(tmp_path / "adapter_config.json") in refusal(lambda: read_config(tmp_path))


# What works as it does in PEFT


def test_several_adapters_are_not_saved_as_one(base: Path, tmp_path: Path) -> None:
    light = light_of(base)
    light.add_adapter("second", light.peft_config["default"])
    assert "adapters (default, second)" in refusal(lambda: light.save_pretrained(tmp_path / "light"))
    light.delete_adapter("second")
    said = refusal(lambda: light.save_pretrained(tmp_path / "light", selected_adapters=["default", "second"]))
    assert said == "a light adapter holds one adapter; select default instead of default, second"
    light.save_pretrained(tmp_path / "light", selected_adapters=["default"])
    assert logits(load_light(tmp_path / "light")).equal(logits(light))


def test_a_trainer_goes_on_from_its_checkpoint_and_takes_the_best(base: Path, tmp_path: Path) -> None:
    light_of(base).save_pretrained(tmp_path / "light")
    rows = Dataset.from_list([{"input_ids": [3 + i, 9, 4 + i], "labels": [3 + i, 9, 4 + i]} for i in range(16)])

    def trainer(steps: int) -> Trainer:
        settings: dict[str, Any] = {"save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "learning_rate": 1e-2}
        settings |= {"load_best_model_at_end": True, "lr_scheduler_type": "constant", "max_steps": steps}
        settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4}
        model = load_light(tmp_path / "light", is_trainable=True)
        return Trainer(model, Arguments(str(tmp_path / "run"), **settings), train_dataset=rows, eval_dataset=rows)

    begun = trainer(2)
    begun.train()
    rest = trainer(4)
    rest.train(resume_from_checkpoint=True)
    assert logits(rest.model.eval()).equal(logits(load_light(rest.state.best_model_checkpoint)))
    assert not logits(rest.model).equal(logits(begun.model.eval()))


def test_weights_for_other_units_are_not_loaded(base: Path, tmp_path: Path) -> None:
    """All shapes fit, so that PEFT would load them."""
    light, other = light_of(base), light_of(base, seed=4)
    other.save_pretrained(tmp_path / "other")
    before = logits(light)
    for name in ("default", "second"):
        said = refusal(lambda name=name: light.load_adapter(tmp_path / "other", name))
        assert said.startswith(f"{tmp_path / 'other'} is a light adapter with another plan") and "load_light" in said
    assert logits(light).equal(before) and not logits(other).equal(before)
    light.save_pretrained(tmp_path / "own")
    light.load_adapter(str(tmp_path / "own"), "default")
    assert logits(light).equal(before)
