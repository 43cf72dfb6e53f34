"""Model cards (README.md) of saved models: content, cut, quality and loading code, for readers and the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lightpeft.compat.transformers import hub_tasks
from lightpeft.config import TaskEntry
from lightpeft.config.validation import from_dict
from lightpeft.errors import LightPeftError
from lightpeft.files import read_text
from lightpeft.models.hub import is_hub_name
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.saving.picture import plan_picture

CARD = "README.md"
THIS_FOLDER = "this folder"
"""Name of the model's folder in its card; an upload replaces it by the repository's name."""
_COUNTS = ("loss", "examples")
"""Metrics that say nothing about quality without the rows, and are left out of the hub's results."""


@dataclass(frozen=True)
class CardForm:
    """Texts of a model card that depend on the form of the saved model."""

    title: str
    what: str
    """Sentence that describes the model, without a full stop."""
    code: str
    """Code that loads the model from `THIS_FOLDER`."""
    language: str = "python"
    """Language of the code."""
    library: str = "lightpeft"
    """Library that loads the model, for the hub's metadata."""
    relation: Literal["adapter", "finetune"] = "finetune"
    """Relation to the base, for the hub's metadata (which has none for pruned models)."""
    exports: bool = False
    """True if `lightpeft export` converts the model to other forms."""


def whole_model_form(plan: PrunePlan, code: str, form: str = "", **options: Any) -> CardForm:
    """Make the card texts of a model that needs no base.

    Args:
        plan: plan of the light model.
        code: code that loads the model from `THIS_FOLDER`.
        form: suffix of the title, " as ...", for other files than transformers'.
        options: other fields of `CardForm`.
    """
    if not plan.cuts_blocks:
        what = "A complete model with PEFT merged into it; nothing of its blocks was removed"
        return CardForm(f"Light model{form}", what, code, **options)
    what = (
        "A complete model with PEFT merged into it, without attention heads and FFN neurons that its task does not need"
    )
    return CardForm(f"Pruned model{form}", what, code, **options)


def loading_code(loader: str) -> str:
    """Return Python code that loads the folder by a function of lightpeft."""
    return f'from lightpeft import {loader}\n\nmodel = {loader}("{THIS_FOLDER}")'


def transformers_loading_code(architecture: str) -> str:
    """Return Python code that loads the folder by a class of transformers."""
    return f'from transformers import {architecture}\n\nmodel = {architecture}.from_pretrained("{THIS_FOLDER}")'


def model_card(facts: Mapping[str, Any], plan: PrunePlan, form: CardForm) -> str:
    """Return the text of README.md for a saved model.

    Args:
        facts: description of the model (`description.facts_of`).
        plan: plan of the light model.
        form: texts that depend on the form of the saved model.
    """
    license = license_of(facts["base"]["id"])
    parts = [
        f"# {form.title}",
        f"{form.what} (Light-PEFT, Gu et al., Findings of ACL 2024).",
        "\n".join(_table(facts, plan, license)),
        "## How to load it",
        f"```{form.language}\n{form.code}\n```",
        *(_its_base(facts) if form.relation == "adapter" else ()),
        *(_shell(facts, form) if form.language == "python" else ()),
        "## What is left of the base",
        f"```\n{plan_picture(plan)}\n```",
        f"```\n{plan}\n```",
        "## Quality",
        "\n".join(_quality_table(facts)),
    ]
    data = _metadata(facts, plan, form, license)
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(facts: Mapping[str, Any], plan: PrunePlan, form: CardForm, license: str | None) -> ModelCardData:
    base, task, results = facts["base"], pipeline_tag(facts["base"]["architecture"]), list(_results(facts))
    known: dict[str, Any] = {"license": license} if license else {}
    if is_hub_name(base["id"]):  # a folder means nothing to other readers, and is no valid id
        known |= {"base_model": base["id"], "base_model_relation": form.relation}
    if results:
        known |= {"model_name": f"{_base_name(base).rpartition('/')[2]}-light", "eval_results": results}
    if rows := _rows(facts):
        known["datasets"] = sorted({_data_set(name)["dataset_type"] for name in rows.values()})
    kind = facts["peft_type"].lower() if facts.get("peft_type") else None
    merged = form.relation == "finetune" and form.library == "lightpeft" and "merged"  # the hub's snippet reads it
    tags = [tag for tag in ("lightpeft", "light-peft", plan.cuts_blocks and "pruning", merged, "peft", kind) if tag]
    return ModelCardData(library_name=form.library, pipeline_tag=task, tags=tags, **known)


def pipeline_tag(architecture: str) -> str | None:
    """Return the hub's task name of a transformers class, such as text-classification; None: it has none."""
    return next((task for task, names in hub_tasks().items() if architecture in names), None)


