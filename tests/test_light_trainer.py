"""`LightTrainer` and `light_trainer`: estimate, cut and fine-tune in one `train()` of any trainer."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, Value
from lanes import telling, thorough
from lights import but, light_of, preset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make, refusal, with_lora
from training import StopAt
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from workbench import Workbench, labeled

from lightpeft import EarlyPruner, LightConfig, LightTrainer, light_trainer, load_light
from lightpeft.app.evaluation.scores import scores_of
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.budget.found import SHORT
from lightpeft.config import Remove, run_config_from_dict
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.live_sites import find_sites, remove_site
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.sizes import parameter_report
from lightpeft.prune.light_model import LightModel
from lightpeft.training.arguments import training_arguments

BUDGET: dict[str, Any] = {
    "length": 0.25,
    "heads": 0.25,
    "neurons": 0.5,
    "modules": 0.5,
    "module_blocks": 0.5,
    "ranks": 0.5,
    "dropout": 0.0,
    "scale": 2.0,
    "estimation_scale": 1.0,
}
LIGHT = light_of(**BUDGET)
PASSED = ("callbacks", "teacher", "optimizers", "optimizer_cls_and_kwargs")
STEPS = {"estimation": 6, "run": 24}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def tokenizer(bench: Workbench) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(bench.base)


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast) -> dict[str, Dataset]:
    def encoded(count: int, seed: int) -> Dataset:
        texts = labeled(count, seed)
        tokens = tokenizer([row["text"] for row in texts], truncation=True, max_length=32)
        return Dataset.from_dict({**tokens, "labels": [int(row["label"] == "positive") for row in texts]})

    return {"train": encoded(64, 1), "test": encoded(40, 2)}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 0.1,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return TrainingArguments(str(folder), **settings)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "task_type": "SEQ_CLS", **changes})


class Builds:
    """Makes trainers over one base."""

    def __init__(self, bench: Workbench, tokenizer: PreTrainedTokenizerFast, rows: dict[str, Dataset], folder: Path):
        self.bench, self.tokenizer, self.rows, self.folder = bench, tokenizer, rows, folder

    def base(self) -> Any:
        set_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(self.bench.base, num_labels=2)

    def trainer(self, trainer_class: Any = LightTrainer, model: Any = None, **changes: Any) -> Any:
        options: dict[str, Any] = {"light": LIGHT, "peft_config": lora() if model is None else None}
        options |= {name: changes.pop(name) for name in [*options, *PASSED] if name in changes}
        fast = {name: changes.pop(name) for name in ("fast_steps", "prefix_cache") if name in changes}
        compute = changes.pop("compute_metrics", accuracy)
        return trainer_class(
            model=self.base() if model is None else model,
            args=changes.pop("args", None) or arguments(self.folder, **changes),
            train_dataset=self.rows["train"],
            eval_dataset=self.rows["test"],
            data_collator=DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=8),
            compute_metrics=compute,
            **options,
            **fast,
        )


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


@pytest.fixture
def builds(bench: Workbench, tokenizer: Any, rows: Any, tmp_path: Path) -> Builds:
    return Builds(bench, tokenizer, rows, tmp_path / "out")


class Events(TrainerCallback):
    """What a tracker sees."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.steps: list[int] = []
        self.epochs: list[float] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)
        self.epochs.append(state.epoch)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    unequal = [name for name in one if not one[name].equal(other[name])]
    assert not unequal, unequal


# -- one training --------------------------------------------------------------------------------------------------


