"""A light adapter over its base: the base checked and cut, and the adapter's weights in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from lightpeft.adapters.right_base import check_base, check_brought, check_structure
from lightpeft.adapters.streaming import Stream
from lightpeft.errors import require
from lightpeft.models.linears.bitsandbytes import prepare_quantised
from lightpeft.models.tensors import SharedTensors
from lightpeft.models.vocabulary.cutting import check_whole, cut_model
from lightpeft.plans.records import PrunePlan
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving.adapter_files import Saved
from lightpeft.saving.kept_weights import check_kept, read_kept
from lightpeft.saving.peft_adapter import check_fit, load_adapter, skeleton_of


def over_base(
    saved: Saved,
    dense: PreTrainedModel,
    lacking: Sequence[str] = (),
    stream: Stream | None = None,
    *,
    is_trainable: bool = False,
    fits: bool = False,
) -> PeftModel:
    """What a dense model becomes, in place: cut to the plan, with the adapter's weights.

    Arguments and errors are as for `load_light`.

    Args:
        lacking: names of weights that the checkpoint of the dense model does not have.
        stream: what the dense model was read into.
        fits: it is known that the tensors of the adapter are those that the model will have.
    """
    folder, plan = saved.folder, saved.plan
    check_base(dense, saved.base, plan, str(folder), stream, saved.vocabulary)
    check_brought(lacking, saved.config, str(folder))
    if saved.vocabulary is not None:
        cut_model(dense, saved.vocabulary)
    prepare_quantised(dense)
    if not fits:
        _check_tensors(dense, plan, saved.config, folder)
    apply_plan(dense, plan)
    if stream is not None:
        stream.fill(dense)
    model = load_adapter(dense, folder, saved.config, is_trainable)
    if plan.train == "all":
        read_kept(model, folder, is_trainable)
    if not is_trainable:
        model.eval()
    return model


def _check_tensors(dense: PreTrainedModel, plan: PrunePlan, config: PeftConfig, folder: Path) -> None:
    """Compare the tensors in the file with those that the model will have, before anything is cut."""
    skeleton = skeleton_of(dense)
    apply_plan(skeleton, plan)
    check_fit(skeleton, config, folder)
    if plan.train == "all":
        check_kept(skeleton, folder)


def stream_of(saved: Saved, device: str | torch.device | None, shared: SharedTensors | None = None) -> Stream:
    """What reads the base one tensor at a time; refuses at once what cannot be read so."""
    folder, base = saved.folder, saved.base
    kind = "quantised" if base.quantisation else "a GGUF file" if base.gguf_file else None
    require(kind is None, f"the base of {folder} is {kind}, which low_memory cannot read: load without low_memory")

    def check(model: PreTrainedModel) -> None:
        check_structure(model, base, saved.plan, str(folder))
        if saved.vocabulary is not None:
            check_whole(model, saved.vocabulary)

    return Stream(saved.plan, check, device, saved.vocabulary, shared)
