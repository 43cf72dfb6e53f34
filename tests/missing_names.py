"""Private names of libraries that lightpeft uses, found in its source, and what it does in a process without some.

A name of a library is private
- if it, or a part of the path of its module, begins with an underscore, or
- if it is imported from a module of transformers, PEFT, accelerate, datasets or the hub's client other than the package
  itself and those modules that have a page of reference in the library's documentation (`DOCUMENTED`).

A method of a library's class that lightpeft extends, and calls by `super()`, counts like an attribute.

    python missing_names.py FOLDER NAME...

runs the main path (`main_path`) in a process in which the libraries have other names for these. Their modules stay as
they are, since they use the names themselves: what changes is the source of lightpeft as Python reads it.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "src" / "lightpeft"
LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "peft", "torch", "transformers")
OTHERS = ("argparse.py", "bitsandbytes.py", "llama_cpp.py")
"""Of `compat`, modules about other libraries, which are imported where they are installed."""
DOCUMENTED = frozenset(
    {
        "accelerate.utils",
        "datasets.exceptions",
        "huggingface_hub.errors",
        "peft.utils",
        "transformers.exporters",
        "transformers.utils",
    }
)
SUFFIX = "_of_another_release"


def is_private(name: str) -> bool:
    """Whether a name begins with an underscore, and is none of Python's own."""
    return name.startswith("_") and not name.endswith("__") and name != "_"


def private_names() -> list[str]:
    """All that the source uses: `module:name` of an import, `.name` of an attribute."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    own = {name for path, tree in trees.items() if path.parent.name != "compat" for name in _own(tree)}
    found: set[str] = set()
    for path, tree in trees.items():
        if path.parent.name != "compat":
            found |= {name for name in _used(tree) if name[1:] not in own}
        elif path.name not in OTHERS:
            inside = set(_own(tree))
            found |= {name for name in (*_used(tree), *_told(tree)) if name[1:] not in inside}
    extended = {name.replace("super ", "") for name in found - _of_mixins(trees) if name.startswith(".super ")}
    return sorted(extended | {name for name in found if not name.startswith(".super ")})


def _of_mixins(trees: dict[Path, ast.Module]) -> set[str]:
    """Methods called by `super()` that are lightpeft's own: something defines them and calls nobody."""
    ends = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and is_private(node.name) and ast.unparse(node.body[-1]) != "...":
                calls = {each.attr for each in ast.walk(node) if _is_super(each)}
                ends |= {node.name} - calls
    return {f".super {name}" for name in ends}


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"


def _own(tree: ast.AST) -> Iterator[str]:
    """Names that the source gives to things of its own."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _used(tree: ast.AST) -> Iterator[str]:
    """Private names that the source reaches for."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in LIBRARIES:
            for alias in node.names:
                if _is_private_import(str(node.module), alias.name):
                    yield f"{node.module}:{alias.name}"
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield f".super {node.attr}" if _is_super(node) else f".{node.attr}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr[:1].isupper():
            module = modules.get(node.value.id, "")
            if module.rpartition(".")[2].islower() and _is_private_import(module, node.attr):
                yield f"{module}:{node.attr}"


def _told(tree: ast.AST) -> Iterator[str]:
    """Attributes that the source names in texts."""
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and is_private(text) and text.isidentifier():
            yield f".{text}"


def _is_private_import(module: str, name: str) -> bool:
    if is_private(name) or any(is_private(part) for part in module.split(".")):
        return True
    return "." in module and module not in DOCUMENTED and not module.startswith("torch.")


# -- a process without some of them ------------------------------------------------------------------------------------


class _Renames(ast.NodeTransformer):
    """The source, with other names for what is missing."""

    def __init__(self, names: Collection[str]) -> None:
        self.attributes = {name[1:] for name in names if name.startswith(".")}
        self.imports = {tuple(name.split(":")) for name in names if not name.startswith(".")}
        self.modules: dict[str, str] = {}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        for alias in node.names:
            self.modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            if (node.module, alias.name) in self.imports:
                alias.asname, alias.name = alias.asname or alias.name, alias.name + SUFFIX
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        of_module = self.modules.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if node.attr in self.attributes or (of_module, node.attr) in self.imports:
            node.attr += SUFFIX
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        if node.name in self.attributes:
            node.name += SUFFIX
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.attributes:
            node.id += SUFFIX
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value in self.attributes:
            node.value += SUFFIX
        return node