def test_one_training_with_the_cut_as_an_event(builds: Builds) -> None:
    seen = Events()
    trainer = builds.trainer(callbacks=[seen])
    trainer.train()
    assert (seen.begun, seen.ended) == (1, 1)
    assert seen.steps == list(range(1, 25)) and seen.epochs == sorted(seen.epochs) and seen.epochs[-1] == 3.0
    (cut,) = [logs for logs in seen.logs if "light/base_parameters_after" in logs]
    parameters = trainer.light_report["parameters"]
    assert cut["light/base_parameters_before"] == parameters["before"]["base"]
    assert cut["light/base_parameters_after"] == parameters["after"]["base"] < parameters["before"]["base"]
    assert cut["light/trained_parameters_after"] < cut["light/trained_parameters_before"]
    assert trainer.light_report["estimation_steps"] == trainer.light_record.meta["steps"] == STEPS["estimation"]
    rates = [logs["learning_rate"] for logs in seen.logs if "learning_rate" in logs]
    assert max(rates) == pytest.approx(2e-2) and rates[STEPS["estimation"]] < max(rates[STEPS["estimation"] :])
    losses = [logs["loss"] for logs in seen.logs if "loss" in logs]
    assert len(losses) == STEPS["run"] and sum(losses[-5:]) < sum(losses[:5])


def test_where_all_stays_nothing_is_estimated(builds: Builds) -> None:
    """One schedule over all steps, as plain PEFT has it; a resumed training is the same."""
    light = but(LIGHT, heads=0.0, neurons=0.0, experts=0.0, modules=0.0, ranks=0.0)
    settings: dict[str, Any] = {"light": light, "warmup_steps": 0, "save_strategy": "steps", "save_steps": 4}
    seen = Events()
    trainer = builds.trainer(callbacks=[seen], **settings)
    trainer.train()
    assert trainer.light_report["estimation_steps"] == trainer.light_record.meta["scored_steps"] == 0
    assert parameter_report(trainer.model)["base_removed_ratio"] == 0
    rates = [logs["learning_rate"] for logs in seen.logs if "learning_rate" in logs]
    assert rates == pytest.approx([2e-2 * (1 - step / STEPS["run"]) for step in range(STEPS["run"])])
    rest = builds.trainer(**settings)
    rest.train(resume_from_checkpoint=str(builds.folder / "checkpoint-8"))
    assert rest.light_record is None and rest.light_plan == trainer.light_plan
    assert_equal(weights(rest.model), weights(trainer.model))


def test_the_users_arguments_and_config_stay_as_they_are(builds: Builds) -> None:
    args, config = arguments(builds.folder), lora()
    before = args.to_dict(), copy.deepcopy(config.to_dict())
    builds.trainer(args=args, peft_config=config).train()
    assert (args.to_dict(), config.to_dict()) == before


def test_modules_are_where_they_may_stay(builds: Builds) -> None:
    for peft_config in (lora(), lora(target_modules="all-linear"), lora(target_modules=["query", "value"])):
        model = builds.trainer(peft_config=peft_config).model
        names = [name for name, _ in model.named_modules() if name.endswith("lora_A") and ".layer." in name]
        assert names and all(".layer.1." in name for name in names)
    given = get_peft_model(builds.base(), lora(target_modules="all-linear"))
    model = builds.trainer(model=given, light=light_of(**BUDGET)).model
    names = [name for name, _ in model.named_modules() if name.endswith("lora_A") and ".layer." in name]
    assert names and all(".layer.1." in name for name in names)


