"""The files of a light adapter: written beside PEFT's own two, and read and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from lightpeft.errors import require
from lightpeft.files import check_file, explain_content_errors, file_checksum, read_json, write_json
from lightpeft.models import repositories
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.peft_kinds.sites.config_file import hide_config
from lightpeft.plans.records import PrunePlan
from lightpeft.saving.cards import CARD, CardForm, model_card, read_by
from lightpeft.saving.description import BaseFacts, base_facts
from lightpeft.saving.kept_weights import KEPT_WEIGHTS
from lightpeft.saving.peft_adapter import read_adapter
from lightpeft.saving.tokens import VOCABULARY_FILE, read_vocabulary, write_vocabulary

DESCRIPTION = "lightpeft.json"
FILES = ("adapter_config.json", "adapter_model.safetensors", KEPT_WEIGHTS, VOCABULARY_FILE)
"""What is in the folder besides the description, as far as it is there."""
ON_HUB = repositories.RepositoryForm("light adapter", DESCRIPTION, (DESCRIPTION, *FILES))
"""Its files in a repository."""


# -- writing -----------------------------------------------------------------------------------------------------------


def write_beside(folder: Path, facts: dict[str, Any], plan: PrunePlan, vocabulary: Vocabulary | None) -> None:
    """Make what PEFT has written a light adapter: description and card and, where some are gone, its tokens.

    Where anything of the base is cut, PEFT's own loader refuses the folder from then on (`sites.hide_config`).

    Args:
        facts: what `lightpeft.json` says, but for the checksums.
        vocabulary: tokens of its base that the model has; None: all.
    """
    if vocabulary is not None or plan.removed_parameters or plan.train == "all":
        hide_config(folder)
    if vocabulary is not None:
        write_vocabulary(vocabulary, folder)
    (folder / CARD).write_text(card_of(facts, plan), encoding="utf-8")
    write_json(folder / DESCRIPTION, {**facts, "checksums": _checksums(folder)})


def card_of(facts: dict[str, Any], plan: PrunePlan) -> str:
    """The model card of a light adapter."""
    plans = "the plan of which heads and neurons the task needs" if plan.cuts_blocks else "nothing is removed from it"
    what = f"A task over an untouched base: PEFT weights, and {plans}"
    if plan.train == "all":
        what = f"A task over an untouched base: all weights that are left of its blocks, as they trained, and {plans}"
    own = facts["tokens"] or plan.removed_parameters or plan.train == "all"
    library = "lightpeft" if own else "peft"
    form = CardForm("Light adapter", what, read_by("load_light"), library=library, relation="adapter", exports=True)
    return model_card(facts, plan, form)


def _checksums(folder: Path) -> dict[str, str]:
    return {name: file_checksum(folder / name) for name in FILES if (folder / name).is_file()}


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A light adapter in a folder, read and checked as far as that goes without its base."""

    folder: Path
    description: dict[str, Any]
    plan: PrunePlan
    base: BaseFacts
    config: PeftConfig
    vocabulary: Vocabulary | None
    """Tokens of its base that it has; None: all."""


def read_saved(folder: Path) -> Saved:
    """Read and check a light adapter in a folder.

    Raises:
        LightPeftError: as `read_description`, or PEFT's own file is not one that it takes.
    """
    description = read_description(folder)
    with explain_content_errors(folder / DESCRIPTION):
        plan = PrunePlan.from_dict(description["plan"])
    base = base_facts(description, folder / DESCRIPTION)
    config = read_adapter(folder, explicit=True)
    return Saved(folder, description, plan, base, config, vocabulary_in(folder, description))


def read_description(folder: str | Path) -> dict[str, Any]:
    """`lightpeft.json` of a light adapter, after the checksums of all its files have been verified.

    Raises:
        LightPeftError: not a light adapter, a file is missing or altered, or a newer schema.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"light adapter folder {folder} does not exist")
    require((folder / DESCRIPTION).is_file(), f"{folder} is not a light adapter: it has no {DESCRIPTION}")
    description = read_json(folder / DESCRIPTION)
    with explain_content_errors(folder / DESCRIPTION):
        expected = dict(description["checksums"])
    base_facts(description, folder / DESCRIPTION)
    others = sorted(expected.keys() - set(FILES))
    instead = "which this version of lightpeft cannot read; install the one that it was saved with"
    require(not others, f"{folder} has {', '.join(others)}, {instead}")
    for name, checksum in expected.items():
        check_file(folder, name, checksum)
    return description


def vocabulary_in(folder: Path, description: Mapping[str, Any]) -> Vocabulary | None:
    """Which tokens of its base a light adapter has, whose description was read; None: all."""
    return read_vocabulary(folder) if VOCABULARY_FILE in description["checksums"] else None
