"""What a graph is written for, and how transformers' exporters write it."""

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

import torch
from torch import nn

from lightpeft.errors import require
from lightpeft.files.foreign import parsing


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
        with parsing(cannot), torch.no_grad(), _silence():
            exporter, settings = self.settings(dtype)
            exporter.export(model, inputs, settings).save_pretrained(folder)


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


RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (OnnxRuntime(), OpenVino())}
"""Name -> runtime."""


def _is_there(package: str) -> bool:
    with suppress(ModuleNotFoundError):
        return importlib.util.find_spec(package) is not None
    return False