def _results(facts: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Yield the metrics as evaluation results of the hub; none if the hub has no name for the task."""
    task, entry = pipeline_tag(facts["base"]["architecture"]), _task_entry(facts) or TaskEntry()
    rows: dict[str, Any] = {"dataset_type": "custom", "dataset_name": entry.name or "rows of its author"}
    if tested := _rows(facts).get("test"):
        rows |= {"dataset_name": entry.name or tested, **_data_set(tested)}
    for metric, value in facts["metrics"].items():
        if task is not None and metric not in _COUNTS and isinstance(value, (int, float)):
            yield EvalResult(task_type=task, metric_type=metric, metric_value=value, **rows)


def _rows(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return "train" and "test" -> name of the rows on the hub; a part whose rows are files has none."""
    rows = facts["task"].get("rows")
    named = rows if isinstance(rows, Mapping) else {}
    return {part: named[part] for part in ("train", "test") if isinstance(named.get(part), str)}


def _data_set(rows: str) -> dict[str, str]:
    """Return the fields of an evaluation result for rows on the hub, named as owner/name[/config][:split]."""
    place, _, split = rows.partition(":")
    owner, name, config, *_ = *place.split("/"), "", ""
    fields = {"dataset_type": f"{owner}/{name}" if name else owner, "dataset_config": config, "dataset_split": split}
    return {field: value for field, value in fields.items() if value}


def _task_entry(facts: Mapping[str, Any]) -> TaskEntry | None:
    """Return the task of a description; None if it has none, or a damaged one."""
    try:
        return from_dict(TaskEntry, facts["task"]["entry"], "task.entry.")
    except (KeyError, LightPeftError):
        return None


def _table(facts: Mapping[str, Any], plan: PrunePlan, license: str | None) -> Iterator[str]:
    base, task = facts["base"], _task_entry(facts)
    revision = f", revision `{base['revision']}`" if base["revision"] else ""
    place = "" if is_hub_name(base["id"]) else ", a folder of its author"
    ranks, dense = sum(map(len, plan.sites.values())), sum(site.rank for site in plan.dense_sites)
    yield "| | |"
    yield "|---|---|"
    yield f"| base | `{_base_name(base)}` (`{base['architecture']}`{revision}{place}) |"
    if task is not None:
        labels = ", ".join(f"`{label}`" for label in list(facts["task"].get("labels", ()))[:20])
        named = f" `{task.name}`" if task.name else ""
        yield f"| task | {task.kind}{named}{f': {labels}' if labels else ''} |"
        places = {"train": "rows of its author", "test": "rows of its author"}
        places |= {part: f"`{name}`" for part, name in _rows(facts).items()}
        yield f"| data | trained on {places['train']}, tested on {places['test']} |"
    parts = f"{plan.removed_ratio:.1%}; {plan.removed_of_blocks:.1%} of the transformer blocks'"
    removed = f"{plan.removed_parameters:,} of {plan.base_parameters:,} parameters ({parts})"
    yield f"| removed | {removed if plan.cuts_blocks else 'nothing of the transformer blocks'} |"
    if facts.get("tokens"):
        tokens = f"{facts['tokens']['kept']:,} of the {facts['tokens']['of']:,} of its base"
        yield f"| tokens | {tokens}; it needs a tokenizer with these, not the base's |"
    yield f"| PEFT | {len(plan.sites)} of {len(plan.dense_sites)} modules, {ranks} of {dense} ranks |"
    said = f"`{license}`" if license else "see its page" if is_hub_name(base["id"]) else "not stated"
    yield f"| license of the base | {said} |"


def _quality_table(facts: Mapping[str, Any]) -> Iterator[str]:
    if not facts["metrics"]:
        yield "No metrics were recorded."
        return
    metrics = dict(facts["metrics"])
    count = metrics.pop("examples", None)
    yield f"| on {'its' if count is None else f'{count:,.0f}'} test rows | value | 95% interval |"
    yield "|---|---|---|"
    for name, value in metrics.items():
        interval = facts.get("intervals", {}).get(name)
        sure = "-" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
        yield f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} | {sure} |"


def _its_base(facts: Mapping[str, Any]) -> Iterator[str]:
    if not is_hub_name(facts["base"]["id"]):
        yield "Its base was in a folder of its author: pass your copy as `base=` in Python or `--base` in the shell."


def _shell(facts: Mapping[str, Any], form: CardForm) -> Iterator[str]:
    """Yield a section with shell commands that predict with the model, and export it."""
    commands = [f'lightpeft predict "{THIS_FOLDER}" rows.csv'] if facts["task"] else []
    commands += [
        f'lightpeft export "{THIS_FOLDER}" out --form merged  # lightpeft export --help: other forms'
    ] * form.exports
    if commands:
        yield "In the shell:\n\n```\n" + "\n".join(commands) + "\n```"


def _base_name(base: Mapping[str, Any]) -> str:
    """Return the name of a base; of a folder, its last part."""
    return base["id"] if is_hub_name(base["id"]) else Path(base["id"]).name or base["model_type"]


def license_of(name: str) -> str | None:
    """Return the license of a model from its local model card; None: no card, or no license in it.

    Args:
        name: folder, or name on the hub; only its cache is read, and nothing is downloaded.
    """
    file: object = Path(name).expanduser() / CARD
    try:
        if not Path(str(file)).is_file():
            file = huggingface_hub.try_to_load_from_cache(name, CARD)
        if not isinstance(file, (str, Path)):
            return None
        data: Any = ModelCard(read_text(file), ignore_metadata_errors=True).data
    except Exception:  # noqa: BLE001 - a missing or damaged card has no license
        return None
    return data.license if isinstance(data.license, str) else None
