"""The files of a light adapter: write them beside PEFT's own two, and check them before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from lightpeft.errors import require
from lightpeft.files import check_file, explain_content_errors, file_checksum, read_json, write_json
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.peft_kinds.sites.config_file import hide_config
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.saving.cards import CARD, CardForm, loading_code, model_card
from lightpeft.saving.description import BaseFacts, base_facts
from lightpeft.saving.kept_weights import KEPT_WEIGHTS
from lightpeft.saving.peft_adapter import read_adapter
from lightpeft.saving.tokens import VOCABULARY_FILE, read_vocabulary, write_vocabulary

DESCRIPTION = "lightpeft.json"
FILES = ("adapter_config.json", "adapter_model.safetensors", KEPT_WEIGHTS, VOCABULARY_FILE)
"""Files that a light adapter may have besides its description."""


# -- writing -----------------------------------------------------------------------------------------------------------


def write_beside(folder: Path, facts: dict[str, Any], plan: PrunePlan, vocabulary: Vocabulary | None) -> None:
    """Turn a folder that PEFT has written into a light adapter: add description, model card and kept tokens.

    If anything of the base is cut, PEFT's own loader refuses the folder from then on (`sites.hide_config`).

    Args:
        facts: content of `lightpeft.json` without the checksums.
        plan: plan of the light model.
        vocabulary: kept tokens of the base; None: all, and no file of them.
    """
    if vocabulary is not None or plan.removed_parameters or plan.train == "all":
        hide_config(folder)
    if vocabulary is not None:
        write_vocabulary(vocabulary, folder)
    (folder / CARD).write_text(card_of(facts, plan), encoding="utf-8")
    write_json(folder / DESCRIPTION, {**facts, "checksums": _checksums(folder)})


def card_of(facts: dict[str, Any], plan: PrunePlan) -> str:
    """Return the text of a light adapter's model card."""
    plans = "a plan of the heads and neurons to keep" if plan.cuts_blocks else "nothing is removed from the base"
    what = f"An adapter for an unchanged base model: PEFT weights, and {plans}"
    if plan.train == "all":
        what = f"An adapter for an unchanged base model: all trained weights of the pruned blocks, and {plans}"
    own = facts["tokens"] or plan.removed_parameters or plan.train == "all"
    library = "lightpeft" if own else "peft"
    form = CardForm(
        "Light adapter", what, loading_code("load_light"), library=library, relation="adapter", exports=True
    )
    return model_card(facts, plan, form)


def _checksums(folder: Path) -> dict[str, str]:
    return {name: file_checksum(folder / name) for name in FILES if (folder / name).is_file()}


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A light adapter in a folder, read and checked as far as possible without its base."""

    folder: Path
    description: dict[str, Any]
    plan: PrunePlan
    base: BaseFacts
    config: PeftConfig
    vocabulary: Vocabulary | None
    """Kept tokens of the base; None: all."""


def read_saved(folder: Path) -> Saved:
    """Read and check a light adapter in a folder.

    Raises:
        LightPeftError: not a light adapter, a file is missing or altered, a newer schema, or a PEFT configuration that
            lightpeft does not load.
    """
    description = read_description(folder)
    with explain_content_errors(folder / DESCRIPTION):
        plan = PrunePlan.from_dict(description["plan"])
    base = base_facts(description, folder / DESCRIPTION)
    config = read_adapter(folder, explicit=True)
    return Saved(folder, description, plan, base, config, vocabulary_in(folder, description))


def read_description(folder: str | Path) -> dict[str, Any]:
    """Read `lightpeft.json` of a light adapter, and verify the checksums of all its files.

    Raises:
        LightPeftError: not a light adapter, a file is missing or altered, or a newer schema.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"light adapter folder {folder} does not exist; check the path")
    require((folder / DESCRIPTION).is_file(), f"{folder} is not a light adapter: it has no {DESCRIPTION}")
    description = read_json(folder / DESCRIPTION)
    with explain_content_errors(folder / DESCRIPTION):
        expected = dict(description["checksums"])
    base_facts(description, folder / DESCRIPTION)
    others = sorted(expected.keys() - set(FILES))
    instead = "which this version of lightpeft cannot read; install the version that wrote it"
    require(not others, f"{folder} has {', '.join(others)}, {instead}")
    for name, checksum in expected.items():
        check_file(folder, name, checksum)
    return description


def vocabulary_in(folder: Path, description: Mapping[str, Any]) -> Vocabulary | None:
    """Read the kept tokens of a light adapter; None: all.

    Args:
        folder: the adapter's folder.
        description: its `lightpeft.json`, whose checksums were verified.
    """
    return read_vocabulary(folder) if VOCABULARY_FILE in description["checksums"] else None
