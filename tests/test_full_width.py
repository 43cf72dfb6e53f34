"""Train small, infer large: what a light model has learned, as a plain PEFT adapter over the whole base."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import light_over, logits, shallow
from lanes import needs_family, telling
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import CASES, TELLING_CASES, adapted, shifted, trained
from tiny import ALL, DROPPED, USUAL, crossed, make, plan_for, refusal, relative_difference, with_lora
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from workbench import Workbench, checksums, lightpeft, signalling

from lightpeft import full_width, load_light
from lightpeft.adapters.full_width import save_full_width
from lightpeft.app.folders.opening import find_model
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.trainers import LightRun, WideRun
from lightpeft.config import ModelConfig
from lightpeft.peft_kinds.sites.live_sites import own_adapter
from lightpeft.prune.light_model import LightModel, as_light
from lightpeft.prune.masks import UnitMasks
from lightpeft.prune.surgery import apply_plan

CLOSE = 1e-5
both_budgets = pytest.mark.parametrize("budget", [USUAL, DROPPED], ids=["usual", "dropped"])


def light_of(model: PeftModel, **budget: Any) -> LightModel:
    plan = plan_for(model, **budget)
    apply_plan(model, plan)
    return as_light(model.eval(), plan)


def without_cut_units(wide: PeftModel, light: LightModel) -> PeftModel:
    """The wide model with masks of zero where the light one has been cut."""
    masked, masks = copy.deepcopy(wide), UnitMasks([spec for spec, _ in light.light_plan.parts])
    masks.set_plan(light.light_plan)
    masks.attach(masked)
    return masked


def check(light: LightModel, name: str) -> PeftModel:
    """It is the light model where the units that were cut are masked, and not where they are there."""
    before = logits(light)
    wide = full_width(light, make(name))
    assert not isinstance(wide, LightModel) and not any(p.requires_grad for p in wide.parameters())
    assert relative_difference(logits(without_cut_units(wide, light)), before) < CLOSE
    assert relative_difference(logits(wide), before) > 1e-3
    assert logits(light).equal(before), "the light model stays as it is"
    return wide


# -- what it computes ----------------------------------------------------------------------------------------------


@needs_family("deepseek_v3")
@both_budgets
def test_lora_on_what_all_heads_share(budget: dict[str, Any], tmp_path: Path) -> None:
    """On what makes the latents of DeepSeek: it goes with a layer's last head, and is else saved with the rest."""
    names = ["q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj"]
    settings: dict[str, Any] = {"target_modules": names, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = get_peft_model(make("deepseek_v3"), LoraConfig(r=4, **settings)).eval()
    light = light_of(model, **budget)
    shared = [name for name in light.peft_config["default"].target_modules if "_a_proj" in name]
    assert len(shared) == (6 if budget is USUAL else 4)
    check(light, "deepseek_v3")
    light.save_pretrained(tmp_path)
    assert logits(load_light(tmp_path, make("deepseek_v3"))).equal(logits(light))


@crossed(ALL, {"usual": USUAL, "dropped": DROPPED})
def test_without_the_cut_units_it_is_the_light_model(name: str, budget: dict[str, Any]) -> None:
    check(light_over(make(name), **budget), name)


OF_B = [("llama-gqa", "lora-bias"), ("t5", "lora-bias")]
"""On layers without a bias, into which PEFT cannot merge one."""


@telling(("name", "variant"), [*CASES, *OF_B], TELLING_CASES)
@both_budgets
def test_variants_of_peft(name: str, variant: str, budget: dict[str, Any]) -> None:
    check(light_of(trained(name, variant), **budget), name)


@telling("placement", ["houlsby", "pfeiffer"], {"houlsby"})
@both_budgets
def test_bottleneck_adapters(placement: str, budget: dict[str, Any]) -> None:
    check(light_of(adapted(make("bert"), placement=placement), **budget), "bert")


def test_what_was_cut_computes_as_in_the_base() -> None:
    """Of a projection that lost rows, the others are the base's to the last bit."""
    light = light_over(make("llama-gqa"))
    wide = full_width(light, make("llama-gqa"))
    name = next(name for name in light.light_plan.sites if name.endswith("up_proj"))
    spec, kept = next((s, k) for s, k in light.light_plan.parts if s.projections["ffn_in"] == name)
    gone = sorted(set(range(spec.neurons)) - set(kept.neurons))
    x = torch.randn(5, 32)
    layer = wide.get_submodule(f"base_model.model.{name}")
    with torch.no_grad():
        assert gone and layer(x)[:, gone].equal(layer.base_layer(x)[:, gone])
        assert not layer(x).equal(layer.base_layer(x))


def test_depth_comes_back_without_modules() -> None:
    light = shallow(make("llama-gqa"))
    wide = full_width(light, make("llama-gqa"))
    inner = wide.get_base_model().model
    assert len(inner.layers) == 3 and wide.config.num_hidden_layers == 3
    assert not any("lora_" in name for name, _ in inner.layers[2].named_parameters())
    shallow_again = without_cut_units(wide, light)
    del shallow_again.get_base_model().model.layers[2]
    assert relative_difference(logits(shallow_again), logits(light)) < CLOSE


def test_one_rank_for_all_modules() -> None:
    """Servers read one rank and one alpha; modules of fewer ranks have zeros."""
    wider = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16}}
    light = light_over(make("llama-gqa"), lora=wider, ranks=0.5)
    ranks = {len(kept) for kept in light.light_plan.sites.values()}
    wide = check(light, "llama-gqa")
    config = wide.peft_config[own_adapter(wide)]
    assert len(ranks) > 1 and config.r == max(ranks)
    assert not config.rank_pattern and not config.alpha_pattern


