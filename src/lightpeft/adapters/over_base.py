"""Put a light adapter on its base: check and cut the base, and load the adapter's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from lightpeft.adapters.right_base import check_base, check_missing_weights, check_structure
from lightpeft.adapters.streaming import Stream
from lightpeft.errors import require
from lightpeft.models.linears.bitsandbytes import prepare_quantized
from lightpeft.models.tensors import SharedTensors
from lightpeft.models.vocabulary.cutting import check_whole, cut_model
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving.adapter_files import Saved
from lightpeft.saving.kept_weights import check_kept, read_kept
from lightpeft.saving.peft_adapter import check_adapter_fit, load_adapter, skeleton_of


def over_base(
    saved: Saved,
    dense: PreTrainedModel,
    lacking: Sequence[str] = (),
    stream: Stream | None = None,
    *,
    is_trainable: bool = False,
    fits: bool = False,
) -> PeftModel:
    """Cut a dense model in place to an adapter's plan, and load the adapter's weights.

    Args:
        saved: the light adapter.
        dense: its base, which is cut in place.
        lacking: names of weights that the dense model's checkpoint lacks.
        stream: stream that the dense model was read through; None: it is in memory.
        is_trainable: True: adapter weights stay trainable; False: they are frozen, and the model is in eval mode.
        fits: True if the adapter's tensors are known to fit, and are not checked again.

    Raises:
        LightPeftError: the base is another one, or lacks weights, or the adapter's tensors do not fit.
    """
    folder, plan = saved.folder, saved.plan
    check_base(dense, saved.base, plan, str(folder), stream, saved.vocabulary)
    check_missing_weights(lacking, saved.config, str(folder))
    if saved.vocabulary is not None:
        cut_model(dense, saved.vocabulary)
    prepare_quantized(dense)
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
    """Check the tensors in an adapter's file against the cut model's on the meta device, before anything is cut."""
    skeleton = skeleton_of(dense)
    apply_plan(skeleton, plan)
    check_adapter_fit(skeleton, config, folder)
    if plan.train == "all":
        check_kept(skeleton, folder)


def stream_of(saved: Saved, device: str | torch.device | None, shared: SharedTensors | None = None) -> Stream:
    """Make the stream that reads an adapter's base tensor by tensor.

    Args:
        device: device of kept weights; None: host memory.
        shared: tensors that the model shares with others; None: none.

    Raises:
        LightPeftError: the base is quantized, or a GGUF file.
    """
    folder, base = saved.folder, saved.base
    kind = "quantized" if base.quantization else "a GGUF file" if base.gguf_file else None
    require(kind is None, f"the base of {folder} is {kind}, which low_memory cannot read; load without low_memory")

    def check(model: PreTrainedModel) -> None:
        check_structure(model, base, saved.plan, str(folder))
        if saved.vocabulary is not None:
            check_whole(model, saved.vocabulary)

    return Stream(saved.plan, check, device, saved.vocabulary, shared)
