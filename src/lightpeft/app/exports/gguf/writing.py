"""From a pruned model without PEFT to a GGUF file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.app.exports.gguf.architectures import choose, facts, tensors
from lightpeft.app.exports.gguf.vocabulary import add_vocabulary
from lightpeft.errors import LightPeftError, require
from lightpeft.plans.records import PrunePlan

GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
"""What matrices are written as; auto: as they are."""
_OF_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_BLOCK = {"q8_0": 32}
"""Values that have a scale in common, and so what rows have to be a multiple of."""


def write_gguf(
    model: PreTrainedModel,
    plan: PrunePlan,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    dtype: GgufType = "auto",
) -> dict[str, int]:
    """Write one file with weights, tokenizer and chat template.

    Args:
        model: pruned by `plan`, without PEFT modules.
        file: into a folder that is not there yet for others.
        dtype: of matrices; norms and biases are always in 32 bits. Rows that are no multiple of 32 have no `q8_0`, and
            are written as `f16`.

    Returns:
        How many matrices were written as what.

    Raises:
        LightPeftError: `gguf` is not installed, there is no such `dtype`, or llama.cpp cannot hold this model or its
            tokenizer.
    """
    known = get_args(GgufType)
    require(dtype in known, f'"{dtype}" is no data type of GGUF files; choose one of {", ".join(known)}')
    gguf = _library()
    architecture = choose(model, plan)
    wanted = _OF_DTYPES.get(model.dtype, "f32") if dtype == "auto" else dtype
    writer = gguf.GGUFWriter(file, architecture.name)
    for name, value in facts(model, plan, architecture):
        getattr(writer, f"add_{name}")(gguf.RopeScalingType(value) if name == "rope_scaling_type" else value)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if wanted == "f32" else f"MOSTLY_{wanted.upper()}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with TemporaryDirectory() as folder:
        add_vocabulary(writer, tokenizer, model.config.vocab_size, Path(folder))
    places = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.name.upper()), len(plan.blocks))
    written: Counter[str] = Counter()
    for name, tensor in tensors(model, plan, architecture):
        kind = _kind(tensor, wanted)
        place = places.get_name(name, (".weight", ".bias")) or name
        writer.add_tensor(place, _packed(gguf, tensor, kind), raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
        written[kind] += tensor.dim() > 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(+written)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise LightPeftError(
            'a GGUF file is written by gguf, which is not installed; pip install "lightpeft[gguf]"'
        ) from error
    return gguf


def _kind(tensor: Tensor, wanted: str) -> str:
    """What a tensor is written as."""
    if tensor.dim() == 1:
        return "f32"
    return wanted if tensor.shape[-1] % _BLOCK.get(wanted, 1) == 0 else "f16"


def _packed(gguf: Any, tensor: Tensor, kind: str) -> np.ndarray:
    values = tensor.detach().cpu().float().numpy()
    if kind in ("f32", "f16"):
        return values.astype(np.float32 if kind == "f32" else np.float16)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
