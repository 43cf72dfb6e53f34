"""The card of a folder: what it holds, what was cut, how good it is, how it is loaded; for people and the hub."""

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
from lightpeft.plans.records import PrunePlan

CARD = "README.md"
THIS_FOLDER = "this folder"
"""What a card calls the folder that it lies in; in a repository, its name."""
_COUNTS = ("loss", "examples")
"""What is measured and says nothing about quality to somebody who does not know the rows."""


@dataclass(frozen=True)
class CardForm:
    """What the card says of the form in which a model lies in its folder."""

    title: str
    what: str
    code: str
    """That loads it; the folder is called `THIS_FOLDER` in it."""
    language: str = "python"
    """Of the code."""
    library: str = "lightpeft"
    """That the hub is to say reads it."""
    relation: Literal["adapter", "finetune"] = "finetune"
    """To its base, in the hub's words (which has none for what was pruned)."""
    exports: bool = False
    """Whether `lightpeft export` makes other forms of it."""


def of_whole(plan: PrunePlan, code: str, form: str = "", **options: Any) -> CardForm:
    """What the card of a whole model says.

    Args:
        form: " as ..." something else than transformers' files.
        options: of `CardForm`.
    """
    if not plan.cuts_blocks:
        what = "A whole model, PEFT merged into it; nothing of its blocks was removed"
        return CardForm(f"Light model{form}", what, code, **options)
    what = "A whole model without the attention heads and FFN neurons that its task does not need, PEFT merged into it"
    return CardForm(f"Pruned model{form}", what, code, **options)


def read_by(loader: str) -> str:
    """Code by which a function of lightpeft reads the folder."""
    return f'from lightpeft import {loader}\n\nmodel = {loader}("{THIS_FOLDER}")'


def read_by_transformers(architecture: str) -> str:
    """Code by which transformers reads it."""
    return f'from transformers import {architecture}\n\nmodel = {architecture}.from_pretrained("{THIS_FOLDER}")'


def model_card(facts: Mapping[str, Any], plan: PrunePlan, form: CardForm) -> str:
    """The text of README.md beside saved weights.

    Args:
        facts: what is said of the model (`description.facts_of`).
    """
    licence = licence_of(facts["base"]["id"])
    parts = [
        f"# {form.title}",
        f"{form.what} (Light-PEFT, Gu et al., Findings of ACL 2024).",
        "\n".join(_table(facts, plan, licence)),
        "## How to load it",
        f"```{form.language}\n{form.code}\n```",
        *(_its_base(facts) if form.relation == "adapter" else ()),
        *(_shell(facts, form) if form.language == "python" else ()),
        "## What is left of the base",
        f"```\n{plan}\n```",
        "## Quality",
        "\n".join(_quality(facts)),
    ]
    data = _metadata(facts, plan, form, licence)
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(facts: Mapping[str, Any], plan: PrunePlan, form: CardForm, licence: str | None) -> ModelCardData:
    base, task, results = facts["base"], pipeline_tag(facts["base"]["architecture"]), list(_results(facts))
    known: dict[str, Any] = {"license": licence} if licence else {}
    if is_hub_name(base["id"]):  # a folder is of no use to a reader elsewhere, and not a valid id
        known |= {"base_model": base["id"], "base_model_relation": form.relation}
    if results:
        known |= {"model_name": f"{_name(base).rpartition('/')[2]}-light", "eval_results": results}
    kind = facts["peft_type"].lower() if facts.get("peft_type") else None
    tags = [tag for tag in ("lightpeft", "light-peft", plan.cuts_blocks and "pruning", "peft", kind) if tag]
    return ModelCardData(library_name=form.library, pipeline_tag=task, tags=tags, **known)


def pipeline_tag(architecture: str) -> str | None:
    """The hub's name of what a class of transformers answers; None: it has none."""
    return next((task for task, names in hub_tasks().items() if architecture in _classes(names)), None)


def _classes(names: Mapping[str, Any]) -> Iterator[str]:
    for name in names.values():
        yield from (name,) if isinstance(name, str) else name


