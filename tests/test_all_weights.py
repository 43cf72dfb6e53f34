"""`light.train: all`: PEFT is merged at the cut, and all weights that are left train."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import from_folder, light_over, logits, saved_base
from lanes import telling, thorough
from lights import light_of
from peft_models import adapted
from safetensors.torch import load_file
from tiny import (
    DROPPED,
    IN_MAKE_TEST,
    LAYOUTS,
    crossed,
    inputs_for,
    make,
    masked,
    plan_for,
    refusal,
    relative_difference,
    with_lora,
)
from torch import nn
from training import one_light_training, student
from workbench import Workbench, at_step, checksums, in_child, lightpeft, read, signalling

from lightpeft import EarlyPruner, LightSwitch, full_width, load_light, load_merged, save_merged
from lightpeft.app.exports.exporting import export_model
from lightpeft.app.exports.graphs import sessions
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.checking import check
from lightpeft.app.runs.trainers import LightRun
from lightpeft.compat.peft import BaseTunerLayer
from lightpeft.models.all_weights import trained_weights
from lightpeft.models.families.family_table import block_lists
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving.kept_weights import KEPT_WEIGHTS

# -- the model -----------------------------------------------------------------------------------------------------


@crossed(LAYOUTS, {"usual": {}, "dropped": DROPPED})
def test_merged_into_what_is_left(name: str, budget: dict[str, Any]) -> None:
    """The model computes what the masked one does; no PEFT module is left, and no embedding trains."""
    model = with_lora(make(name))
    plan = plan_for(model, train="all", **budget)
    reference = masked(model, plan)
    apply_plan(model, plan)
    assert relative_difference(logits(model), logits(reference)) < 1e-5
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    inner = transformers_model(model)
    in_blocks = [p for stack in block_lists(inner) for block in stack for p in block.parameters()]
    embeddings = [p for m in inner.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
    apart = {id(p) for p in embeddings}
    assert all(p.requires_grad for p in in_blocks if id(p) not in apart)
    assert not any(p.requires_grad for p in embeddings)


@telling("name", LAYOUTS, IN_MAKE_TEST)
def test_saved_and_loaded_bit_equal(name: str, tmp_path: Path) -> None:
    """Over its untouched base, from disk and in memory; merged, it is the same model."""
    base = saved_base(name, tmp_path / "base")
    before = checksums(base)
    model = light_over(from_folder(name, base), train="all", **DROPPED)
    with torch.no_grad():
        for index, parameter in enumerate(trained_weights(model).values()):
            parameter.add_(1e-3 * (index % 5))
    expected = logits(model)
    model.save_pretrained(tmp_path / "light")
    assert (tmp_path / "light" / KEPT_WEIGHTS).is_file()
    loaded = load_light(tmp_path / "light")
    assert logits(loaded).equal(expected) and not any(p.requires_grad for p in loaded.parameters())
    assert logits(load_light(tmp_path / "light", from_folder(name, base))).equal(expected)
    assert logits(load_light(tmp_path / "light", low_memory=True)).equal(expected)
    again = load_light(tmp_path / "light", is_trainable=True)
    assert all(p.requires_grad for p in trained_weights(again).values())
    save_merged(loaded, tmp_path / "merged")
    assert logits(load_merged(tmp_path / "merged")).equal(expected)
    assert checksums(base) == before, "the base is never written to"


def test_a_file_that_does_not_fit(tmp_path: Path) -> None:
    base = saved_base("bert", tmp_path / "base")
    light_over(from_folder("bert", base), train="all").save_pretrained(tmp_path / "light")
    (tmp_path / "light" / KEPT_WEIGHTS).unlink()
    assert KEPT_WEIGHTS in refusal(lambda: load_light(tmp_path / "light"))


def test_what_it_has_learned_is_no_peft_adapter(tmp_path: Path) -> None:
    base = saved_base("bert", tmp_path / "base")
    model = light_over(from_folder("bert", base), train="all")
    assert "save_merged" in refusal(lambda: full_width(model))


def test_tasks_share_what_none_of_them_trained(tmp_path: Path) -> None:
    """Models of a switch have their own block weights over one copy of the embeddings."""
    base = saved_base("bert", tmp_path / "base")
    for index, task in enumerate(("first", "second"), 1):
        model = light_over(from_folder("bert", base), train="all", seed=index)
        with torch.no_grad():
            for parameter in trained_weights(model).values():
                parameter.add_(1e-2 * index)
        model.save_pretrained(tmp_path / task)
    places = {task: tmp_path / task for task in ("first", "second")}
    switch = LightSwitch(places)
    models = {task: switch[task] for task in places}
    for task, folder in places.items():
        assert logits(models[task]).equal(logits(load_light(folder)))
    tables = [transformers_model(model).get_input_embeddings().weight.data_ptr() for model in models.values()]
    own = [{p.data_ptr() for p in trained_weights(model).values()} for model in models.values()]
    assert tables[0] == tables[1] and not own[0] & own[1]


@thorough
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_graphs_have_what_trained(form: str, tmp_path: Path) -> None:
    model = light_over(make("bert"), train="all")
    with torch.no_grad():
        for parameter in trained_weights(model).values():
            parameter.mul_(1.01)
    export_model(model, tmp_path / "out", form)
    found = sessions.load(form, tmp_path / "out").run(inputs_for(model))
    assert relative_difference(found["logits"], logits(model)) < 1e-4


# -- training ------------------------------------------------------------------------------------------------------


def test_a_training_and_its_checkpoints(tmp_path: Path) -> None:
    """All that is left trains, at a rate of its own; a training that goes on is the same to the last bit."""
    whole = one_light_training(tmp_path / "whole", train="all", save_strategy="steps", save_steps=5, logging_steps=1)
    whole.train()
    dense = {name: p.detach() for name, p in transformers_model(student("llama-gqa")).named_parameters()}
    moved = [n for n, p in trained_weights(whole.model).items() if n not in dense or not p.equal(dense[n][: len(p)])]
    assert len(moved) == len(trained_weights(whole.model))
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert max(rates[:4]) == pytest.approx(1e-3) and max(rates[5:]) <= 1e-4
    resumed = one_light_training(tmp_path / "resumed", train="all")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    ends = [{name: p.detach() for name, p in each.model.named_parameters()} for each in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys() and all(ends[0][name].equal(ends[1][name]) for name in ends[0])


def never_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every estimation is extended to its maximum; it begins with 8 steps."""
    monkeypatch.setattr("lightpeft.prune.length.LEAST_STEPS", 8)
    monkeypatch.setattr(Estimator, "learned", -1.0)


