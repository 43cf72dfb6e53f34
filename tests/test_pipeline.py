"""Whole runs on tiny models: every stage leaves its result, alone or together, and the same seed gives the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import telling, thorough
from safetensors.torch import load_file
from workbench import Workbench, checksums, comparable, lightpeft, read, stamps

from lightpeft.adapters.light_adapter import load_light
from lightpeft.app.evaluation.predicting import predict
from lightpeft.app.folders import opening
from lightpeft.app.folders.opening import open_result
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.config import ModelConfig, load_config
from lightpeft.errors import LightPeftError
from lightpeft.models.loading import load_model
from lightpeft.models.tokenizers import load_tokenizer
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.sizes import count_parameters

PEFT_WEIGHTS = "adapter_model.safetensors"
KINDS = [("bert", "classification"), ("llama", "classification"), ("llama", "causal-lm")]
FULL_RATE = {"training.learning_rate": 3e-3}


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Workbench]:
    return {kind: Workbench(tmp_path_factory.mktemp("-".join(kind)), *kind) for kind in KINDS}


@pytest.fixture(scope="module")
def bench(benches: dict[tuple[str, str], Workbench]) -> Workbench:
    return benches[KINDS[0]]


@pytest.fixture(scope="module")
def finished(bench: Workbench) -> Path:
    """A finished run of the encoder with the plain settings."""
    pipeline.run(bench.config("light"))
    return bench.folder / "light"


def logged(folder: Path) -> list[dict[str, Any]]:
    return list(RunFolder(folder, load_config(folder / "config.yaml")).log_entries())


@pytest.mark.parametrize("peft", ["lora", "bottleneck"])
def test_modules_in_the_upper_blocks_only(bench: Workbench, peft: str) -> None:
    """None is ever made below, and the units of every block are scored all the same."""
    modules = {"light.modules.blocks": 0.5, "light.modules.remove": 0.0}
    work = pipeline.prepare(bench.config(f"upper-{peft}", peft=peft, **modules))
    pipeline.estimate(work)
    pipeline.plan(work)
    folder = bench.folder / f"upper-{peft}"
    record = EstimationRecord.load(folder / "estimation")
    assert {site.block for site in record.sites} == {1}
    for criterion in ("taylor", "fisher"):
        for scores in (*record.block_scores("heads", criterion), *record.block_scores("neurons", criterion)):
            assert (scores > 0).all()
    plan = PrunePlan.load(folder / "plan.json")
    assert set(plan.sites) == {site.name for site in record.sites}


@pytest.mark.parametrize(("of_estimation", "estimating"), [(None, 1.5e-2), (1.0, 3e-2)])
def test_a_light_run_may_learn_faster(bench: Workbench, of_estimation: float | None, estimating: float) -> None:
    """The first learning rates of both stages, which have no warmup here."""
    settings = {"light.rates.scale": 0.5, "light.rates.estimation_scale": of_estimation}
    name = f"scaled-{of_estimation}"
    steps = {"training.epochs": 2, "training.warmup": 0.0, "trainer.logging_steps": 1}
    pipeline.run(bench.config(name, **settings, **steps))
    first = dict.fromkeys(("estimate", "train"), 0.0)
    for entry in reversed([entry for entry in logged(bench.folder / name) if "learning_rate" in entry]):
        first[entry["stage"]] = entry["learning_rate"]
    assert first == {"estimate": pytest.approx(estimating, rel=0.1), "train": pytest.approx(1.5e-2, rel=0.1)}


@thorough
def test_a_run_that_takes_nothing_is_the_same_stage_by_stage(bench: Workbench) -> None:
    """It estimates nothing either way: what trains are PEFT modules as they are made."""
    nothing = {"light.remove.blocks": 0.0, "light.modules.remove": 0.0, "light.modules.remove_ranks": 0.0}
    pipeline.run(bench.config("nothing", **nothing))
    work = pipeline.prepare(bench.config("nothing-by-stages", **nothing))
    assert pipeline.estimate(work).meta["steps"] == 0
    pipeline.plan(work)
    pipeline.prune(work)
    pipeline.train(work)
    pipeline.evaluate(work)
    assert comparable(bench.folder / "nothing-by-stages") == comparable(bench.folder / "nothing")
    assert (bench.folder / "nothing-by-stages" / "metrics.json").is_file()


def steps_of(folder: Path) -> int:
    """Optimizer steps of all stages of a run."""
    return sum(entry["steps"] for entry in logged(folder) if "steps" in entry)


@telling("kind", KINDS, [KINDS[0], KINDS[2]])
def test_light_run_leaves_every_artifact(benches: dict[tuple[str, str], Workbench], kind: tuple[str, str]) -> None:
    bench = benches[kind]
    before = checksums(bench.base)
    result = pipeline.run(bench.config("light"))
    folder = bench.folder / "light"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "log.jsonl",
        "estimation",
        "plan.json",
        "pruned",
        "adapter",
        "metrics.json",
    }
    for name in ("pruned", "adapter"):
        assert {"adapter_config.json", "adapter_model.safetensors", "lightpeft.json", "README.md"} == {
            path.name for path in (folder / name).iterdir()
        }
    assert checksums(bench.base) == before
    assert result == read(folder / "metrics.json")

    light = load_light(folder / "adapter")
    dense = PrunePlan.load(folder / "plan.json").base_parameters
    left = sum(p.numel() for name, p in light.named_parameters() if "lora_" not in name and "original" not in name)
    sizes = result["parameters"]
    assert sizes["base_dense"] == dense
    assert sizes["base_removed_ratio"] == pytest.approx(1 - sizes["base"] / dense) != 0
    assert sizes["base_removed_ratio"] == pytest.approx(PrunePlan.load(folder / "plan.json").removed_ratio)
    assert left - sizes["head"] <= sizes["base"] <= left
    assert light.light_metrics == result["metrics"]
    assert result["metrics"]["examples"] == 40


@telling("kind", KINDS, KINDS[:1])
def test_plain_lora_run_takes_as_many_steps(
    benches: dict[tuple[str, str], Workbench],
    kind: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench = benches[kind]
    pipeline.run(bench.config("light"))
    monkeypatch.setattr("lightpeft.prune.length.LEAST_EXAMPLES", 256)
    capsys.readouterr()
    result = pipeline.run(bench.config("lora", method="plain"))
    assert "estimation" not in capsys.readouterr().err, "there is none"
    folder = bench.folder / "lora"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "log.jsonl",
        "adapter",
        "task.json",
        "metrics.json",
    }
    assert result["parameters"]["base_removed_ratio"] == 0
    assert steps_of(folder) == steps_of(bench.folder / "light") == 24
    names = [name for name in load_file(folder / "adapter" / "adapter_model.safetensors") if "lora_A" in name]
    assert len(names) == 4  # q and v of two layers


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids="-".join)
def test_full_fine_tuning_leaves_a_model(benches: dict[tuple[str, str], Workbench], kind: tuple[str, str]) -> None:
    """Every weight trains, and the result is what transformers loads, tokenizer and all."""
    bench = benches[kind]
    before = checksums(bench.base)
    result = pipeline.run(bench.config("full", method="full", **FULL_RATE))
    folder = bench.folder / "full"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "log.jsonl",
        "model",
        "task.json",
        "metrics.json",
    }
    assert checksums(bench.base) == before
    config = {**read(folder / "metrics.json")["config"], "model": {"name": str(folder / "model")}}
    work = pipeline.prepare(bench.config("full", method="full", **FULL_RATE))
    again = open_result(work.run, work.task)
    assert not again.training
    untouched = work.dense_model().model.state_dict()
    assert config["model"]["name"] == again.name_or_path
    assert all(
        not torch.equal(weight, untouched[name]) for name, weight in again.state_dict().items() if weight.dim() > 1
    )
    sizes = result["parameters"]
    assert sizes["trained"] == sizes["base"] == sizes["base_dense"] == sum(p.numel() for p in again.parameters())
    assert sizes["peft"] == sizes["head"] == sizes["base_removed_ratio"] == 0
    tokenizer = load_tokenizer(ModelConfig(name=str(folder / "model")))
    assert tokenizer.get_vocab() == work.tokenizer.get_vocab()


def test_settings_that_a_method_has_no_use_for_may_change(bench: Workbench) -> None:
    RunFolder.open(bench.config("unused_settings", method="full")).begin()
    RunFolder.open(bench.config("unused_settings", method="full", **{"peft.r": 2, "light.remove.heads": 0.1}))
    with pytest.raises(LightPeftError, match=r"differs in training\.learning_rate"):
        RunFolder.open(bench.config("unused_settings", method="full", **{"training.learning_rate": 1e-4}))


@pytest.mark.parametrize("method", ["light", "full"])
def test_a_run_measures_its_speed_and_memory(bench: Workbench, method: str) -> None:
    result = pipeline.run(bench.config(method, method=method, **(FULL_RATE if method == "full" else {})))
    assert list(result["training"]) == (["estimate", "train"] if method == "light" else ["train"])
    for stage, cost in result["training"].items():
        steps = {"light": {"estimate": 6, "train": 18}, "full": {"train": 24}}[method][stage]
        # 64 rows in 8 steps; storing a frozen prefix is part of the seconds alone
        assert cost["samples_per_second"] >= 0.99 * 8 * steps / cost["seconds"] > 0
        assert cost["peak_memory_bytes"] >= 0  # of so small a model it may all be memory that was freed before
        assert cost["peak_memory_method"] in ("cuda", "VmHWM", "sampling")
        assert cost["resumed_at"] == 0
        assert result["seconds"][stage] == pytest.approx(cost["seconds"], abs=1e-3)


@telling(
    ("kind", "placement"),
    [(KINDS[0], "houlsby"), (KINDS[0], "pfeiffer"), (KINDS[2], "pfeiffer")],
    [(KINDS[0], "houlsby"), (KINDS[2], "pfeiffer")],
)
def test_a_run_with_adapters(
    benches: dict[tuple[str, str], Workbench], kind: tuple[str, str], placement: str, tmp_path: Path
) -> None:
    bench = benches[kind]
    settings = {"peft": {"type": "bottleneck", "size": 8, "placement": placement}}
    light, plain = (pipeline.run(bench.config(f"{m}-{placement}", method=m, **settings)) for m in ("light", "plain"))
    places = 4 if placement == "houlsby" else 2
    folders = [bench.folder / f"{method}-{placement}" / "adapter" for method in ("light", "plain")]
    sizes = [[len(w) for name, w in load_file(f / PEFT_WEIGHTS).items() if "down.weight" in name] for f in folders]
    assert sizes[1] == [8] * places
    assert 0 < len(sizes[0]) < places and set(sizes[0]) == {4}
    assert light["parameters"]["peft"] < plain["parameters"]["peft"] / 2
    assert light["parameters"]["base_removed_ratio"] > 0 == plain["parameters"]["base_removed_ratio"]
    loaded = load_light(folders[0])
    assert loaded.peft_config["default"].placement == placement
    assert loaded.light_metrics == light["metrics"]


def test_a_run_over_a_base_in_8_bits(bench: Workbench, finished: Path) -> None:
    pytest.importorskip("bitsandbytes")
    result = pipeline.run(bench.config("eight", **{"model.quantization": "int8"}))
    light = load_light(bench.folder / "eight" / "adapter")
    whole = load_light(bench.folder / "eight" / "adapter", is_trainable=True)
    kinds = {type(module).__name__ for module in transformers_model(light).modules()}
    assert "Linear8bitLt" in kinds
    dense = read(finished / "metrics.json")["parameters"]["base_dense"]
    assert result["parameters"]["base_dense"] == dense, "weights are counted, not bytes"
    assert result["parameters"]["base_removed_ratio"] == pytest.approx(light.light_plan.removed_ratio)
    assert count_parameters(whole).base == result["parameters"]["base"]


def test_tiny_model_learns(benches: dict[tuple[str, str], Workbench]) -> None:
    """The data can be learned, so what the other tests compare is not noise alone."""
    bench = benches["llama", "classification"]
    result = pipeline.run(bench.config("learned", seed=1, **{"training.epochs": 8, "light.remove.heads": 0.5}))
    assert result["metrics"]["accuracy"] >= 0.8
    assert result["parameters"]["base_removed_ratio"] > 0.3


def test_the_base_is_loaded_twice(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to train, live from stage to stage, and once to measure the result over an untouched one."""
    loads: list[str] = []

    def counted(*args: Any, **options: Any) -> Any:
        loads.append("base")
        return load_model(*args, **options)

    monkeypatch.setattr(opening, "load_model", counted)
    pipeline.run(bench.config("loads", **{"training.epochs": 1}))
    assert len(loads) == 2