def _results(facts: Mapping[str, Any]) -> Iterator[EvalResult]:
    """What was measured, for the hub; nothing where it does not know such a task."""
    task, entry = pipeline_tag(facts["base"]["architecture"]), _entry(facts) or TaskEntry()
    rows: dict[str, Any] = {"dataset_type": "custom", "dataset_name": entry.name or "rows of its author"}
    if entry.hub and not entry.path:
        owner, name, *config = entry.hub.split("/")
        rows |= {"dataset_type": f"{owner}/{name}", "dataset_split": entry.test}
        rows |= {"dataset_config": config[0]} if config else {}
    for metric, value in facts["metrics"].items():
        if task is not None and metric not in _COUNTS and isinstance(value, (int, float)):
            yield EvalResult(task_type=task, metric_type=metric, metric_value=value, **rows)


def _entry(facts: Mapping[str, Any]) -> TaskEntry | None:
    """The task; None where nobody says one."""
    try:
        return from_dict(TaskEntry, facts["task"]["entry"], "task.entry.")
    except (KeyError, LightPeftError):
        return None


def _table(facts: Mapping[str, Any], plan: PrunePlan, licence: str | None) -> Iterator[str]:
    base, task = facts["base"], _entry(facts)
    revision = f", revision `{base['revision']}`" if base["revision"] else ""
    place = "" if is_hub_name(base["id"]) else ", a folder of its author"
    ranks, dense = sum(map(len, plan.sites.values())), sum(site.rank for site in plan.dense_sites)
    yield "| | |"
    yield "|---|---|"
    yield f"| base | `{_name(base)}` (`{base['architecture']}`{revision}{place}) |"
    if task is not None:
        labels = ", ".join(f"`{label}`" for label in list(facts["task"].get("labels", ()))[:20])
        named = f" `{task.name}`" if task.name else ""
        yield f"| task | {task.kind}{named}{f': {labels}' if labels else ''} |"
    parts = f"{plan.removed_ratio:.1%}; {plan.removed_of_blocks:.1%} of the transformer blocks'"
    removed = f"{plan.removed_parameters:,} of {plan.base_parameters:,} parameters ({parts})"
    yield f"| removed | {removed if plan.cuts_blocks else 'nothing of the transformer blocks'} |"
    if facts.get("tokens"):
        tokens = f"{facts['tokens']['kept']:,} of the {facts['tokens']['of']:,} of its base"
        yield f"| tokens | {tokens}; it is asked with a tokenizer of these, not with the base's |"
    yield f"| PEFT | {len(plan.sites)} of {len(plan.dense_sites)} modules, {ranks} of {dense} ranks |"
    said = f"`{licence}`" if licence else "see its page" if is_hub_name(base["id"]) else "not stated"
    yield f"| licence of the base | {said} |"


def _quality(facts: Mapping[str, Any]) -> Iterator[str]:
    if not facts["metrics"]:
        yield "Nothing was recorded."
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
        yield "Its base was in a folder of its author: give yours, `base=` in Python and `--base` in the shell."


def _shell(facts: Mapping[str, Any], form: CardForm) -> Iterator[str]:
    """Commands that answer with it, and give it other forms."""
    commands = [f'lightpeft predict "{THIS_FOLDER}" rows.csv'] if facts["task"] else []
    commands += [
        f'lightpeft export "{THIS_FOLDER}" out --form merged  # lightpeft export --help: other forms'
    ] * form.exports
    if commands:
        yield "In the shell:\n\n```\n" + "\n".join(commands) + "\n```"


def _name(base: Mapping[str, Any]) -> str:
    """Of the base; of a folder its last part alone."""
    return base["id"] if is_hub_name(base["id"]) else Path(base["id"]).name or base["model_type"]


def licence_of(name: str) -> str | None:
    """The licence of a model, as its card names it; None: it has no card here, or says none.

    Args:
        name: folder, or name on the hub, which is not asked: what is in its cache counts.
    """
    file: object = Path(name).expanduser() / CARD
    try:
        if not Path(str(file)).is_file():
            file = huggingface_hub.try_to_load_from_cache(name, CARD)
        if not isinstance(file, (str, Path)):
            return None
        data: Any = ModelCard(read_text(file), ignore_metadata_errors=True).data
    except Exception:  # noqa: BLE001 - a card that is missing or damaged says nothing
        return None
    return data.license if isinstance(data.license, str) else None
