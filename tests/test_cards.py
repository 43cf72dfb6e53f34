"""The card beside saved weights: what a stranger reads, and what the hub does."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapters import light_over
from documents import blocks
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tiny import ALL, every_family, make, plan_for
from transformers import AutoModelForSequenceClassification
from workbench import Workbench, lightpeft, read

from lightpeft import LightModel, load_light, run, save_merged
from lightpeft.app.tasks.entries.task_entries import ENTRIES
from lightpeft.app.tasks.rows.sources import hub_rows
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving.cards import pipeline_tag
from lightpeft.saving.on_hub import LIGHT_ADAPTER, MERGED_MODEL
from lightpeft.saving.picture import plan_picture

ROOT = Path(__file__).parents[1]


def card_in(folder: Path) -> tuple[ModelCard, Any]:
    """A card with its metadata, as huggingface_hub reads and checks it."""
    card = ModelCard.load(folder / "README.md")
    return card, card.data


# -- the whole card ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A finished run."""
    bench = Workbench(tmp_path_factory.mktemp("bench"))
    run(bench.config())
    return bench


def test_the_card_of_a_run(bench: Workbench) -> None:
    """Quality with its interval, the task with its labels, and how to load it."""
    adapter = bench.folder / "run" / "adapter"
    card, data = card_in(adapter)
    report = read(bench.folder / "run" / "metrics.json")
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("lightpeft", "text-classification", None)
    assert data.tags == ["lightpeft", "light-peft", "pruning", "peft", "lora"]
    (result,) = (each for each in data.eval_results if each.metric_type == "accuracy")
    assert result.metric_value == report["metrics"]["accuracy"] and result.dataset_type == "custom"
    low, high = report["intervals"]["accuracy"]
    assert "| on 40 test rows | value | 95% interval |" in card.text and "examples" not in card.text
    assert "pass your copy as `base=` in Python" in card.text
    assert f"| accuracy | {result.metric_value:.4g} | {low:.4g} to {high:.4g} |" in card.text
    assert load_light(adapter).light_intervals["accuracy"] == [low, high]
    assert "| task | classification: `negative`, `positive` |" in card.text
    assert (
        str(load_light(adapter).light_plan) in card.text and plan_picture(load_light(adapter).light_plan) in card.text
    )
    assert "| data | trained on rows of its author, tested on rows of its author |" in card.text
    assert str(bench.folder) not in card.content, "a local path says nothing elsewhere"
    assert "| base | `base` (`BertForSequenceClassification`, a folder of its author) |" in card.text


