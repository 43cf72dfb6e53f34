"""Check that a base is the one that a plan was made for, and that no weights are missing."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftConfig
from transformers import PreTrainedModel

from lightpeft.adapters.streaming import Stream
from lightpeft.errors import require
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.vocabulary.cutting import check_whole, vocabulary_of
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.plans.prune_plan import PrunePlan
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
    """Refuse a base with another structure or fingerprint than the plan's, before it is changed.

    Args:
        dense: the base to check.
        saved: description of the right base.
        plan: plan that was made for the right base.
        what: subject of the error line, such as the adapter's folder.
        stream: stream that the base was read through; None: it is in memory.
        vocabulary: tokens that the plan's base was cut to, which `dense` may not be cut to yet; None: all.

    Raises:
        LightPeftError: it is another base, or one that was cut to other tokens.
    """
    blocks = check_structure(dense, saved, plan, what)
    there = vocabulary_of(dense)
    require(there in (None, vocabulary), f"the base for {what} was cut to other tokens; load the original base again")
    if vocabulary is not None and there is None:
        check_whole(dense, vocabulary)
    found = fingerprint(dense, blocks, vocabulary) if stream is None else stream.fingerprint(dense, blocks)
    require(found == plan.fingerprint, _another_base(what))


def check_structure(dense: PreTrainedModel, saved: BaseFacts, plan: PrunePlan, what: str) -> list[BlockSpec]:
    """Refuse a base of another structure, without looking at its weights.

    Args:
        dense: the base to check; may be on the meta device.
        saved: description of the right base.
        plan: plan that was made for the right base.
        what: subject of the error line, such as the adapter's folder.

    Returns:
        The blocks of the base.

    Raises:
        LightPeftError: another class, model type, or set of projections.
    """
    plain = isinstance(dense, PreTrainedModel)
    require(plain, f"base is a {type(dense).__name__}; pass the dense transformers model, without PEFT")
    require(saved.model_type == dense.config.model_type, _another_base(what))
    ensure_family(dense)
    blocks = block_specs(dense)
    same = [block.projections for block in blocks] == [spec.projections for spec in plan.specs]
    require(same, _another_base(what))
    return blocks


def _another_base(what: str) -> str:
    return (
        f"{what} belongs to another base: its fingerprint does not match the weights of this one; "
        "pass the original base: the same revision and tokens and, if it was quantized, the same bits"
    )


def check_missing_weights(lacking: Sequence[str], config: PeftConfig, what: str) -> None:
    """Refuse a base that lacks weights which the adapter does not contain either: they would be random.

    Args:
        lacking: names of weights that the base's checkpoint lacks.
        config: configuration of the adapter, whose `modules_to_save` it contains.
        what: subject of the error line, such as the adapter's folder.
    """
    brought = tuple(f".{name}." for name in getattr(config, "modules_to_save", None) or ())
    random = [name for name in lacking if not any(module in f".{name}." for module in brought)]
    require(
        not random,
        f"the base of {what} has no weights for {', '.join(random[:3])}, and the adapter has none either, so outputs "
        "would be random; pass the base that it was trained on",
    )
