"""Sessions: written graphs loaded in their runtimes, on one core of the CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightpeft.app.exports.graphs.runtimes import RUNTIMES

_CACHE = "cache."
"""Prefix of keys and values in the graph's names, after "input." or "output."."""
_TYPES = "token_type_ids"
"""Input that tokenizers omit if all tokens are of type 0."""


class Session(ABC):
    """A loaded graph. For a causal language model it keeps the KV cache of earlier calls."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name; inputs that the graph does not have are ignored."""


def load(form: str, folder: Path, *, exact: bool = True) -> Session:
    """Load an exported graph.

    Args:
        form: "onnx" or "openvino".
        exact: True to compute in 32 bits; by default OpenVINO uses bfloat16 if the CPU supports it.
    """
    file = folder / RUNTIMES[form].file
    return _OpenVinoSession(file, exact) if form == "openvino" else _OnnxSession(file)


class _OnnxSession(Session):
    """An ONNX session; keys and values are inputs and outputs of every call."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._past: dict[str, np.ndarray] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = _with_types(inputs)
        feed = {place.name: self._value(place, given) for place in self._session.get_inputs()}
        found = dict(zip(self._outputs, self._session.run(None, feed), strict=True))
        self._past = {name.replace("output.", "input.", 1): value for name, value in found.items() if _CACHE in name}
        return {name: torch.from_numpy(value) for name, value in found.items() if _CACHE not in name}

    def _value(self, place: Any, inputs: Mapping[str, Tensor]) -> np.ndarray:
        if place.name in inputs:
            return inputs[place.name].numpy()
        if place.name in self._past:
            return self._past[place.name]
        _, heads, _, channels = place.shape  # fixed sizes may be strings
        return np.zeros((len(inputs["input_ids"]), int(heads), 0, int(channels)), dtype=np.float32)


class _OpenVinoSession(Session):
    """An OpenVINO session; keys and values are its internal state."""

    def __init__(self, file: Path, exact: bool) -> None:
        import openvino

        precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if exact else {}
        compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": 1, **precision})
        self._names = [place.get_any_name() for place in compiled.inputs]
        self._request = compiled.create_infer_request()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given, rows = _with_types(inputs), torch.arange(len(inputs["input_ids"]), dtype=torch.int32)
        feed = {name: rows if name == "beam_idx" else given[name] for name in self._names}
        found = self._request.infer({name: value.numpy() for name, value in feed.items()})
        return {place.get_any_name(): torch.from_numpy(value.copy()) for place, value in found.items()}


def _with_types(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_TYPES: torch.zeros_like(inputs["input_ids"]), **inputs}