def test_what_a_card_says_to_do_works(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code loads it, and the commands give the other forms."""
    monkeypatch.chdir(bench.folder)
    adapter = bench.folder / "run" / "adapter"
    card, _ = card_in(adapter)
    (code,) = re.findall(r"^```python\n(.*?)^```$", card.text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("this folder", str(adapter)), names)
    assert isinstance(names["model"], LightModel)
    assert lightpeft("predict", adapter, bench.test, "--output", "labels.csv") == 0
    assert 'lightpeft predict "this folder" rows.csv' in card.text
    assert 'lightpeft export "this folder" out --form merged' in card.text
    assert lightpeft("export", adapter, "merged", "--form", "merged") == 0
    merged, _ = card_in(bench.folder / "merged")
    (code,) = re.findall(r"^```python\n(.*?)^```$", merged.text, re.MULTILINE | re.DOTALL)
    exec(code.replace("this folder", str(bench.folder / "merged")), names)
    assert type(names["model"]).__name__ == "BertForSequenceClassification"


def test_a_base_on_the_hub(tmp_path: Path) -> None:
    base = make("llama-gqa")
    base.config.name_or_path = "someone/base"
    light = light_over(base, {"perplexity": 3.5, "loss": 1.25, "examples": 40.0})
    light.save_pretrained(tmp_path / "light")
    card, data = card_in(tmp_path / "light")
    assert (data.base_model, data.base_model_relation, data.license) == ("someone/base", "adapter", None)
    assert data.pipeline_tag == "text-generation" and data.model_name == "base-light"
    assert [each.metric_type for each in data.eval_results] == ["perplexity"]
    assert "`base=`" not in card.text and "lightpeft predict" not in card.text
    save_merged(light, tmp_path / "merged")
    _, data = card_in(tmp_path / "merged")
    assert (data.base_model, data.base_model_relation, data.library_name) == ("someone/base", "finetune", "lightpeft")


def test_a_data_set_on_the_hub(tmp_path: Path) -> None:
    light = light_over(make("bert"), {"accuracy": 0.75})
    rows = hub_rows(ENTRIES["sst2"], DataConfig(task="sst2"))
    task = {"entry": vars(ENTRIES["sst2"]), "labels": ["negative", "positive"], "rows": rows}
    as_light(light, light.light_plan, {"accuracy": 0.75}, task).save_pretrained(tmp_path)
    card, data = card_in(tmp_path)
    assert data.datasets == ["nyu-mll/glue"]
    assert "| data | trained on `nyu-mll/glue/sst2:train`, tested on `nyu-mll/glue/sst2:validation` |" in card.text
    (result,) = data.eval_results
    owner_name, config = ENTRIES["sst2"].hub.rsplit("/", 1)  # type: ignore[union-attr]
    assert (result.dataset_type, result.dataset_config, result.dataset_name) == (owner_name, config, "sst2")
    assert result.dataset_split == "validation"


def test_only_rows_on_the_hub_are_named(tmp_path: Path) -> None:
    """What a run names comes before the rows of its task, and a file of the author has no name elsewhere."""
    (file := tmp_path / "mine.csv").touch()
    entry, whole = ENTRIES["sst2"], {"train": "nyu-mll/glue/sst2:train", "test": "nyu-mll/glue/sst2:validation"}
    assert hub_rows(entry, DataConfig(task="sst2")) == whole
    assert hub_rows(entry, DataConfig(task="sst2", path=str(tmp_path))) == {}
    assert hub_rows(entry, DataConfig(task="sst2", train=str(file))) == {}
    assert hub_rows(entry, DataConfig(task="sst2", train="me/rows", test=str(file))) == {"train": "me/rows"}
    assert hub_rows(TaskEntry(), DataConfig(train="me/rows:train")) == dict.fromkeys(("train", "test"), "me/rows:train")


def test_the_picture_shows_how_much_stays() -> None:
    light = light_over(make("bert"), heads=0.5, neurons=0.75)
    title, *rows = plan_picture(light.light_plan).splitlines()
    assert re.split(" {2,}", title) == ["Layer", "Attention heads", "FFN neurons"]
    assert len(rows) == len(light.light_plan.specs)
    for row, (spec, kept) in zip(rows, light.light_plan.parts, strict=True):
        heads, neurons = re.findall(r"([█░]+) +(\d+/\d+)", row)
        assert heads[1] == f"{len(kept.heads)}/{spec.heads}" and neurons[1] == f"{len(kept.neurons)}/{spec.neurons}"
        for bar, part in ((heads[0], len(kept.heads) / spec.heads), (neurons[0], len(kept.neurons) / spec.neurons)):
            assert len(bar) == 20 and abs(bar.count("█") / 20 - part) <= 1 / 40 + 1e-9


def test_a_block_that_is_gone_is_empty() -> None:
    plan = replace(light_over(make("bert"), heads=0.5).light_plan, blocks=())
    for row in plan_picture(plan).splitlines()[1:]:
        assert "█" not in row and row.count("░") == 40


def test_cards_where_nothing_is_removed_say_so(tmp_path: Path) -> None:
    light = light_over(make("llama-gqa"), heads=0.0, neurons=0.0)
    light.save_pretrained(tmp_path / "adapter")
    save_merged(light, tmp_path / "merged")
    for folder, title in (("adapter", "# Light adapter"), ("merged", "# Light model")):
        card, data = card_in(tmp_path / folder)
        assert title in card.text and "| removed | nothing of the transformer blocks |" in card.text
        assert "pruned" not in card.text.lower() and "does not need" not in card.text and "pruning" not in data.tags
    light = light_over(make("llama-gqa"), heads=0.5, neurons=0.5)
    save_merged(light, tmp_path / "cut")
    card, data = card_in(tmp_path / "cut")
    assert "# Pruned model" in card.text and "pruning" in data.tags


def test_the_entry_for_the_hub_is_about_these_cards(tmp_path: Path) -> None:
    """docs/reference/hub_library.md: library, tag, loaders, files and addresses."""
    light = light_over(make("bert"))
    light.save_pretrained(tmp_path / "light")
    save_merged(light, tmp_path / "merged")
    entry, snippet = blocks(ROOT / "docs/reference/hub_library.md", "ts")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert f'repoUrl: "{project["Repository"]}"' in entry and f'docsUrl: "{project["Documentation"]}"' in entry
    for form, loader in (("light", "load_light"), ("merged", "load_merged")):
        card, data = card_in(tmp_path / form)
        assert entry.startswith(f"\t{data.library_name}: {{")
        assert ("merged" in data.tags) == (form == "merged")
        code = snippet.split("`")[3].replace("${loader}", loader).replace("${model.id}", "this folder")
        assert code in card.text
    counted = re.findall(r'path:"([^"]+)"', entry)
    assert counted == [LIGHT_ADAPTER.marker, MERGED_MODEL.marker]
    assert snippet.startswith("export const lightpeft = ") and 'tags.includes("merged") ? "load_merged"' in snippet


@every_family(ALL)
def test_the_hub_knows_what_every_family_does(name: str) -> None:
    assert pipeline_tag(type(make(name)).__name__) is not None


def test_the_license_of_the_base(minilm: Path, tmp_path: Path) -> None:
    """As the card in its folder says."""
    base = AutoModelForSequenceClassification.from_pretrained(minilm)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    plan = plan_for(model)
    apply_plan(model, plan)
    as_light(model, plan).save_pretrained(tmp_path)
    card, data = card_in(tmp_path)
    assert data.license == "apache-2.0" and "| license of the base | `apache-2.0` |" in card.text