def test_it_trains_on() -> None:
    light = light_over(make("llama-gqa"))
    wide = full_width(light, make("llama-gqa"), is_trainable=True)
    trained = {name for name, p in wide.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    ids = torch.randint(3, 60, (2, 7))
    wide(input_ids=ids, labels=ids).loss.backward()
    up = next(p for name, p in wide.named_parameters() if "up_proj.lora_B" in name)
    assert (up.grad != 0).all(), "rows that were cut learn, too"


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A base and a light adapter over it."""
    make("llama-gqa").save_pretrained(tmp_path / "base")
    light_over(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "light")
    return tmp_path


ALONE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, folder = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
torch.save(model(torch.arange(3, 12)[None]).logits, f"{folder}/logits.pt")
assert "lightpeft" not in sys.modules
"""


def test_peft_alone_reads_the_folder(saved: Path) -> None:
    before = checksums(saved / "base")
    out = saved / "wide"
    assert lightpeft("export", saved / "light", out, "--form", "peft") == 0
    assert {path.name for path in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(saved / "base")
    subprocess.run([sys.executable, "-c", ALONE, saved / "base", out], check=True)
    wide = full_width(load_light(saved / "light"))
    with torch.no_grad():
        expected = wide(torch.arange(3, 12)[None]).logits
    assert torch.load(out / "logits.pt", weights_only=True).equal(expected)
    assert checksums(saved / "base") == before


def test_the_base_is_not_read(saved: Path) -> None:
    (saved / "base" / "model.safetensors").unlink()
    save_full_width(saved / "light", ModelConfig(name=str(saved / "base")), saved / "wide")
    assert (saved / "wide" / "adapter_model.safetensors").is_file()


@telling("variant", ["dora", "lora-bias", "ia3", "tokens"], {"dora", "ia3"})
def test_other_kinds_in_files(tmp_path: Path, variant: str) -> None:
    """Those that take weights of the base read them."""
    make("gpt2").save_pretrained(tmp_path / "base")
    model = trained("gpt2", variant)
    model.get_base_model().config._name_or_path = str(tmp_path / "base")
    light = light_of(model)
    light.save_pretrained(tmp_path / "light")
    save_full_width(tmp_path / "light", ModelConfig(name=str(tmp_path / "base")), tmp_path / "wide")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "wide").eval()
    assert relative_difference(logits(again), logits(full_width(light, make("gpt2")))) < CLOSE


def test_a_head_that_nobody_has_saved_is_refused(tmp_path: Path) -> None:
    """It is random in the light model, and would be another one over a base that is loaded anew."""
    bench = Workbench(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(bench.base)
    untyped = LoraConfig(target_modules=["query", "dense"])  # so that PEFT does not know of the head
    light = light_of(shifted(get_peft_model(base, untyped)))
    assert "the base of this light model has no weights for classifier" in refusal(lambda: full_width(light))


def test_a_head_goes_along(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    assert lightpeft("run", "--config", bench.yaml("light")) == 0
    assert lightpeft("export", tmp_path / "light", tmp_path / "wide", "--form", "peft") == 0
    data = {"task": "classification", "max_length": 32, "test": bench.test, "train": bench.train}
    told = [word for name, value in data.items() for word in (f"--data.{name}", value)]
    assert lightpeft("evaluate", tmp_path / "wide", *told, "--json", tmp_path / "wide.json") == 0
    accuracy = json.loads((tmp_path / "wide.json").read_text(encoding="utf-8"))["model"]["metrics"]["accuracy"]
    assert accuracy > 0.8


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("runs"), "llama", "causal-lm")


@pytest.fixture(scope="module")
def kept(bench: Workbench) -> dict[str, dict[str, Any]]:
    """metrics.json of runs that differ in what they keep alone."""
    settings: dict[str, dict[str, Any]] = {
        "light": {},
        "full": {"light.after.keep": "full"},
        "both": {"light.after.keep": "both"},
        "steps": {"light.after.keep": "full", "light.after.full_width_steps": 0.25},
    }
    return {name: pipeline.run(bench.config(name, **changes)) for name, changes in settings.items()}


def test_what_a_run_keeps(bench: Workbench, kept: dict[str, dict[str, Any]]) -> None:
    """The same training; what is measured, and asked later, is what the run keeps."""
    weights = [checksums(bench.folder / name / "adapter")["adapter_model.safetensors"] for name in ("light", "full")]
    assert weights[0] == weights[1]
    assert kept["both"]["metrics"] == kept["light"]["metrics"] != kept["full"]["metrics"]
    assert kept["both"]["full_width"]["metrics"] == kept["full"]["metrics"]
    assert "full_width" not in kept["full"] and not (bench.folder / "light" / "full").exists()
    assert [find_model(bench.folder / name).form for name in ("light", "full", "both")] == [
        "light adapter",
        "PEFT adapter",
        "light adapter",
    ]
    assert kept["full"]["parameters"]["base"] > kept["light"]["parameters"]["base"]
    assert {"at_full_width", "final"} <= kept["full"]["milestones"]["metrics"].keys()


def test_the_last_steps_train_at_full_width(bench: Workbench, kept: dict[str, dict[str, Any]]) -> None:
    """They are a part of the run's, whose estimation stays what it was."""
    records = [bench.folder / name / "estimation" / "scores.safetensors" for name in ("light", "steps")]
    assert records[0].read_bytes() == records[1].read_bytes()
    stages = RunFolder.at(bench.folder / "steps").finished_stages()
    assert [stages[stage]["steps"] for stage in ("estimate", "train", "widen")] == [6, 12, 6]
    rates = [e["learning_rate"] for e in RunFolder.at(bench.folder / "steps").log_entries() if "learning_rate" in e]
    assert rates[-1] < 0.3 * 3e-2
    course = kept["steps"]["milestones"]["metrics"]
    assert course["final"]["loss"] < course["at_full_width"]["loss"]


def test_an_export_of_a_run_is_what_it_trained_at_full_width(bench: Workbench, tmp_path: Path) -> None:
    changes = {"light.after.keep": "both", "light.after.full_width_steps": 0.25}
    assert lightpeft("run", "--config", bench.yaml("exported", **changes)) == 0
    run = bench.folder / "exported"
    assert lightpeft("export", run, tmp_path / "wide", "--form", "peft") == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "wide" / name).read_bytes() == (run / "full" / name).read_bytes()
    assert lightpeft("export", run / "adapter", tmp_path / "scattered", "--form", "peft") == 0
    assert (tmp_path / "scattered" / name).read_bytes() != (run / "full" / name).read_bytes()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bench.base), tmp_path / "wide")


