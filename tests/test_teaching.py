"""A teacher: its logits beside the labels, the loss by its formula, what it may be, and whole runs with one."""

from __future__ import annotations

import copy
import json
import operator
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapters import save_light
from datasets import Dataset, concatenate_datasets
from lanes import telling
from lights import but, light_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, make, refusal, with_lora, without_dropout
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    BertForTokenClassification,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from workbench import (
    BAD,
    GOOD,
    NEUTRAL,
    SPECIAL,
    Workbench,
    _tokenizer,
    at_step,
    in_child,
    in_children,
    labeled,
    lightpeft,
    read,
    save_base,
    signalling,
    write_rows,
)

from lightpeft import LightTrainer, light_trainer
from lightpeft.app.evaluation.predicting import predict
from lightpeft.app.folders.stored_config import to_yaml
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reproduce import reproduce
from lightpeft.app.runs.teacher import RunTeacher
from lightpeft.config import run_config_from_dict
from lightpeft.recipe import teacher as recipe_teacher
from lightpeft.training.rows import batches_of

ROWS, BATCH = 24, 8
NOTHING = light_of(heads=0.0, neurons=0.0, experts=0.0, modules=0.0, ranks=0.0, dropout=None, scale=1.0)
"""Of the blocks, that is; light training is then stock training."""
CUT = light_of(length=2, heads=0.5, neurons=0.5, modules=0.5, dropout=0.0, scale=1.0)
TOKENIZER = _tokenizer([*SPECIAL, *(f"word{index}" for index in range(4, VOCABULARY))], "bert")