def test_one_default_everywhere(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    """A trainer finds the amount, a loop has a fixed one where classes are given; a model that writes loses nothing."""
    found = builds.trainer(light=None)
    assert found.light_config == preset("fast") == builds.trainer(light="auto").light_config
    assert found.light_config == run_config_from_dict({}).light == builds.trainer(light="fast").light_config
    assert str(found.light_tolerance()) == "1 point"
    assert "of the base goes" not in caplog.text
    writes, other = preset("accurate", writes=True), preset("fast", blocks=0.0)
    with caplog.at_level("INFO", logger="lightpeft"):
        assert EarlyPruner(with_lora(make("llama-gqa"))).config == writes
        assert EarlyPruner(with_lora(make("t5"))).config == writes
        assert "of the blocks will be cut" not in caplog.text
        scorer = LlamaForSequenceClassification(make("llama-gqa").config)
        assert EarlyPruner(get_peft_model(scorer, lora())).config == preset("fast", blocks=SHORT)
        assert f"{SHORT:.0%} of the blocks will be cut: EarlyPruner uses a fixed budget" in caplog.text
        tagger = AutoModelForTokenClassification.from_pretrained(builds.bench.base, num_labels=3)
        assert EarlyPruner(get_peft_model(tagger, lora(task_type="TOKEN_CLS"))).config == other


@pytest.mark.parametrize("light", [0.4, {"remove": {"blocks": 0.4}}, LightConfig(remove=Remove(blocks=0.4))])
def test_a_number_is_a_budget(builds: Builds, light: Any) -> None:
    assert builds.trainer(light=light).light_config == preset("fast", blocks=0.4)
    assert EarlyPruner(get_peft_model(builds.base(), lora()), light).config == preset("fast", blocks=0.4)


def test_a_loop_cannot_search(builds: Builds) -> None:
    pruner = EarlyPruner(get_peft_model(builds.base(), lora()), "auto")
    assert "pass a number, such as light=0.4" in refusal(lambda: pruner.start(100))


def test_a_search_for_points_of_accuracy(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a point is worth is counted on rows that are set aside, as `lightpeft run` does it."""
    monkeypatch.setattr("lightpeft.budget.room.SEARCH_FRACTION", 100.0)
    monkeypatch.setattr("lightpeft.budget.room.LEAST_HELD", 16)
    monkeypatch.setattr("lightpeft.prune.learning.FEWEST_TELLING", 1)
    trainer = builds.trainer(light={"estimate": {"length": 6}, "modules": {"blocks": 1.0}})
    trainer.train()
    found = trainer.light_budget
    assert found.unmeasured is None and found.points_per_nat > 0
    assert found.tolerance == pytest.approx(1 / found.points_per_nat)


def test_labels_that_are_no_classes_are_told_by_nats(builds: Builds) -> None:
    trainer = builds.trainer(light="auto")
    trainer.train_dataset = trainer.train_dataset.cast_column("labels", Value("float32"))
    assert str(trainer.light_tolerance()) == "0.05 nats"
    points = builds.trainer(light={"remove": {"tolerance": "2 points"}})
    points.train_dataset = trainer.train_dataset
    assert "in nats of the loss" in refusal(points.light_tolerance)
    assert str(builds.trainer(light="auto", label_smoothing_factor=0.1).light_tolerance()) == "0.05 nats"


def test_a_training_too_short_to_estimate_cuts_nothing(
    builds: Builds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the amount was to be found; PEFT then trains as it would alone."""
    monkeypatch.setattr("lightpeft.prune.length.LEAST_EXAMPLES", 256)
    trainer = builds.trainer(light=None)
    assert trainer.light_config == preset("fast").without_pruning()
    assert "cuts nothing of the base: estimation scores" in caplog.text
    names = [name for name, _ in trainer.model.named_modules() if name.endswith("lora_A") and ".layer.0." in name]
    assert names, "modules sit in all blocks"
    trainer.train()
    assert trainer.light_plan.removed_parameters == 0


def test_what_cuts_a_model_that_writes_says_so(
    builds: Builds, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A trainer, and a loop of one's own; not where a whole model is kept, too, nor of one that classifies."""
    said, few = "pruning costs a model that generates text far more", light_of(**BUDGET)
    for light, told in ((few, True), (but(few, keep="both"), False), (preset("accurate", writes=True), False)):
        caplog.clear()
        pruner = EarlyPruner(with_lora(make("llama-gqa")), light)
        pruner.start(100)
        pruner.estimator.stop()
        assert (said in caplog.text) == told
    rows = Dataset.from_list([{"input_ids": [2, 5, 6, 3], "labels": [2, 5, 6, 3]} for _ in range(32)])
    for model, told in ((with_lora(make("llama-gqa")).train(), True), (get_peft_model(builds.base(), lora()), False)):
        caplog.clear()
        given = rows if told else builds.rows["train"]
        collator = None if told else DataCollatorWithPadding(builds.tokenizer)
        args = arguments(tmp_path / str(told), max_steps=12)
        LightTrainer(model, args, train_dataset=given, data_collator=collator, light=few).train()
        assert (said in caplog.text) == told


def test_a_presets_name(builds: Builds) -> None:
    trainer = builds.trainer(light="fast")
    assert trainer.light_config == preset("fast")
    assert "light is 'quick'; give a fraction of the blocks" in refusal(lambda: builds.trainer(light="quick"))


def test_what_is_not_cut_is_an_ordinary_adapter(builds: Builds, bench: Workbench, tmp_path: Path) -> None:
    """Nothing is cut, so that PEFT reads it; what `keep` asks beyond that is left to the caller, who is told."""
    light = preset("accurate", blocks=0.0)
    trainer = builds.trainer(light=light, peft_config=lora(target_modules="all-linear"), num_train_epochs=5)
    trainer.train()
    assert trainer.light_plan.removed_parameters == 0
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(builds.base(), tmp_path / "adapter").eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    with torch.no_grad():
        assert again(**inputs).logits.allclose(trainer.model.eval()(**inputs).logits, atol=1e-6)


def test_what_is_left_to_the_caller_is_said(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    builds.trainer(light=light_of(**BUDGET, keep="both"))
    assert "call lightpeft.full_width(trainer.model) after training" in caplog.text


def test_an_optimizer_of_ones_own(builds: Builds) -> None:
    seen = Events()
    own = (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})
    trainer = builds.trainer(callbacks=[seen], optimizer_cls_and_kwargs=own)
    trainer.train()
    rates = [logs["learning_rate"] for logs in seen.logs if "learning_rate" in logs]
    assert max(rates) == pytest.approx(1.0) and own[1]["lr"] == 0.5
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD


# -- the same as a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [("bert", "classification"), ("llama", "causal-lm")], ids="-".join)
def test_shell_and_trainers_give_the_same_to_the_last_bit(tmp_path: Path, kind: tuple[str, str]) -> None:
    """The shell, `LightTrainer` with a PEFT configuration, and `light_trainer(Trainer)` with a PeftModel."""
    bench = Workbench(tmp_path, *kind)
    config = bench.config("shell", light=dataclasses.asdict(LIGHT), **{"peft.lora_dropout": 0.05})
    report = pipeline.run(config)
    plan = PrunePlan.load(tmp_path / "shell" / "plan.json")
    work = pipeline.prepare(config)

    def trained(trainer_class: Any, wrap: bool) -> Any:
        set_seed(config.seed)
        base = work.dense_model().model
        peft_config = lora(task_type={"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}[kind[0]])
        if wrap:
            peft_config.target_modules = list(plan.specs[1].projections.values())
        args = training_arguments(work.config.training, tmp_path / f"python-{wrap}", work.steps, config.seed)
        trainer = trainer_class(
            model=get_peft_model(base, peft_config) if wrap else base,
            peft_config=None if wrap else peft_config,
            light=config.light,
            args=args,
            train_dataset=work.train_rows,
            data_collator=work.collator,
        )
        trainer.train()
        return trainer

    for trainer in (trained(LightTrainer, wrap=False), trained(light_trainer(Trainer), wrap=True)):
        assert trainer.light_plan == plan
        trainer.save_model(str(tmp_path / "python"))
        saved, shell = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in ("python", "shell/adapter")
        )
        assert_equal(saved, shell)
        found = pipeline.measure(work, load_light(tmp_path / "python", bench.base))
        assert scores_of(found, work.task).metrics == report["metrics"]


# -- what Trainer has ----------------------------------------------------------------------------------------------


@telling("step", [4, 8, 16], [4, 16])
def test_training_goes_on_from_a_checkpoint_on_either_side(builds: Builds, step: int) -> None:
    whole = builds.trainer(save_strategy="steps", save_steps=4)
    whole.train()
    rest = builds.trainer(save_strategy="steps", save_steps=4)
    rest.train(resume_from_checkpoint=str(builds.folder / f"checkpoint-{step}"))
    assert rest.light_plan == whole.light_plan and rest.state.global_step == STEPS["run"]
    assert (rest.light_record is None) == (step > STEPS["estimation"])
    assert_equal(weights(rest.model), weights(whole.model))
    again = builds.trainer(save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(again.model), weights(whole.model))
    for file in ("scheduler.pt", "trainer_state.json"):
        (builds.folder / f"checkpoint-{step}" / file).write_bytes(b"x")
        line = refusal(lambda: builds.trainer().train(resume_from_checkpoint=str(builds.folder / f"checkpoint-{step}")))
        assert f"checkpoint-{step}" in line and "resume from an older one" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"gradient_checkpointing": True},
        {"bf16": True},
        pytest.param({"dataloader_num_workers": 1}, marks=thorough),
        {"lr_scheduler_type": "cosine", "optim": "adafactor"},
        pytest.param({"train_sampling_strategy": "random"}, marks=thorough),
        pytest.param({"max_steps": 24, "num_train_epochs": 1}, marks=thorough),
        pytest.param({"label_smoothing_factor": 0.1}, marks=thorough),
        pytest.param({"remove_unused_columns": False}, marks=thorough),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_arguments_of_the_user(builds: Builds, changes: dict[str, Any]) -> None:
    trainer = builds.trainer(**changes)
    trainer.train()
    assert trainer.state.global_step == 24 and isinstance(trainer.model, LightModel)
    assert trainer.light_plan.removed_parameters > 0
    assert trainer.evaluate()["eval_accuracy"] > 0.5


def test_the_best_model_is_one_behind_the_cut(builds: Builds) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = builds.trainer(load_best_model_at_end=True, metric_for_best_model="eval_loss", **changes)
    trainer.train()
    assert int(trainer.state.best_model_checkpoint.rpartition("-")[2]) >= STEPS["estimation"]
    behind = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][2:]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(behind), abs=1e-6)


def test_early_stopping_waits_for_the_cut(builds: Builds) -> None:
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = builds.trainer(callbacks=[stopping], **changes)
    trainer.train()
    assert isinstance(trainer.model, LightModel)
    assert STEPS["estimation"] < trainer.state.global_step < STEPS["run"]


def test_training_that_ends_before_the_cut_says_so(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    trainer = builds.trainer(callbacks=[StopAt(2)])
    trainer.train()
    assert trainer.light_plan is None and not isinstance(trainer.model, LightModel)
    assert "training ended at step 2, inside estimation: the model was not cut; train for more steps" in caplog.text


def test_a_callback_ends_the_training_of_a_run(bench: Workbench) -> None:
    """Before the cut there is nothing to go on with, and the run says so; behind it, what trained is the result."""
    inside, behind = bench.config("ended-inside"), bench.config("ended-behind")
    assert "a callback stopped training at step 2, during estimation" in refusal(
        lambda: pipeline.run(inside, callbacks=[StopAt(2)])
    )
    pipeline.run(inside)
    pipeline.run(behind, callbacks=[StopAt(10)])
    steps = [RunFolder.at(Path(each.output)).finished_stages()["train"]["steps"] for each in (inside, behind)]
    assert steps == [18, 4]


def test_rows_that_change_have_no_prefix_cache(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    trainer = builds.trainer()
    plain = trainer.data_collator

    def noisy(rows: list[Any]) -> dict[str, Any]:
        batch = plain(rows)
        batch["input_ids"][:, 1] = torch.randint(4, 20, (len(rows),))
        return dict(batch)

    trainer.data_collator = noisy
    with caplog.at_level("INFO", logger="lightpeft"):
        trainer.train()
    assert "no prefix cache: the collator noisy may change the tokens of a row later" in caplog.text
    assert isinstance(trainer.model, LightModel)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"train_dataset": IterableDataset.from_generator(list)}, "no length"), ({"data_collator": dict}, "the collator")],
)
def test_the_cut_may_be_what_freezes_the_first_blocks(builds: Builds, changes: dict[str, Any], says: str) -> None:
    trainer = builds.trainer(light=light_of(**{**BUDGET, "module_blocks": 1.0}), max_steps=24)
    vars(trainer).update(changes)
    said: list[str] = []
    prefix = trainer._prefix
    prefix.announce = said.append
    prefix.announce_obstacle()
    assert said == [], "nothing is frozen yet"
    for site in find_sites(trainer.model, block_specs(transformers_model(trainer.model))[:1]):
        remove_site(trainer.model, site)
    prefix.open(steps=1000)
    assert len(said) == 1 and says in said[0] and trainer._prefix._cached is None


