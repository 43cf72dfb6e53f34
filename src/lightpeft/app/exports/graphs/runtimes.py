"""The runtimes of graphs, and their exporters in transformers."""

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
    """A runtime that graphs are written for."""

    name: ClassVar[str]
    """Name in `RUNTIMES` and of the export form."""
    title: ClassVar[str]
    """Name of the runtime, as text for users."""
    file: ClassVar[str]
    """File name of the graph."""
    tool: ClassVar[str]
    """Package that runs the file."""
    use: ClassVar[str]
    """Python code that loads the file."""
    writers: ClassVar[Mapping[str, tuple[str, ...]]]
    """Data type of weights -> packages that write it."""

    @abstractmethod
    def settings(self, dtype: str) -> tuple[Any, Any]:
        """Return the exporter of transformers and its configuration."""

    def check(self, dtype: str) -> None:
        """Raise `LightPeftError` unless the packages for `dtype`, one of `writers`, are installed."""
        missing = [name for name in self.writers[dtype] if not _is_installed(name)]
        instead = f'which is not installed; pip install "lightpeft[{self.name}]"'
        require(not missing, f"graphs in {dtype} for {self.title} need {' and '.join(missing)}, {instead}")
        newer = "graph export needs transformers 5.24 or newer; pip install -U transformers"
        require(_is_installed("transformers.exporters"), newer)

    def write(self, model: nn.Module, inputs: dict[str, Any], folder: Path, dtype: str) -> None:
        """Trace a model with example inputs, batch size and length dynamic, and write graph and manifest.

        Raises:
            LightPeftError: the exporter cannot trace the model.
        """
        cannot = f"this model cannot be traced for {self.title}; export it as merged"
        with parsing(cannot), torch.no_grad(), _silence():
            exporter, settings = self.settings(dtype)
            exporter.export(model, inputs, settings).save_pretrained(folder)


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress the progress, warnings and log lines of tracing inside the block.

    Logging is disabled as a whole, since the loggers have no common name.
    """
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
    """ONNX Runtime, with ONNX graphs."""

    name = "onnx"
    title = "ONNX Runtime"
    file = "model.onnx"
    tool = "onnxruntime"
    use = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{file}")'
    writers: ClassVar = {"f32": ("onnx", "onnxscript"), "int8": ("onnx", "onnxscript", "onnxruntime")}

    def settings(self, dtype: str) -> tuple[Any, Any]:
        """Return exporter and configuration; int8 is ONNX Runtime's dynamic quantization, one scale per column."""
        from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

        dynamic = OnnxRuntimeDynamicConfig(per_channel=True)
        quantizer = OnnxRuntimeQuantizer(dynamic) if dtype == "int8" else None
        return OnnxExporter(), OnnxConfig(dynamic=True, quantizer=quantizer)


class OpenVino(Runtime):
    """OpenVINO; keys and values are internal state of the graph."""

    name = "openvino"
    title = "OpenVINO"
    file = "openvino_model.xml"
    tool = "openvino"
    use = f'import openvino\n\nmodel = openvino.Core().compile_model("{file}", "CPU")'
    writers: ClassVar = {"f32": ("openvino",), "f16": ("openvino",), "int8": ("openvino", "nncf")}

    def settings(self, dtype: str) -> tuple[Any, Any]:
        """Return exporter and configuration; int8 weights are NNCF's, one scale per row; f16 is computed in 32 bits."""
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


def _is_installed(package: str) -> bool:
    with suppress(ModuleNotFoundError):
        return importlib.util.find_spec(package) is not None
    return False
