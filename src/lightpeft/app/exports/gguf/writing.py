"""Write a pruned model without PEFT modules as a GGUF file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.app.exports.gguf.architectures import choose_architecture, metadata, tensors
from lightpeft.app.exports.gguf.vocabulary import add_vocabulary
from lightpeft.errors import LightPeftError, require
from lightpeft.plans.prune_plan import PrunePlan

GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
"""Data type of matrices; auto: unchanged."""
_TYPE_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_BLOCK_SIZES = {"q8_0": 32}
"""Values per scale; the rows of a matrix must be a multiple of them."""


def write_gguf(
    model: PreTrainedModel,
    plan: PrunePlan,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    dtype: GgufType = "auto",
) -> dict[str, int]:
    """Write one file with weights, tokenizer and chat template.

    Args:
        model: the model, pruned by `plan`, without PEFT modules.
        plan: the plan it was pruned by.
        tokenizer: the model's tokenizer.
        file: path of the new file, in a temporary folder.
        dtype: data type of matrices; norms and biases are always f32. With `q8_0`, matrices whose rows are no multiple
            of 32 are written in `f16`.

    Returns:
        GGUF data type -> number of matrices written in it.

    Raises:
        LightPeftError: `gguf` is not installed, `dtype` is unknown, or llama.cpp does not support this model or its
            tokenizer.
    """
    known = get_args(GgufType)
    require(dtype in known, f'dtype "{dtype}" is not supported by GGUF files; choose one of {", ".join(known)}')
    gguf = _import_gguf()
    architecture = choose_architecture(model, plan)
    wanted = _TYPE_OF_DTYPE.get(model.dtype, "f32") if dtype == "auto" else dtype
    writer = gguf.GGUFWriter(file, architecture.name)
    for name, value in metadata(model, plan, architecture):
        getattr(writer, f"add_{name}")(gguf.RopeScalingType(value) if name == "rope_scaling_type" else value)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if wanted == "f32" else f"MOSTLY_{wanted.upper()}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with TemporaryDirectory() as folder:
        add_vocabulary(writer, tokenizer, model.config.vocab_size, Path(folder))
    places = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.name.upper()), len(plan.blocks))
    written: Counter[str] = Counter()
    for name, tensor in tensors(model, plan, architecture):
        kind = _tensor_type(tensor, wanted)
        place = places.get_name(name, (".weight", ".bias")) or name
        writer.add_tensor(place, _pack(gguf, tensor, kind), raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
        written[kind] += tensor.dim() > 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(+written)


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise LightPeftError(
            'GGUF export needs the package gguf, which is not installed; pip install "lightpeft[gguf]"'
        ) from error
    return gguf


def _tensor_type(tensor: Tensor, wanted: str) -> str:
    """Return the GGUF data type for a tensor."""
    if tensor.dim() == 1:
        return "f32"
    return wanted if tensor.shape[-1] % _BLOCK_SIZES.get(wanted, 1) == 0 else "f16"


def _pack(gguf: Any, tensor: Tensor, kind: str) -> np.ndarray:
    values = tensor.detach().cpu().float().numpy()
    if kind in ("f32", "f16"):
        return values.astype(np.float32 if kind == "f32" else np.float16)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