# -- what cannot work ----------------------------------------------------------------------------------------------


def test_a_head_that_does_not_train_is_said(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    builds.trainer(peft_config=lora(task_type=None))
    assert "(classifier) does not train, and the adapter will not contain it: set task_type" in caplog.text
    caplog.clear()
    builds.trainer(peft_config=lora(task_type=None, modules_to_save=["classifier"]))
    assert "does not train" not in caplog.text


def test_more_training_of_a_light_model_is_as_its_plan_says(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    first = builds.trainer()
    assert first.train() and builds.trainer(model=first.model, light=None).light_config.train == "peft"
    assert "no effect" not in caplog.text
    builds.trainer(model=first.model, light=0.4)
    assert "the model is cut already, so the amount in light= has no effect" in caplog.text
    everything = {"train": "all"}
    refused = refusal(lambda: builds.trainer(model=first.model, light=everything))
    assert "light.train is all, and this model was cut with peft" in refused
    for parameter in first.model.parameters():
        parameter.requires_grad_(False)
    assert "so nothing would train" in refusal(builds.trainer(model=first.model, light=None).train)


def test_checkpoints_of_another_model_are_not_called_damaged(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    whole = builds.trainer(save_strategy="steps", save_steps=4)
    whole.train()
    before = str(builds.folder / "checkpoint-4")
    assert "was written before the cut, and this trainer's" in refusal(
        lambda: whole.train(resume_from_checkpoint=before)
    )
    other = builds.trainer(peft_config=lora(r=2))
    assert "has weights of other sizes" in refusal(lambda: other.train(resume_from_checkpoint=before))
    builds.trainer(light=but(LIGHT, heads=0.0)).train(resume_from_checkpoint=str(builds.folder / "checkpoint-8"))
    assert "checkpoint-8 was cut with another light.remove, and stays so" in caplog.text
    nowhere = str(builds.folder / "nowhere")
    assert "there is no such folder" in refusal(lambda: builds.trainer().train(resume_from_checkpoint=nowhere))


def test_refused_before_training(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    model = builds.base()
    optimizer = torch.optim.AdamW(model.parameters())
    assert "optimizers: an optimizer or scheduler" in refusal(lambda: builds.trainer(optimizers=(optimizer, None)))
    positional = (*(None,) * 9, (optimizer, None))
    assert "optimizers: an optimizer or scheduler" in refusal(
        lambda: LightTrainer(model, *positional, peft_config=lora())
    )
    assert "torch.compile does not work" in refusal(lambda: builds.trainer(torch_compile=True))
    assert "auto_find_batch_size does not work" in refusal(lambda: builds.trainer(auto_find_batch_size=True))
    assert "pass a model from peft.get_peft_model" in refusal(lambda: builds.trainer(model=model))
    assert "give model=" in refusal(lambda: LightTrainer(None, arguments(builds.folder), peft_config=lora()))
    resumed = refusal(lambda: builds.trainer().train(resume_from_checkpoint=True))
    assert f"{builds.folder} has no checkpoint to resume from" in resumed
    bare = torch.nn.Linear(2, 2)
    assert "Linear contains no transformers model" in refusal(lambda: builds.trainer(model=bare, peft_config=lora()))
    nowhere = lora(target_modules=["nothing"])
    placing = refusal(lambda: builds.trainer(peft_config=nowhere))
    assert "PEFT cannot put its modules on the model" in placing and "light.modules.blocks allows them in" in placing
    other_task = lora(task_type="CAUSAL_LM")
    assert "task_type CAUSAL_LM may be that of another" in refusal(lambda: builds.trainer(peft_config=other_task))
    assert "give a PEFT configuration" in refusal(lambda: builds.trainer(peft_config={"r": 8}))
    assert "prefix_cache is 'memory'" in refusal(lambda: builds.trainer(prefix_cache="memory"))
    assert "fast_steps is 'yes'; give True or False" in refusal(lambda: builds.trainer(fast_steps="yes"))
    assert "teacher is a int; give a model" in refusal(lambda: builds.trainer(teacher=5))
    splits = {"train_dataset": DatasetDict(builds.rows), "peft_config": lora()}
    assert "pass one of its splits: train, test" in refusal(lambda: LightTrainer(builds.base(), **splits))
    assert "give it a subclass of transformers.Trainer" in refusal(lambda: light_trainer(dict))
    assert light_trainer(LightTrainer) is LightTrainer
    frozen = get_peft_model(builds.base(), lora(inference_mode=True))
    assert "load it with is_trainable=True" in refusal(lambda: builds.trainer(model=frozen))
    both = get_peft_model(builds.base(), lora())
    assert "leave peft_config= out" in refusal(lambda: builds.trainer(model=both, peft_config=lora()))
    empty = {"train_dataset": builds.rows["train"].select([]), "processing_class": builds.tokenizer}
    steps = arguments(builds.folder, max_steps=20)
    assert "the training dataset is empty" in refusal(
        lambda: LightTrainer(builds.base(), steps, peft_config=lora(), light=LIGHT, **empty)
    )
    assert "light.remove.blocks 0.99 cannot be reached" in refusal(lambda: builds.trainer(light=0.99))
    assert "blocks 0.99 cannot be reached" in refusal(lambda: EarlyPruner(get_peft_model(builds.base(), lora()), 0.99))
    short = light_of(**{**BUDGET, "length": 24})
    assert "leaves none of the run's 24" in refusal(lambda: builds.trainer(light=short))
    monkeypatch.setattr("lightpeft.prune.length.LEAST_EXAMPLES", 256)
    said = refusal(lambda: builds.trainer(light=LIGHT))
    assert "estimation scores 32 examples, too few for a reliable plan, which needs 256" in said
    assert "train for longer (num_train_epochs)" in said
    assert "train for longer (max_steps)" in refusal(lambda: builds.trainer(light=LIGHT, max_steps=24))


def test_rows_of_a_stream_are_counted_by_steps(
    builds: Builds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With `max_steps`, which such a training needs: estimation is as long as over rows that have a length."""
    monkeypatch.setattr("lightpeft.prune.length.LEAST_EXAMPLES", 64)
    builds.rows = {**builds.rows, "train": builds.rows["train"].to_iterable_dataset()}
    stream = {"max_steps": 30, "train_sampling_strategy": "random"}
    light = light_of(**{**BUDGET, "length": "auto"})
    trainer = builds.trainer(light=light, **stream)
    trainer.train()
    assert trainer.light_report["estimation_steps"] == 15 and trainer.state.global_step == 30
    monkeypatch.setattr("lightpeft.prune.length.LEAST_EXAMPLES", 256)
    assert "train for longer (max_steps)" in refusal(lambda: builds.trainer(light=light, **stream))
    assert not builds.trainer(light="auto", **stream).light_config.cuts_blocks
    assert "cuts nothing of the base: estimation scores" in caplog.text


# -- `EarlyPruner` -------------------------------------------------------------------------------------------------


def test_what_a_loop_has_to_do_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pruner = EarlyPruner(with_lora(make("bert")))
    pruner.start(100)
    said = " ".join(caplog.text.split())
    assert "multiply plain PEFT's learning rate by 2" in said and "accelerated(model, dropout=0)" in said
    caplog.clear()
    EarlyPruner(with_lora(make("bert")), light_of()).start(100)
    assert not caplog.text
    assert list(EarlyPruner(with_lora(make("bert")), light_of(keep="both")).advice()) == [
        "call lightpeft.full_width(light) after training, for keep: both"
    ]