def test_the_base_joins_if_peft_alone_learns_too_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late in an extended stage, all weights train at their rate; a training that goes on there is bit-equal."""
    never_learns(monkeypatch)

    def trainer(name: str, **settings: Any) -> Any:
        return one_light_training(tmp_path / name, length="auto", max_steps=80, train="all", **settings)

    whole = trainer("whole", save_strategy="steps", save_steps=18, logging_steps=1)
    before = {name: p.detach().clone() for name, p in trained_weights(whole.model).items()}
    assert not any("lora" in name for name in before)
    whole.train()
    joined, cut = whole.light_record.meta["base_joined"], whole.light_report["estimation_steps"]
    assert 0 < joined < 18 < cut < 36
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert max(rates[:joined]) == pytest.approx(1e-3) and max(rates[joined:]) == pytest.approx(1e-4)
    for step in (18, 36):
        place = tmp_path / "whole" / f"checkpoint-{step}"
        if joined < step < cut:
            estimated = load_file(place / KEPT_WEIGHTS)
            assert estimated.keys() == before.keys() and not any(before[name].equal(estimated[name]) for name in before)
        resumed = trainer(f"from {step}")
        resumed.train(resume_from_checkpoint=str(place))
        ends = [{name: p.detach() for name, p in each.model.named_parameters()} for each in (whole, resumed)]
        assert ends[0].keys() == ends[1].keys() and all(ends[0][name].equal(ends[1][name]) for name in ends[0])


def test_what_cannot_train_all(tmp_path: Path) -> None:
    assert "cannot be merged" in refusal(lambda: EarlyPruner(adapted(make("bert")), {"train": "all"}))
    assert "set keep to light" in refusal(lambda: light_of(train="all", keep="full"))


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("all_weights"))


SETTINGS: dict[str, Any] = {"light.train": "all", "light.rates.scale": 0.5, "peft.lora_dropout": 0.0}


def test_a_run_in_one_go_in_stages_and_killed(bench: Workbench) -> None:
    """The same weights in all three; the report counts what trained."""
    assert lightpeft("run", "--config", bench.yaml("whole", **SETTINGS)) == 0
    staged = bench.yaml("staged", **SETTINGS)
    for verb in ("estimate", "plan", "prune", "train", "evaluate"):
        assert lightpeft(verb, "--config", staged) == 0
    killed = bench.yaml("killed", **SETTINGS)
    code, _ = in_child(at_step(17, signalling(signal.SIGKILL)), "run", "--config", killed)
    assert code == -signal.SIGKILL
    assert lightpeft("run", "--config", killed) == 0
    folders = [bench.folder / name for name in ("whole", "staged", "killed")]
    weights = [checksums(folder / "adapter")[KEPT_WEIGHTS] for folder in folders]
    assert len(set(weights)) == 1
    report = read(folders[0] / "metrics.json")
    light = load_light(folders[0] / "adapter", is_trainable=True)
    assert report["parameters"]["trained"] == sum(p.numel() for p in light.parameters() if p.requires_grad)
    assert report["metrics"]["accuracy"] > 0.7


def test_a_run_whose_base_joins(bench: Workbench, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In one go and in stages, it prunes the same trained base."""
    never_learns(monkeypatch)
    settings = {**SETTINGS, "light.estimate.length": "auto", "training.epochs": 10}
    assert lightpeft("run", "--config", bench.yaml("joined", **settings)) == 0
    assert "in the last ones all weights trained" in capsys.readouterr().err
    for verb in ("estimate", "plan", "prune", "train"):
        assert lightpeft(verb, "--config", bench.yaml("joined in stages", **settings)) == 0
    folders = [bench.folder / name for name in ("joined", "joined in stages")]
    assert all((folder / "estimation" / "adapter" / KEPT_WEIGHTS).is_file() for folder in folders)
    weights = [checksums(folder / "adapter")[KEPT_WEIGHTS] for folder in folders]
    assert len(set(weights)) == 1