@telling("killed", [16, 20], [20])
def test_a_killed_run_comes_to_the_same_end(bench: Workbench, kept: dict[str, dict[str, Any]], killed: int) -> None:
    """Before the last steps, and among them (whose steps are counted anew)."""
    name = f"killed-{killed}"
    changes = {"light.after.keep": "full", "light.after.full_width_steps": 0.25, "training.save_steps": 2}
    config = bench.yaml(name, **changes)
    at = killed if killed < 18 else killed - 16
    stage = LightRun if killed < 18 else WideRun
    with pytest.MonkeyPatch.context() as patch:
        make = stage.__init__

        def disturbed(self: Any, *args: Any, **options: Any) -> None:
            make(self, *args, **options)
            self.add_callback(InterruptAt(at))

        patch.setattr(stage, "__init__", disturbed)
        assert lightpeft("run", "--config", config) == 130
    assert lightpeft("run", "--config", config) == 0
    whole, again = (checksums(bench.folder / each / "full") for each in ("steps", name))
    assert whole["adapter_model.safetensors"] == again["adapter_model.safetensors"]


class InterruptAt(TrainerCallback):
    """What a user does who presses Ctrl-C."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            signalling(signal.SIGINT)()


# -- refusals --------------------------------------------------------------------------------------------------------


def test_another_base_is_refused() -> None:
    light = light_over(make("llama-gqa"))
    assert "this light model belongs to another base" in refusal(lambda: full_width(light, make("llama-gqa", seed=1)))
    with_peft: Any = with_lora(make("llama-gqa"))
    assert "pass the dense transformers model, without PEFT" in refusal(lambda: full_width(light, with_peft))


def test_steps_that_are_not_there(bench: Workbench) -> None:
    config = bench.config("none", **{"light.after.keep": "full", "light.after.full_width_steps": 0.75})
    assert "estimation of 6 steps and 18 at full width leave none of the run's 24" in refusal(
        lambda: pipeline.run(config)
    )
