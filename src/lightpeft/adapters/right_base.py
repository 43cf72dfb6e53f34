"""Whether a base is the one that a plan was made for, and has all that its adapter does not bring."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftConfig
from transformers import PreTrainedModel

from lightpeft.adapters.streaming import Stream
from lightpeft.errors import require
from lightpeft.models.families.registry import block_specs
from lightpeft.models.vocabulary.cutting import check_whole, vocabulary_of
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.plans.records import PrunePlan
from lightpeft.plans.structure import BlockSpec
from lightpeft.prune.discovery import ensure_family
from lightpeft.prune.fingerprint import fingerprint
from lightpeft.saving.description import BaseFacts


def check_base(
    dense: PreTrainedModel,
    saved: BaseFacts,
    plan: PrunePlan,
    what: str,
    stream: Stream | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Refuse a base other than the one that a plan was made for, before anything is done to it.

    Args:
        what: belongs to the base, for the error line.
        vocabulary: the tokens that the plan's base has alone, of which the one given may still have others; None: all.
    """
    blocks = check_structure(dense, saved, plan, what)
    there = vocabulary_of(dense)
    require(there in (None, vocabulary), f"the base given for {what} has lost other tokens before; give it as it was")
    if vocabulary is not None and there is None:
        check_whole(dense, vocabulary)
    found = fingerprint(dense, blocks, vocabulary) if stream is None else stream.fingerprint(dense, blocks)
    require(found == plan.fingerprint, _another_base(what))


def check_structure(dense: PreTrainedModel, saved: BaseFacts, plan: PrunePlan, what: str) -> list[BlockSpec]:
    """Refuse a base of another structure, whatever its weights."""
    plain = isinstance(dense, PreTrainedModel)
    require(plain, f"base is a {type(dense).__name__}; give the dense transformers model, without PEFT around it")
    require(len({saved.model_type, dense.config.model_type}) == 1, _another_base(what))
    ensure_family(dense)
    blocks = block_specs(dense)
    same = [block.projections for block in blocks] == [spec.projections for spec in plan.specs]
    require(same, _another_base(what))
    return blocks


def _another_base(what: str) -> str:
    return (
        f"{what} belongs to another base: the weights given are not the ones it was made for; "
        "pass the original base, in the same revision and, if it was quantised, in the same bits"
    )


def check_brought(lacking: Sequence[str], config: PeftConfig, what: str) -> None:
    """Refuse a base that lacks weights which the adapter does not bring: they would be random."""
    brought = tuple(f".{name}." for name in getattr(config, "modules_to_save", None) or ())
    random = [name for name in lacking if not any(module in f".{name}." for module in brought)]
    require(
        not random,
        f"the base of {what} has no weights for {', '.join(random[:3])}, and the adapter brings none, so that its "
        "answers would be random; give the base that it was trained on",
    )