def drawn(*shape: int, below: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def tiny(cls: type[PreTrainedModel], seed: int, labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                        intermediate_size=48, pad_token_id=0, num_labels=labels)  # fmt: skip
    model = cls(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.3) if weight.dim() > 1 else weight.add_(0.2 * torch.randn_like(weight))
    return model


def classes_rows() -> dict[str, list[Any]]:
    return {"input_ids": ids_of(ROWS), "labels": drawn(ROWS).tolist()}


def numbers_rows() -> dict[str, list[Any]]:
    return {"input_ids": ids_of(ROWS), "labels": drawn(ROWS, below=5).float().tolist()}


def tokens_rows() -> dict[str, list[Any]]:
    ids = ids_of(ROWS)
    labels = [drawn(len(row), below=3, seed=index).tolist() for index, row in enumerate(ids)]
    return {"input_ids": ids, "labels": [[-100, *own[1:]] for own in labels]}


def options_rows() -> dict[str, list[Any]]:
    ids = [ids_of(3, seed=index) for index in range(ROWS)]
    return {"input_ids": ids, "labels": drawn(ROWS, below=3).tolist()}


def ids_of(rows: int, seed: int = 0) -> list[list[int]]:
    """Rows of 3 to 8 tokens."""
    lengths = (3 + drawn(rows, below=6, seed=seed)).tolist()
    return [(4 + drawn(length, below=VOCABULARY - 4, seed=index)).tolist() for index, length in enumerate(lengths)]


KINDS: dict[str, tuple[Callable[[int], PreTrainedModel], Callable[[], dict[str, list[Any]]], Any]] = {
    "classes": (lambda seed: make("bert", seed), classes_rows, None),
    "numbers": (lambda seed: make("bert", seed, num_labels=1), numbers_rows, None),
    "tokens": (
        lambda seed: tiny(BertForTokenClassification, seed),
        tokens_rows,
        DataCollatorForTokenClassification(TOKENIZER),
    ),
    "options": (lambda seed: tiny(BertForMultipleChoice, seed), options_rows, DataCollatorForMultipleChoice(TOKENIZER)),
}


def rows_of(kind: str) -> Dataset:
    rows = KINDS[kind][1]()
    ones = [[[1] * len(each) for each in row] if kind == "options" else [1] * len(row) for row in rows["input_ids"]]
    return Dataset.from_dict({**rows, "attention_mask": ones})


def trainer(kind: str, folder: Path, parts: int = 1, rows: Dataset | None = None, **options: Any) -> Any:
    """Plain gradient descent, which shows how large gradients are."""
    set_seed(0)
    model = without_dropout(KINDS[kind][0](0))
    placed = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)
    settings = {
        "per_device_train_batch_size": BATCH // parts, "gradient_accumulation_steps": parts, "max_steps": 2,
        "optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no",
        "train_sampling_strategy": "sequential", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    settings |= options.pop("settings", {})
    return LightTrainer(
        model=get_peft_model(model, placed),
        args=TrainingArguments(str(folder), **settings),
        train_dataset=rows_of(kind) if rows is None else rows,
        processing_class=TOKENIZER,
        data_collator=KINDS[kind][2],
        **{"light": NOTHING, **options},
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


# -- the loss ----------------------------------------------------------------------------------------------------


def by_hand(kind: str, student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], weight: float) -> Tensor:
    """The formula, of a batch."""
    labels, inputs = batch["labels"], {name: value for name, value in batch.items() if name != "labels"}
    ours = student(**inputs).logits
    with torch.no_grad():
        theirs = teacher(**inputs).logits
    if kind == "numbers":
        own, distance = functional.mse_loss(ours.squeeze(-1), labels), functional.mse_loss(ours, theirs)
        return (1 - weight) * own + weight * distance
    if kind == "tokens":
        ours, theirs, labels = ours[labels != -100], theirs[labels != -100], labels[labels != -100]
    own = functional.cross_entropy(ours, labels)
    temperature = 1 if kind == "tokens" else 2
    p, q = (theirs / temperature).softmax(-1), (ours / temperature).softmax(-1)
    return (1 - weight) * own + weight * temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_is_the_formula(kind: str, parts: int, tmp_path: Path) -> None:
    """Of a step and of its gradients: weights after two steps of plain descent are those of a loop by hand."""
    teacher = KINDS[kind][0](7)
    trained = trainer(kind, tmp_path, parts, teacher=teacher, teacher_weight=0.3)
    expected, found = copy.deepcopy(trained.model).train(), []
    rows = rows_of(kind)
    for step, rate in enumerate((1e-2, 0.5e-2)):
        expected.zero_grad()
        mean = torch.zeros(())
        for part in range(parts):
            first = step * BATCH + part * BATCH // parts
            batch = trained.data_collator([rows[first + index] for index in range(BATCH // parts)])
            loss = by_hand(kind, expected, teacher, dict(batch), 0.3) / parts
            loss.backward()
            mean += loss.detach()
        found.append(float(mean))
        with torch.no_grad():
            for weight in expected.parameters():
                if weight.grad is not None:
                    weight -= rate * weight.grad
    trained.train()
    assert losses(trained) == pytest.approx(found, rel=1e-3)
    for name, weight in weights(expected).items():
        assert weight.allclose(trained.model.get_parameter(name), rtol=0, atol=1e-5), name


@pytest.mark.parametrize("light", [NOTHING, CUT, but(CUT, train="all")], ids=["nothing", "cut", "all"])
def test_a_column_is_a_teacher(light: Any, tmp_path: Path) -> None:
    """The rows that a trainer has asked a teacher about need no teacher, and no column that the model does not know."""
    settings = {"max_steps": 6, "num_train_epochs": 2}
    asked = trainer("classes", tmp_path, teacher=KINDS["classes"][0](7), light=light, settings=settings)
    rows = asked.train_dataset.add_column("text", ["some"] * ROWS)
    given = trainer("classes", tmp_path, rows=rows, light=light, settings=settings)
    alone = trainer("classes", tmp_path, light=light, settings=settings)
    for each in (asked, given, alone):
        each.train()
    found = [weights(each.model) for each in (asked, given, alone)]
    assert all(found[0][name].equal(found[1][name]) for name in found[0])
    assert losses(asked) == losses(given) != losses(alone)


def test_the_teacher_waits_for_the_cut(tmp_path: Path) -> None:
    """Estimation learns and scores by the labels alone; what is left learns from the teacher."""
    options: dict[str, Any] = {"light": but(CUT, length=3), "settings": {"max_steps": 6, "num_train_epochs": 2}}
    alone, taught = (trainer("classes", tmp_path, teacher=of, **options) for of in (None, KINDS["classes"][0](7)))
    for each in (alone, taught):
        each.train()
    assert taught.light_plan == alone.light_plan
    assert losses(taught)[:3] == losses(alone)[:3] and all(map(operator.ne, losses(taught)[3:], losses(alone)[3:]))


@telling("kind", ["classes", "tokens"], ["tokens"])
def test_a_student_learns_what_its_teacher_says_and_labels_do_not(kind: str, tmp_path: Path) -> None:
    teacher = KINDS[kind][0](7)
    settings = {"max_steps": 150, "optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0}
    student = trainer(kind, tmp_path, teacher=teacher, teacher_weight=1.0, light=CUT, settings=settings)
    student.train()
    assert student.light_plan.removed_parameters > 0
    batch = dict(student.data_collator([rows_of(kind)[index] for index in range(ROWS)]))
    labels = batch.pop("labels")
    there = labels != -100
    answers = [model.eval()(**batch).logits.argmax(-1)[there] for model in (student.model, teacher)]
    agreed = [float((answers[0] == other).float().mean()) for other in (answers[1], labels[there])]
    assert agreed[0] > 0.9 > 0.8 > agreed[1]


@pytest.mark.parametrize("kind", ["classes", "tokens", "options"])
def test_evaluation_is_on_labels_alone(kind: str, tmp_path: Path) -> None:
    """Also of rows that have a teacher's logits."""
    rows, settings = rows_of(kind), {"per_device_eval_batch_size": ROWS}
    made = trainer(kind, tmp_path, teacher=KINDS[kind][0](7), eval_dataset=rows, settings=settings)
    batch = dict(made.data_collator([rows[index] for index in range(ROWS)]))
    expected = float(made.model.eval()(**batch).loss)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert made.evaluate(made.train_dataset)["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_label_smoothing_is_of_the_labels_part(tmp_path: Path) -> None:
    teacher, settings = KINDS["classes"][0](7), {"max_steps": 1}

    def first_loss(**options: Any) -> float:
        trained = trainer("classes", tmp_path, **options)
        trained.train()
        return losses(trained)[0]

    smooth = {"settings": {**settings, "label_smoothing_factor": 0.2}}
    labels, only = first_loss(**smooth), first_loss(teacher=teacher, teacher_weight=1.0, settings=settings)
    both = first_loss(teacher=teacher, teacher_weight=0.25, **smooth)
    assert both == pytest.approx(0.75 * labels + 0.25 * only, rel=1e-3) and labels != pytest.approx(only, rel=1e-2)


def test_a_resumed_training_ends_as_a_whole_one(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "group_by_length"}
    options: dict[str, Any] = {"light": CUT, "settings": settings}
    whole = trainer("tokens", tmp_path / "whole", teacher=KINDS["tokens"][0](7), **options)
    whole.train()
    for step in (1, 4):
        again = trainer("tokens", tmp_path / "whole", teacher=KINDS["tokens"][0](7), **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        found = weights(again.model)
        assert found and all(weight.equal(found[name]) for name, weight in weights(whole.model).items())


def test_the_budget_search_and_the_prefix_see_labels_alone(tmp_path: Path) -> None:
    """Batches of rows that are set aside, and rows that the frozen blocks are computed for."""
    made = trainer("classes", tmp_path, teacher=KINDS["classes"][0](7), settings={"remove_unused_columns": False})
    assert "teacher_logits" in made.train_dataset.column_names
    (batch,) = batches_of(made.train_dataset, made, [1, 5, 2], 3)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert "teacher_logits" not in made._prefix._rows.column_names
    batch = next(iter(made.get_train_dataloader()))
    assert batch["teacher_logits"].shape == (BATCH, 2)
    assert isinstance(made.data_collator, DataCollatorWithPadding)


def test_rows_keep_their_format(tmp_path: Path) -> None:
    made = trainer("classes", tmp_path, rows=rows_of("classes").with_format("torch"), teacher=KINDS["classes"][0](7))
    assert made.train_dataset.format["type"] == "torch"
    made.train()
    plain = trainer("classes", tmp_path, teacher=KINDS["classes"][0](7))
    plain.train()
    assert losses(made) == losses(plain)


@pytest.mark.parametrize("form", ["whole", "light", "peft"])
def test_a_teacher_by_its_folder(form: str, tmp_path: Path) -> None:
    make("bert", 7).save_pretrained(tmp_path / "base")
    folder = tmp_path / ("base" if form == "whole" else "adapter")
    live: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    if form == "light":
        live = save_light(live, folder, heads=0.5)
    if form == "peft":
        live = with_lora(live)
        live.save_pretrained(folder)
    given = [trainer("classes", tmp_path, teacher=each).train_dataset["teacher_logits"][:] for each in (folder, live)]
    assert torch.tensor(given[0]).allclose(torch.tensor(given[1]), atol=1e-5)


@pytest.mark.parametrize("kind", ["classes", "tokens", "options", "numbers"])
def test_a_teacher_that_gives_one_class_is_warned_about(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Numbers have no classes, and tokens without labels none either."""
    rows, said = concatenate_datasets([rows_of(kind)] * 2), list[str]()
    monkeypatch.setattr(LightTrainer, "_warn", lambda self, line: said.append(line))

    def taught_by(best: Callable[[int], int]) -> None:
        """With logits that are highest for the class `best(row)`."""

        def answer(count: int, answering: Any) -> list[Tensor]:
            given = answering(range(count))
            return [
                row if kind == "numbers" else torch.where(row != 0, torch.arange(row.shape[-1]) == best(number), 0.0)
                for number, row in enumerate(given)
            ]

        monkeypatch.setattr(recipe_teacher, "split_over_processes", answer)
        trainer(kind, tmp_path, rows=rows, teacher=KINDS[kind][0](7))

    taught_by(lambda number: int(number == 40))
    assert said == []
    taught_by(lambda number: 1)
    what = {"options": "option (number 2)", "numbers": ""}.get(kind, 'class ("LABEL_1")')
    assert len(said) == (kind != "numbers")
    assert all(f"all {2 * ROWS} training rows the same {what}" in line for line in said)


# -- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A student whose labels say nothing, and a teacher of another family, which knows the same words by other ids."""
    made = Workbench(tmp_path_factory.mktemp("teaching"))
    other = _tokenizer([*SPECIAL, *BAD, *GOOD, *NEUTRAL], "mpnet")
    save_base(made.folder / "other", "mpnet", seed=3, tokenizer=other)
    changes = {"method": "full", "model.name": str(made.folder / "other"), "training.learning_rate": 3e-3}
    pipeline.run(made.config("teacher", **changes, **{"training.epochs": 10}))
    draw = random.Random(0)
    spoilt = [{**row, "label": draw.choice(["positive", "negative"])} for row in labeled(64, seed=1)]
    write_rows(made.train, spoilt)
    return made


def taught(bench: Workbench, name: str, **changes: Any) -> Any:
    teacher = {"training.teacher": str(bench.folder / "teacher"), "training.teacher_weight": 1.0}
    return bench.config(name, **{**teacher, "training.epochs": 6, **changes})


def accuracy(report: dict[str, Any]) -> float:
    return float(report["metrics"]["accuracy"])


@telling("method", ["light", "plain", "full"], ["light"])
def test_a_run_learns_from_a_teacher_with_another_tokenizer(bench: Workbench, method: str) -> None:
    changes = {"method": method} | ({"training.learning_rate": 3e-3} if method == "full" else {})
    assert accuracy(read(bench.folder / "teacher/metrics.json")) > 0.95
    report = pipeline.run(taught(bench, method, **changes))
    assert accuracy(report) > 0.85
    assert report["seconds"]["teach"] > 0


def test_without_the_teacher_it_learns_nothing(bench: Workbench) -> None:
    """Its labels say nothing."""
    assert accuracy(pipeline.run(taught(bench, "alone", method="plain", **{"training.teacher": None}))) < 0.75


def test_a_run_warns_of_a_teacher_that_gives_one_class(bench: Workbench) -> None:
    shutil.copytree(bench.folder / "teacher", bench.folder / "useless")
    file = bench.folder / "useless/model/model.safetensors"
    weights = {n: 0 * w + (n.startswith("classifier.out_proj.bias")) * 1.0 for n, w in load_file(file).items()}
    weights["classifier.out_proj.bias"][0] = 5.0
    save_file(weights, file, {"format": "pt"})
    useless = {"method": "plain", "training.teacher": str(bench.folder / "useless/model"), "training.epochs": 1}
    warnings = pipeline.run(taught(bench, "useless_teacher", **useless))["warnings"]
    assert any('gives all 64 training rows the same class ("' in line for line in warnings)


def test_a_run_warns_of_a_teacher_that_has_seen_the_test_rows(bench: Workbench) -> None:
    told = yaml.safe_load((bench.folder / "teacher/config.yaml").read_text())
    seen = {"method": "plain", "training.epochs": 1, "data.test": told["data"]["train"]}
    warnings = pipeline.run(taught(bench, "leaky_teacher", **seen))["warnings"]
    assert any("training.teacher: 64 of the 64 test rows are also training rows of the teacher" in w for w in warnings)


def test_the_run_folder_has_what_the_teacher_predicts(bench: Workbench) -> None:
    """Row by row; rows that are set aside to stop by have none."""
    changes = {"training.epochs": "auto", "training.batch_size": 16, "method": "plain"}
    rows = labeled(240, seed=4)
    data = write_rows(bench.folder / "many.csv", rows)
    work = pipeline.prepare(taught(bench, "predicted", **changes, **{"data.train": str(data)}))
    assert work.held_rows is not None and len(work.train_rows) == 200
    logits = torch.tensor(work.taught_rows()["teacher_logits"])
    answered = bench.folder / "answers.jsonl"
    predict(bench.folder / "teacher", data, answered)
    every = [json.loads(line)["p_positive"] for line in answered.read_text().splitlines()]
    by_ids = {tuple(ids): p for ids, p in zip(work.task.encode_inputs(work.task.train, work.tokenizer)["input_ids"],
                                               every, strict=True)}  # fmt: skip
    expected = [by_ids[tuple(ids)] for ids in work.train_rows["input_ids"]]
    assert logits.softmax(-1)[:, 1].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("step", [4, 15])
def test_a_killed_run_goes_on_without_asking_again(bench: Workbench, step: int) -> None:
    """Before the cut and behind it."""
    whole, killed = (taught(bench, name, **{"training.epochs": 3}) for name in ("whole", f"killed{step}"))
    whole = pipeline.run(whole)
    file = bench.folder / f"killed{step}.yaml"
    file.write_text(to_yaml(killed), encoding="utf-8")
    assert in_child(at_step(step, signalling(signal.SIGKILL)), "run", "--config", file)[0] == -signal.SIGKILL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTeacher, "_compute_logits", lambda *_: pytest.fail("the teacher was asked again"))
        assert lightpeft("run", "--config", file) == 0
    again = read(bench.folder / f"killed{step}/metrics.json")
    assert again["metrics"] == whole["metrics"]
    kept = [load_file(bench.folder / name / "adapter/adapter_model.safetensors") for name in ("whole", f"killed{step}")]
    assert kept[0].keys() == kept[1].keys() and all(kept[0][name].equal(kept[1][name]) for name in kept[0])


def test_two_processes_ask_it_for_half_of_the_rows_each(bench: Workbench) -> None:
    def counting(rank: int) -> None:
        original = RunTeacher._compute_logits

        def asked(self: RunTeacher, size: int) -> Any:
            logits = original(self, size)
            (bench.folder / f"rank{rank}.json").write_text(json.dumps([row.tolist() for row in logits]))
            return logits

        RunTeacher._compute_logits = asked  # type: ignore[method-assign]

    file = bench.folder / "two.yaml"
    file.write_text(to_yaml(taught(bench, "two", **{"training.batch_size": 4})), encoding="utf-8")
    ends = in_children(2, counting, "run", "--config", file)
    assert [code for code, _ in ends] == [0, 0], ends
    one = pipeline.prepare(taught(bench, "one")).taught_rows()["teacher_logits"][:]
    for rank in range(2):
        given = json.loads((bench.folder / f"rank{rank}.json").read_text())
        assert torch.tensor(given).allclose(torch.tensor(one), atol=1e-5)
    assert accuracy(read(bench.folder / "two/metrics.json")) > 0.8


def test_it_is_asked_again_where_teacher_rows_or_file_are_others(bench: Workbench) -> None:
    rows, teacher = labeled(20, seed=6), shutil.copytree(bench.folder / "teacher/model", bench.folder / "copied")
    data, calls = write_rows(bench.folder / "few.csv", rows), []

    def asked() -> int:
        calls.clear()
        changes = {"data.train": str(data), "training.teacher": str(teacher), "light": 0.0}
        pipeline.prepare(taught(bench, "asked", method="plain", **changes)).taught_rows()
        return len(calls)

    with pytest.MonkeyPatch.context() as patch:
        original = RunTeacher._compute_logits
        patch.setattr(RunTeacher, "_compute_logits", lambda self, size: calls.append(1) or original(self, size))
        assert (asked(), asked()) == (1, 0)
        write_rows(data, [*rows[:-1], {**rows[-1], "text": "good1 good2"}])
        assert (asked(), asked()) == (1, 0)
        tensors = load_file(teacher / "model.safetensors")
        halved = {name: 0.5 * weight for name, weight in tensors.items()}
        save_file(halved, teacher / "model.safetensors", metadata={"format": "pt"})
        (teacher / "checksums.json").unlink(missing_ok=True)
        assert (asked(), asked()) == (1, 0)
        file = bench.folder / "asked/teacher/logits.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"0000")
        assert (asked(), asked()) == (1, 0)


def test_cells_of_a_grid_ask_it_once_for_the_same_rows(bench: Workbench, tmp_path: Path) -> None:
    """Whatever their methods and seeds; and each counts the time."""
    rows = write_rows(tmp_path / "few.csv", labeled(20, seed=6))
    settings = bench.settings(**{"training.epochs": 1, "training.teacher": str(bench.folder / "teacher")})
    grid = {
        "run": {name: value for name, value in settings.items() if name != "output"},
        "models": {"tiny": {"model": settings["model"]}},
        "tasks": {"words": {"data": settings["data"]}, "few": {"data": {"train": str(rows)}}},
        "methods": ["lora", "light-lora"],
        "seeds": [0, 1],
    }
    file, asked = tmp_path / "grid.yaml", []
    file.write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    original = RunTeacher._compute_logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTeacher, "_compute_logits", lambda self, size: asked.append(1) or original(self, size))
        for part in (["method=lora", "seed=0"], ["method=lora", "task=few"], ["seed=0", "task=few"]):
            reproduce(file, tmp_path / "out", part, launch=lambda cell, *_: pipeline.run(cell.config) and None)
    assert len(asked) == 2
    cells = [*(tmp_path / "out/cells").glob("*/*/*/*")]
    logits = {(cell.parts[-3], (cell / "teacher/logits.safetensors").read_bytes()) for cell in cells}
    assert len(cells) == 4 and len(logits) == 2
    assert all(read(cell / "metrics.json")["seconds"]["teach"] > 0 for cell in cells)


def test_a_finished_run_needs_its_teacher_no_more(bench: Workbench) -> None:
    gone = shutil.copytree(bench.folder / "teacher/model", bench.folder / "gone")
    config = taught(bench, "lonely", method="plain", **{"training.teacher": str(gone), "training.epochs": 1})
    report = pipeline.run(config)
    shutil.rmtree(gone)
    assert pipeline.run(config)["metrics"] == report["metrics"]


@pytest.mark.parametrize("kind", ["regression", "multiple-choice"])
def test_other_kinds(tmp_path: Path, kind: str) -> None:
    """A student of random labels gives what its teacher does."""
    base, draw = save_base(tmp_path / "base"), random.Random(0)
    texts = [row["text"] for row in labeled(48, seed=5)]
    if kind == "regression":
        rows = [{"text": text, "label": draw.random()} for text in texts]
    else:
        rows = [{"context": text, "options": draw.sample(texts, 2 + index % 2), "answer": index % 2}
                for index, text in enumerate(texts)]  # fmt: skip
    data = {"task": kind, "train": str(write_rows(tmp_path / "rows.jsonl", rows)), "max_length": 32}
    settings = {"model": {"name": str(base)}, "data": data, "method": "plain", "peft": {"slots": ["q", "v"]}}
    settings["training"] = {"epochs": 1, "batch_size": 8, "learning_rate": 3e-2}
    pipeline.run(run_config_from_dict({**settings, "output": str(tmp_path / "teacher"), "seed": 5}))
    settings["training"] |= {"epochs": 12, "teacher": str(tmp_path / "teacher"), "teacher_weight": 1.0}
    work = pipeline.prepare(run_config_from_dict({**settings, "output": str(tmp_path / "student")}))
    expected = work.taught_rows()["teacher_logits"][:]
    pipeline.run(work.config)
    entries = [json.loads(line) for line in (tmp_path / "student/log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    counts = [len(row) for row in expected]
    assert counts == ([1] * len(counts) if kind == "regression" else [len(row) for row in work.train_rows["input_ids"]])


# -- what is refused ---------------------------------------------------------------------------------------------


def no_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").touch()
    return folder


def named(seed: int, *labels: str) -> PreTrainedModel:
    model = make("bert", seed)
    model.config.id2label = dict(enumerate(labels))
    return model


class OwnLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **options)


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "another task": (
        "classes",
        lambda _: make("bert", 7, num_labels=1),
        "(BertForSequenceClassification) has another task than the model (BertForSequenceClassification)",
    ),
    "tokens": (
        "classes",
        lambda _: tiny(BertForTokenClassification, 7),
        "BertForTokenClassification) has another task",
    ),
    "more labels": ("classes", lambda _: make("bert", 7, num_labels=3), "has 3 outputs, and the model 2"),
    "more tokens": (
        "classes",
        lambda _: make("bert", 7, vocab_size=VOCABULARY + 1),
        f"has another tokenizer: {VOCABULARY + 1} tokens, and the model {VOCABULARY}",
    ),
    "a base": ("classes", lambda folder: saved(make("bert", 7).bert, folder), "has no weights for classifier"),
    "no folder": ("classes", lambda folder: folder / "nowhere", "nowhere"),
    "a run": ("classes", lambda folder: no_run(folder / "run"), "is a run folder; use its model:"),
}


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_trainer_refuses(name: str, tmp_path: Path) -> None:
    kind, teacher, line = REFUSED[name]
    assert line in refusal(lambda: trainer(kind, tmp_path, teacher=teacher(tmp_path)))


def test_a_trainer_refuses_other_names_and_answers_that_are_none(tmp_path: Path) -> None:
    def said(student: PreTrainedModel, teacher: Any, rows: Any = None, **options: Any) -> str:
        def made() -> None:
            args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=2)
            lora = LoraConfig(r=2)
            given = rows_of("classes") if rows is None else rows
            common = {"args": args, "train_dataset": given, "processing_class": TOKENIZER, "peft_config": lora}
            light_trainer(options.pop("cls", Trainer))(student, **common, light=NOTHING, teacher=teacher).train()

        return refusal(made)

    turned = said(named(0, "no", "yes"), named(7, "yes", "no"))
    assert turned.endswith("has the labels yes, no and the model no, yes; use the same labels in one order")
    broken = make("bert", 7)
    broken.classifier.bias.data[0] = torch.inf
    assert "the teacher's logits of 24 of 24 rows are NaN or infinite (row 1, " in said(make("bert"), broken)
    assert said(make("bert"), broken).endswith("; give a teacher whose logits are finite")
    several = rows_of("classes").remove_columns("labels").add_column("labels", [[0.0, 1.0]] * ROWS)
    assert "distillation needs a model with one class" in said(make("bert"), make("bert", 7), several)
    assert "teacher: LlamaForCausalLM is not supported" in said(make("llama-gqa"), make("llama-gqa", 7))
    assert "datasets.Dataset" in said(make("bert"), make("bert", 7), list(rows_of("classes")))
    short = rows_of("classes").add_column("teacher_logits", [[0.5]] * ROWS)
    assert "row 1 of the training rows: teacher_logits has shape [1], and" in said(make("bert"), None, short)
    none = rows_of("classes").add_column("teacher_logits", [[0.5, 1.0]] * (ROWS - 1) + [None])
    assert "row 24 of the training rows: teacher_logits is empty" in said(make("bert"), None, none)
    own = said(make("bert"), make("bert", 7), cls=OwnLoss)
    assert "LightOwnLoss has a loss of its own, which ignores a teacher" in own
    assert "teacher_weight is 0; it must be in (0, 1]" in refusal(
        lambda: trainer("classes", tmp_path, teacher_weight=0)
    )


def refused(bench: Workbench, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """The one line about a run, which leaves no folder."""
    file = bench.folder / "refused.yaml"
    file.write_text(to_yaml(taught(bench, "refused", **changes)), encoding="utf-8")
    capsys.readouterr()
    assert lightpeft("run", "--config", file) == 2
    assert not (bench.folder / "refused").exists()
    return capsys.readouterr().err


def test_a_run_refuses(bench: Workbench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(bench, capsys, **{"training.teacher": str(tmp_path / "nowhere")})
    assert f"folder {tmp_path / 'nowhere'} does not exist" in line
    line = refused(bench, capsys, **{"training.teacher": str(bench.base)})
    assert f"{bench.base} is BertModel; task classification needs ForSequenceClassification" in line
    model = bench.folder / "teacher/model"
    config = json.loads((model / "config.json").read_text())
    for name, labels, part in (
        ("turned", ["positive", "negative"], "has the labels positive, negative, and the data have negative, positive"),
        ("renamed", ["bad", "good"], "has 2 classes (bad, good), but the data have 2 labels (negative, positive)"),
    ):
        other = shutil.copytree(model, tmp_path / name)
        numbered = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        (other / "config.json").write_text(json.dumps({**config, **numbered}))
        assert part in refused(bench, capsys, **{"training.teacher": str(other)})
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["classifier.out_proj.bias"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    line = refused(bench, capsys, **{"training.teacher": str(broken)})
    assert "the teacher's logits of 64 of 64 rows are NaN or infinite (row 1, 2, 3, 4, 5, ...)" in line
    rows = [{"text": row["text"], "label": index % 7} for index, row in enumerate(labeled(40))]
    numbers = {"data.task": "regression", "data.train": str(write_rows(tmp_path / "numbers.csv", rows))}
    line = refused(bench, capsys, **numbers, **{"data.test": None})
    assert "was trained for classification and cannot answer regression" in line


KINDLESS: dict[str, dict[str, Any]] = {
    "causal-lm": {"prompt": "word1 good1", "completion": "good2"},
    "generation": {"question": " ".join(NEUTRAL[:12]), "answers": ["good2"]},
    "span": {"question": "word1", "context": "word2 good1", "answers": ["good1"]},
}
"""Kind without logits that could be learned -> a row of it."""


@pytest.mark.parametrize("task", list(KINDLESS))
def test_a_run_refuses_kinds_without_logits(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Workbench(tmp_path, "bert" if task == "span" else "llama", "causal-lm")
    row = KINDLESS[task]
    rows = write_rows(tmp_path / "rows.jsonl", [row] * 20)
    columns = {name: name for name in row}
    line = refused(
        bench, capsys, **{"data.task": task, "data.columns": columns, "data.train": str(rows), "data.test": None}
    )
    assert f"training.teacher: task {task}" in line and "gives no logits to learn; leave it out; classification" in line
