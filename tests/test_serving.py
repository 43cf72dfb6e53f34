"""examples/serve_onnx.py sorts and batches what is posted; its answers are those of single texts, in their order."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, BertConfig
from workbench import BAD, GOOD, NEUTRAL, SIZES, save_base

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]


def write_graph(folder: Path, table: np.ndarray) -> None:
    """A graph whose logits are the sum of what a table has of each token."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["of_tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["of_tokens", "column"], ["read"]),
        helper.make_node("ReduceSum", ["read", "places"], ["logits"], keepdims=0),
    ]
    names = ("input_ids", "attention_mask")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "tokens"]) for name in names]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 2])]
    constants = {"table": table, "last": np.array([-1]), "places": np.array([1])}
    initial = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "classifier", inputs, outputs, initial)
    versions = {"opset_imports": [helper.make_opsetid("", 18)], "ir_version": 9}
    onnx.save(helper.make_model(graph, **versions), folder / "model.onnx")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where the example answers."""
    folder = save_base(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = {0: "negative", 1: "positive"}
    BertConfig(vocab_size=len(tokenizer), id2label=labels, **SIZES).save_pretrained(folder)
    table = np.zeros((len(tokenizer), 2), np.float32)
    table[tokenizer.convert_tokens_to_ids(list(BAD)), 0] = 1
    table[tokenizer.convert_tokens_to_ids(list(GOOD)), 1] = 1
    write_graph(folder, table)
    command = [sys.executable, ROOT / "examples/serve_onnx.py", folder, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found
        yield found[0]
        server.terminate()


def test_many_texts_are_answered_in_their_order(address: str) -> None:
    texts = [" ".join([*NEUTRAL[: 1 + 7 * n % 19], *(GOOD if n % 3 else BAD)[: 1 + n % 4]]) for n in range(75)]
    request = urllib.request.Request(address, "\n".join(texts).encode())
    with urllib.request.urlopen(request) as answer:
        answers = [json.loads(line) for line in answer.read().splitlines()]
    expected = [(1 / (1 + np.exp(-(1.0 + n % 4))), "positive" if n % 3 else "negative") for n in range(75)]
    assert [each["label"] for each in answers] == [label for _, label in expected]
    assert [each["p"] for each in answers] == pytest.approx([p for p, _ in expected], abs=1e-3)
