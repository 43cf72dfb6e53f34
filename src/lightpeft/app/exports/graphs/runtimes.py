"""What a graph is written for: how transformers' exporters write it, and how the written file is asked."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lightpeft.errors import LightPeftError, one_line, require

_CACHE = "cache."
"""What names of keys and values begin with, behind "input." where they come in and "output." where they go out."""


class Session(ABC):
    """A written file, loaded. Of a model that writes it remembers the tokens of earlier calls."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it gives, by name; inputs that it does not know are left out. Errors are the runtime's own."""


class Runtime(ABC):
    """One runtime."""

    name: ClassVar[str]
    """In the exporters' words."""
    title: ClassVar[str]
    """What runs the file, for people."""
    file: ClassVar[str]
    """Of the graph."""
    tool: ClassVar[str]
    """Package that runs the file."""
    use: ClassVar[str]
    """How, as code."""
    writers: ClassVar[Mapping[str, tuple[str, ...]]]
    """Data type of weights -> packages that write it."""

    @abstractmethod
    def settings(self, dtype: str) -> tuple[Any, Any]:
        """Exporter of transformers, and its configuration."""

    @abstractmethod
    def open(self, folder: Path, *, exact: bool = True) -> Session:
        """Load what was written, on one core of the CPU. Errors are the runtime's own.

        Args:
            exact: compute in 32 bits, whatever the runtime would rather do on this CPU.
        """

    @property
    def is_there(self) -> bool:
        """Whether the file can be run here."""
        return _is_there(self.tool)

    def check(self, dtype: str) -> None:
        """Raise `LightPeftError` unless weights can be written so, here."""
        known = ", ".join(self.writers)
        require(dtype in self.writers, f'"{dtype}" is no data type of graphs for {self.title}; choose one of {known}')
        missing = [name for name in self.writers[dtype] if not _is_there(name)]
        instead = f'which is not installed; pip install "lightpeft[{self.name}]"'
        require(not missing, f"graphs in {dtype} for {self.title} need {' and '.join(missing)}, {instead}")
        newer = "graphs are written by transformers' exporters, which came with 5.24; pip install -U transformers"
        require(_is_there("transformers.exporters"), newer)

    def write(self, model: nn.Module, inputs: dict[str, Any], folder: Path, dtype: str) -> None:
        """Trace a model with some inputs, all sizes dynamic but those of its layers, and write graph and manifest.

        Raises:
            LightPeftError: the exporters cannot trace it.
        """
        cannot = f"this model cannot be traced for {self.title}; export it as merged"
        with foreign(cannot), torch.no_grad(), _silence():
            exporter, settings = self.settings(dtype)
            exporter.export(model, inputs, settings).save_pretrained(folder)


@contextmanager
def foreign(failure: str) -> Iterator[None]:
    """Whatever libraries raise inside, which have no common class for it, is one line that begins so."""
    try:
        yield
    except Exception as error:
        raise LightPeftError(f"{failure}: {one_line(error, 200)}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Keep off the screen what tracing prints of its progress, and warns and logs of operators that no model here has;
    the loggers go by no common name."""
    manager = logging.getLogger().manager
    before = manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class OnnxRuntime(Runtime):
    """ONNX graphs, which ONNX Runtime runs."""

    name = "onnx"
    title = "ONNX Runtime"
    file = "model.onnx"
    tool = "onnxruntime"
    use = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{file}")'
    writers: ClassVar = {"f32": ("onnx", "onnxscript"), "int8": ("onnx", "onnxscript", "onnxruntime")}

    def settings(self, dtype: str) -> tuple[Any, Any]:
        """int8: matrices by ONNX Runtime's dynamic quantisation, one scale a column."""
        from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

        dynamic = OnnxRuntimeDynamicConfig(per_channel=True)
        quantizer = OnnxRuntimeQuantizer(dynamic) if dtype == "int8" else None
        return OnnxExporter(), OnnxConfig(dynamic=True, quantizer=quantizer)

    def open(self, folder: Path, *, exact: bool = True) -> Session:
        """In 32 bits always."""
        return _OnnxSession(folder / self.file)


class _OnnxSession(Session):
    """Keys and values go in and out of every call."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._past: dict[str, np.ndarray] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = len(inputs["input_ids"])
        feed = {place.name: self._value(place, inputs, rows) for place in self._session.get_inputs()}
        found = dict(zip(self._outputs, self._session.run(None, feed), strict=True))
        self._past = {name.replace("output.", "input.", 1): value for name, value in found.items() if _CACHE in name}
        return {name: torch.from_numpy(value) for name, value in found.items() if _CACHE not in name}

    def _value(self, place: Any, inputs: Mapping[str, Tensor], rows: int) -> np.ndarray:
        if place.name in inputs:
            return inputs[place.name].numpy()
        if place.name in self._past:
            return self._past[place.name]
        _, heads, _, channels = place.shape  # the fixed ones may be text
        return np.zeros((rows, int(heads), 0, int(channels)), dtype=np.float32)


class OpenVino(Runtime):
    """OpenVINO's graphs; keys and values are state inside."""

    name = "openvino"
    title = "OpenVINO"
    file = "openvino_model.xml"
    tool = "openvino"
    use = f'import openvino\n\nmodel = openvino.Core().compile_model("{file}", "CPU")'
    writers: ClassVar = {"f32": ("openvino",), "f16": ("openvino",), "int8": ("openvino", "nncf")}

    def settings(self, dtype: str) -> tuple[Any, Any]:
        """int8: weights by NNCF, one scale a row; f16: halves the file, and is computed with in 32 bits."""
        from transformers.exporters import (
            NNCFOpenVINOQuantizer,
            NNCFWeightCompressionConfig,
            OpenVINOConfig,
            OpenVINOExporter,
        )

        quantizer = NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig()) if dtype == "int8" else None
        return OpenVINOExporter(), OpenVINOConfig(dynamic=True, quantizer=quantizer, compress_to_fp16=dtype == "f16")

    def open(self, folder: Path, *, exact: bool = True) -> Session:
        """Left alone, OpenVINO computes in bfloat16 where the CPU can, whatever the graph says."""
        return _OpenVinoSession(folder / self.file, exact)


class _OpenVinoSession(Session):
    def __init__(self, file: Path, exact: bool) -> None:
        import openvino

        precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if exact else {}
        compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": 1, **precision})
        self._names = [place.get_any_name() for place in compiled.inputs]
        self._request = compiled.create_infer_request()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = torch.arange(len(inputs["input_ids"]), dtype=torch.int32)
        feed = {name: rows if name == "beam_idx" else inputs[name] for name in self._names}
        found = self._request.infer({name: value.numpy() for name, value in feed.items()})
        return {place.get_any_name(): torch.from_numpy(value.copy()) for place, value in found.items()}


RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (OnnxRuntime(), OpenVino())}
"""Name -> runtime."""


def _is_there(package: str) -> bool:
    with suppress(ModuleNotFoundError):
        return importlib.util.find_spec(package) is not None
    return False