def test_a_run_that_cuts_nothing_is_full_fine_tuning(bench: Workbench) -> None:
    assert lightpeft("run", "--config", bench.yaml("nothing", **SETTINGS, **{"light.remove.blocks": 0.0})) == 0
    report = read(bench.folder / "nothing" / "metrics.json")
    assert report["parameters"]["base_removed_ratio"] == 0 and report["metrics"]["accuracy"] > 0.7


def test_check_counts_the_optimizer_of_all_weights(bench: Workbench) -> None:
    kinds = [{}, {"light.train": "all"}]
    few, all_weights = (check(pipeline.prepare(bench.config("checked", **kind))).stages for kind in kinds)
    for stage in ("estimate", "train"):
        assert all_weights[stage].holding.trained > 5 * few[stage].holding.trained
        assert all_weights[stage].holding.weights < few[stage].holding.weights


def test_refused_before_anything_is_written(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    for name, changes in {"keep": {"light.after.keep": "both"}, "adapters": {"peft": "bottleneck"}}.items():
        assert lightpeft("run", "--config", bench.yaml(name, **{**SETTINGS, **changes})) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (bench.folder / name).exists()


def test_labels_are_smoothed_unless_said_otherwise(bench: Workbench) -> None:
    """Classes of a run that trains all weights; a number of one's own counts."""
    for name, own, expected in (("usual", {}, 0.1), ("own", {"trainer.label_smoothing_factor": 0.0}, 0.0)):
        work = pipeline.prepare(bench.config(name, **SETTINGS, **own))
        assert LightRun(work, add_peft(work.dense_model(), work.config)).args.label_smoothing_factor == expected
    work = pipeline.prepare(bench.config("peft"))
    assert LightRun(work, add_peft(work.dense_model(), work.config)).args.label_smoothing_factor == 0.0