def test_fine_tuning_goes_on_from_estimation(finished: Path) -> None:
    """Kept ranks keep what they learned: `pruned` holds rows of the weights that estimation left."""
    dense = load_file(finished / "estimation" / "adapter" / "adapter_model.safetensors")
    pruned = load_file(finished / "pruned" / "adapter_model.safetensors")
    plan = PrunePlan.load(finished / "plan.json")
    compared = 0
    for site, ranks in plan.sites.items():
        if site.endswith(("query", "key", "value", "intermediate.dense")):
            key = f"base_model.model.{site}.lora_A.weight"
            assert pruned[key].equal(dense[key][list(ranks)])
            compared += 1
    assert compared
    head = "base_model.model.classifier.weight"
    assert pruned[head].equal(dense[head])
    assert not load_file(finished / "adapter" / "adapter_model.safetensors")[head].equal(pruned[head])


def test_stages_one_by_one_give_the_same_run(bench: Workbench, finished: Path) -> None:
    file = bench.yaml("staged")
    for verb, result in [
        ("estimate", "estimation/estimation.json"),
        ("plan", "plan.json"),
        ("prune", "pruned/lightpeft.json"),
        ("train", "adapter/lightpeft.json"),
        ("evaluate", "metrics.json"),
    ]:
        assert not (bench.folder / "staged" / result).exists()
        assert lightpeft(verb, "--config", file) == 0
        assert (bench.folder / "staged" / result).is_file()
    assert comparable(bench.folder / "staged") == comparable(finished)