class _Reader(importlib.machinery.SourceFileLoader):
    names: Collection[str] = ()

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        tree = _Renames(self.names).visit(ast.parse(Path(path).read_text(encoding="utf-8"), path))
        return compile(ast.fix_missing_locations(tree), path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.partition(".")[0] != SOURCE.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, [str(SOURCE.parent)] if path is None else path)
        if spec is not None and spec.origin is not None:
            spec.loader = _Reader(fullname, spec.origin)
        return spec


def remove(names: Collection[str]) -> None:
    """From here on, lightpeft, which is not imported yet, finds none of these names in the libraries."""
    assert not any(name.partition(".")[0] == SOURCE.name for name in sys.modules)
    _Reader.names = names
    sys.meta_path.insert(0, _Finder())


def base_models(folder: Path) -> dict[str, Any]:
    """A dense BERT that classifies and a dense Llama that writes, tiny and random, in folders."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "pad_token_id": 0}
    models = {
        "bert": BertForSequenceClassification(BertConfig(**sizes, num_labels=2)),
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return models


def trainer_of(name: str, model: Any, folder: Path, **settings: Any) -> Any:
    """A `LightTrainer` of one of the models, with LoRA, that cuts after three of eight steps."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainingArguments

    import lightpeft

    torch.manual_seed(0)
    ids = torch.randint(3, 40, (16, 6)).tolist()
    rows = {"input_ids": ids, "labels": ids if name == "llama" else [row[0] % 2 for row in ids]}
    light = lightpeft.LightConfig(
        remove={"heads": 0.5, "neurons": 0.5}, estimate={"length": 3}, modules={"remove": 0.5}
    )
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no", **settings}
    arguments = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **options)
    task = "CAUSAL_LM" if name == "llama" else "SEQ_CLS"
    return lightpeft.LightTrainer(
        model, arguments, train_dataset=Dataset.from_dict(rows), peft_config=LoraConfig(task_type=task), light=light
    )


def main_path(models: dict[str, Any], folder: Path, out: Path) -> None:
    """Estimate, cut, train, save and load both models.

    Args:
        models: from `base_models(folder)`.
        out: a folder of one's own.
    """
    import torch

    import lightpeft

    for name, model in models.items():
        trainer = trainer_of(name, model, out)
        trainer.train()
        assert trainer.light_plan.removed_parameters > 0
        trainer.save_model(str(out / name))
        light = lightpeft.load_light(out / name, base=str(folder / name)).eval()
        ids = torch.arange(3, 9)[None]
        with torch.no_grad():
            torch.testing.assert_close(light(ids).logits, trainer.model.eval()(ids).logits)


def resume(models: dict[str, Any], out: Path) -> None:
    """Go on from a checkpoint of a training that ended early."""
    from copy import deepcopy

    first = trainer_of("bert", deepcopy(models["bert"]), out, save_strategy="steps", save_steps=5)
    first.train()
    trainer_of("bert", models["bert"], out).train(resume_from_checkpoint=str(out / "checkpoint-5"))


def outcome(names: Collection[str], models: dict[str, Any], folder: Path, number: int, resuming: bool) -> str:
    """What becomes of the main path in a copy of this process without the names: nothing to say, or the error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        error = ""
        try:
            remove(names)
            out = folder / f"without{number}"
            if resuming:
                resume(models, out)
            else:
                main_path(models, folder, out)
        except BaseException as caught:  # noqa: BLE001 - it is told, whatever it is
            error = f"{type(caught).__name__}: {caught}"
            if os.environ.get("TRACE"):
                import traceback

                traceback.print_exc()
        with os.fdopen(writing, "w") as pipe:
            pipe.write(error)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said or ("" if status == 0 else f"ended with {status}")


def outcomes(folder: Path, cases: list[tuple[list[str], bool]]) -> list[str]:
    """What becomes of the main path without each group of names, or of going on where the case says `True`."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401

    models = base_models(folder)
    return [outcome(names, models, folder, number, resuming) for number, (names, resuming) in enumerate(cases)]


if __name__ == "__main__":
    found = outcomes(Path(sys.argv[1]), json.loads(sys.stdin.read()))
    sys.stdout.write("\n" + json.dumps(found) + "\n")