def test_a_stage_needs_the_one_before(bench: Workbench) -> None:
    config = bench.config("early")
    work = pipeline.prepare(config)
    for stage, needed in [(pipeline.prune, "plan"), (pipeline.train, "prune"), (pipeline.evaluate, "train")]:
        with pytest.raises(LightPeftError, match=f"no result of `lightpeft {needed}` yet"):
            stage(work)
    with pytest.raises(LightPeftError, match="no result of `lightpeft estimate` yet"):
        pipeline.plan(work.run)
    assert not (bench.folder / "early").exists()


def test_finished_run_is_left_alone(bench: Workbench, finished: Path) -> None:
    before = stamps(finished)
    assert pipeline.run(bench.config("light")) == read(finished / "metrics.json")
    assert lightpeft("run", "--run", finished) == 0
    assert stamps(finished) == before


def test_a_folder_that_moved_goes_on(bench: Workbench) -> None:
    assert lightpeft("estimate", "--config", bench.yaml("here", **{"training.epochs": 1})) == 0
    (bench.folder / "here").rename(bench.folder / "there")
    assert lightpeft("run", "--run", bench.folder / "there") == 0
    assert (bench.folder / "there" / "metrics.json").is_file()
    assert not (bench.folder / "here").exists()


def test_another_budget_replans_until_pruned(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench.folder / "replanned"
    file = bench.yaml("replanned")
    assert lightpeft("estimate", "--config", file) == 0
    assert lightpeft("plan", "--config", file) == 0
    first = PrunePlan.load(folder / "plan.json")
    assert lightpeft("plan", "--run", folder, "--light.remove.heads", "0.5", "--light.remove.neurons", "0.5") == 0
    second = PrunePlan.load(folder / "plan.json")
    assert second.removed_ratio > first.removed_ratio
    assert lightpeft("prune", "--run", folder) == 0  # the new budget is the run's
    assert read(folder / "pruned" / "lightpeft.json")["plan"]["budget"]["remove"]["heads"] == 0.5

    before = stamps(folder)
    capsys.readouterr()
    assert lightpeft("plan", "--run", folder, "--light.remove.heads", "0.25") == 2
    assert "differs in light.remove.heads" in capsys.readouterr().err
    assert lightpeft("plan", "--run", folder) == 0
    assert stamps(folder) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"training.precision": "bf16"},
        {"training.gradient_accumulation": 2, "training.batch_size": 4},
        pytest.param(
            {"trainer.train_sampling_strategy": "random", "training.gradient_checkpointing": True}, marks=thorough
        ),
        pytest.param({"model.dtype": "bfloat16", "model.attn_implementation": "eager"}, marks=thorough),
    ],
    ids=lambda changes: "-".join(name.rpartition(".")[2] for name in changes),
)
def test_training_options(bench: Workbench, finished: Path, changes: dict[str, Any]) -> None:
    name = "-".join(changes).replace(".", "_")
    result = pipeline.run(bench.config(name, **changes))
    assert steps_of(bench.folder / name) == 24
    assert 0.2 < result["metrics"]["loss"] < 1.2
    assert result["parameters"]["base"] == read(finished / "metrics.json")["parameters"]["base"]


def test_pytorch_with_cuda_on_a_machine_without(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch names the accelerator it was built for, whether there is one or not."""

    def built_for(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    pipeline.run(bench.config("driverless", **{"training.epochs": 1}))
    text = bench.folder / "lines.txt"
    text.write_text("word1 good1\n")
    predict(str(bench.folder / "driverless"), str(text), output=str(bench.folder / "labels.csv"))
    assert (bench.folder / "labels.csv").is_file()
