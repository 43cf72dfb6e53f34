"""What lightpeft uses of other libraries although they do not promise it: one test a name, which says what it is for.

Where one fails after an update of a library, its module in `lightpeft/compat` has to find another way.
"""

from __future__ import annotations

import argparse
import ast
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FunctionType
from typing import Any

import datasets
import huggingface_hub
import peft.tuners.lora.dora
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from huggingface_hub import constants
from lanes import needs, needs_family, needs_other_types
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file
from tiny import batch, make, with_lora
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import gelu, silu
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GenerationMixin,
    LlamaForQuestionAnswering,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    modeling_utils,
)
from workbench import tokenizer_of_bytes

from lightpeft.app.runs.trainers import DenseRun, LightRun, RunTrainer, WideRun
from lightpeft.compat import argparse as of_argparse
from lightpeft.compat import bitsandbytes as bnb
from lightpeft.compat import hub
from lightpeft.compat import peft as of_peft
from lightpeft.compat import torch as of_torch
from lightpeft.compat import transformers as of_transformers
from lightpeft.compat.accelerate import forget_optimizers, keep_loss_undivided, without_autocast
from lightpeft.compat.fsdp import out_of_fsdp
from lightpeft.compat.stand_ins import StandIn, StorageWatch
from lightpeft.compat.transformers import Checkpoint
from lightpeft.errors import LightPeftError
from lightpeft.peft_kinds.bottleneck import BottleneckConfig
from lightpeft.profiling.flops import flop_counter
from lightpeft.recipe.trainer import LightTrainer, LightTraining
from lightpeft.training.host import Host
from lightpeft.training.trainer import Training

SOURCE = Path(__file__).parents[1] / "src" / "lightpeft"


@contextmanager
def needed_for(use: str) -> Iterator[None]:
    """Whatever goes wrong inside the block, the test says what lightpeft can no longer do."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"lightpeft needs this for {use}") from error


# Private names are used in compat alone

HOOKS: dict[type, dict[str, str]] = {
    Trainer: {
        "_get_train_sampler": "batches that depend on seed and epoch alone, so that a run resumes with the same ones",
        "_set_signature_columns_if_needed": "columns with a teacher's logits, which reach the loss",
        "_save_checkpoint": "one line about a full disk",
        "_remove_unused_columns": "batches that say which rows they are made of",
        "_load_from_checkpoint": "going on from a checkpoint behind the cut",
        "_load_best_model": "the best model, of trainers that have the PeftModel inside",
        "_load_rng_state": "going on right behind the cut",
        "_save_optimizer_and_scheduler": "checkpoints of one process, of models that FSDP shards",
        "_load_optimizer_and_scheduler": "going on from these",
    },
    BaseTuner: {
        "_prepare_adapter_config": "placements of bottleneck adapters",
        "_create_and_replace": "bottleneck adapters as a PEFT method",
        "_replace_module": "bottleneck adapters as a PEFT method",
        "_check_merge_allowed": "the line that bottleneck adapters cannot be merged",
        "_remove_adapter_name_from_key": "saving bottleneck adapters",
    },
    nn.Module: {"_apply": "weights on disk that stay there when a model is moved"},
    BaseTunerLayer: {
        "_cast_input_dtype": "bottleneck adapters of another data type than the base",
        "_move_adapter_to_device_of_base_layer": "bottleneck adapters on accelerators",
        "_disable_adapters": "switching bottleneck adapters off",
        "_active_adapter": "switching between bottleneck adapters",
    },
}
"""Private methods and attributes of classes that lightpeft's classes extend, and what each is for."""


SINCE = {"_remove_adapter_name_from_key": needs_other_types}
"""Those that older versions do not have."""


@pytest.mark.parametrize(
    ("owner", "name"),
    [pytest.param(owner, name, marks=SINCE.get(name, ())) for owner, names in HOOKS.items() for name in names],
)
def test_what_subclasses_extend(owner: type, name: str) -> None:
    assert hasattr(owner, name), f"lightpeft needs {owner.__name__}.{name} for {HOOKS[owner][name]}"


def test_bottleneck_adapters_need_a_peft_that_saves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_remove_adapter_name_from_key", raising=False)
    with pytest.raises(LightPeftError, match=r"bottleneck adapters need peft 0\.21 or newer, and \d+\."):
        BottleneckConfig(placement="houlsby")


def of_trainer(owner: type) -> set[str]:
    """Methods of `Trainer` that a class of lightpeft's extends."""
    return {name for name in vars(owner) if not name.startswith("__") and hasattr(Trainer, name)}


def test_methods_of_trainer_are_extended_in_one_class() -> None:
    private = {name for name in of_trainer(Training) if is_private(name)}
    assert private == HOOKS[Trainer].keys() - {"_save_checkpoint", "_remove_unused_columns"}
    assert of_trainer(RunTrainer) == {"evaluate", "_save_checkpoint", "floating_point_ops"}
    for owner in (LightTraining, LightTrainer, LightRun, DenseRun, WideRun):
        assert not of_trainer(owner), owner


def test_a_trainer_has_all_that_is_used_of_it(tmp_path: Path) -> None:
    """Once it has taken a step."""
    model, settings = make("bert"), TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    rows = [{name: values[0] for name, values in batch(1, labels=True).items()}]
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    used = {*Host.__annotations__, *(name for name, value in vars(Host).items() if isinstance(value, FunctionType))}
    used -= {"__init__", "__subclasshook__"}
    missing = sorted(name for name in used if not hasattr(trainer, name))
    assert len(used) > 30 and not missing


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def own_names(tree: ast.AST) -> Iterator[str]:
    """Private names that the code gives to things of its own."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def used_names(tree: ast.AST) -> Iterator[str]:
    """Private names that the code reaches for: attributes, imports, and strings that name one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("lightpeft"):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            yield from (each.value for each in node.args[1:2] if isinstance(each, ast.Constant))


def foreign_names(sources: dict[str, str]) -> list[str]:
    """`file: name` of each private name that the sources use and do not define."""
    trees = {file: ast.parse(source) for file, source in sources.items()}
    known = {name for tree in trees.values() for name in own_names(tree)}
    known |= {name for names in HOOKS.values() for name in names}
    used = {(file, name) for file, tree in trees.items() for name in used_names(tree) if is_private(name)}
    return sorted(f"{file}: {name}" for file, name in used if name not in known)


def test_private_names_of_libraries_are_used_in_compat_alone() -> None:
    files = [path for path in SOURCE.rglob("*.py") if "compat" not in path.relative_to(SOURCE).parts]
    found = foreign_names({str(path.relative_to(SOURCE)): path.read_text(encoding="utf-8") for path in files})
    assert not found, f"these belong in lightpeft/compat, with a test here: {', '.join(found)}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("model._weights", ["a.py: _weights"]),
        ("self._weights", ["a.py: _weights"]),
        ("self._weights = 1\nother._weights", []),
        ("def _help(): ...\nmodule._help()", []),
        ("from torch.utils import _pytree", ["a.py: _pytree"]),
        ("from lightpeft.files import _limit", []),
        ("getattr(model, '_weights', None)", ["a.py: _weights"]),
        ("model.__dict__, model.weights, model.weight_", []),
        ("super()._save_checkpoint()", []),
    ],
)
def test_the_rule_itself(source: str, found: list[str]) -> None:
    assert foreign_names({"a.py": source}) == found


# argparse


def test_options_of_a_parser() -> None:
    with needed_for("what was meant by an option that there is not"):
        parser = argparse.ArgumentParser()
        parser.add_argument("--overwrite", "-o")
        assert {"-h", "--help", "--overwrite", "-o"} == set(of_argparse.options_of(parser))


# accelerate


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """Whoever made one before said in which precision all that follow compute."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("no_accelerator")
def test_a_prepared_model_is_as_it_is_inside() -> None:
    """And behind it is prepared again."""
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    with needed_for("a cut that does not depend on what training computes in"):
        plain = nn.functional.linear(x, model.weight, model.bias)
        assert not prepared(x).equal(plain)
        with without_autocast(model):
            assert model(x).equal(plain)
        assert not prepared(x).equal(plain)


@pytest.mark.usefixtures("no_accelerator")
def test_optimizers_are_forgotten() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0))
    with needed_for("float16 training through the cut"):
        assert len(accelerator._optimizers) == 1
        forget_optimizers(accelerator)
        assert not accelerator._optimizers


@pytest.mark.usefixtures("no_accelerator")
def test_accelerate_divides_no_loss() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with needed_for("gradients that accumulation does not make smaller, with transformers 5.5"):
        keep_loss_undivided()
        assert accelerator.gradient_accumulation_steps == 1


@pytest.fixture
def one_of_one(tmp_path: Path, no_accelerator: None) -> Iterator[None]:
    """A process group of this process alone."""
    meet = torch.distributed.FileStore(str(tmp_path / "meet"), 1)
    torch.distributed.init_process_group("gloo", store=meet, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("one_of_one")
def test_a_model_leaves_fsdp_and_comes_back() -> None:
    """With other parameters, tied ones still tied, and nothing of the old shards left."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    x, expected = torch.randn(2, 4), None
    with needed_for("the cut of a model that FSDP shards"):
        expected = model(x)
        fully_shard(model)
        torch.testing.assert_close(model(x), expected)
        before = weakref.ref(model[0].weight)
        with out_of_fsdp(model):
            assert type(model) is nn.Sequential and isinstance(model[0].weight, DTensor)
            assert not model._forward_hooks and not model._forward_pre_hooks
            model[0].bias = nn.Parameter(torch.zeros(4))
        gc.collect()
        assert before() is None
        assert isinstance(model, FSDPModule) and model[0].weight is model[2].weight
        assert isinstance(model[2].weight, DTensor) and not isinstance(model[0].bias, DTensor)
        assert not model(x).equal(expected)


# PyTorch


@pytest.mark.parametrize(
    "reads",
    [
        lambda count: torch.ones(2) / count,
        lambda count: torch.ones(2).div_(count),
        lambda count: 1 / int(count),
        lambda count: count.item(),
        lambda count: torch.stack([torch.tensor(1.0), count]),
        lambda count: 1 / count.to(torch.float64),
        lambda count: 1 / count.detach().cpu().float(),
        lambda count: max(count, 1),
    ],
)
def test_a_tensor_notes_who_computes_with_it(reads: Callable[[Any], Any]) -> None:
    count = of_torch.ReadRecorder.of(torch.tensor(4.0))
    with needed_for("steps that do not grow with accumulation where a loss ignores how many labels they have"):
        assert count.to(count.device).equal(torch.tensor(4.0)) and isinstance(count, Tensor)
        count = of_torch.ReadRecorder.of(torch.tensor(4.0))
        assert count.dtype == count.to(count.device, torch.bfloat16).float().dtype and not count.read
        reads(count)
        assert count.read


@pytest.mark.usefixtures("one_of_one")
@pytest.mark.parametrize("half", [None, torch.float32, torch.bfloat16])
def test_a_model_in_parts_reads_no_tensor_that_goes_in(half: torch.dtype | None) -> None:
    class Divides(nn.Linear):
        def forward(self, x: Tensor, count: Tensor | None = None, by: bool = False) -> Any:
            return super().forward(x) / count if by else super().forward(x)

    with needed_for("steps under FSDP2 that do not grow with accumulation and processes"):
        model = fully_shard(Divides(2, 2), mp_policy=MixedPrecisionPolicy(param_dtype=half))
        for by in (False, True):
            count = of_torch.ReadRecorder.of(torch.tensor(4.0))
            found = model(torch.ones(1, 2), count=count, by=by)
            assert count.read is by and type(found) is Tensor


def test_hooks_of_modules() -> None:
    with needed_for("leaving LoRA layers whose parts are watched to PEFT"):
        for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
            linear = nn.Linear(2, 2)
            assert not of_torch.has_hooks(linear)
            handle = getattr(linear, f"register_{register}")(lambda *_: None)
            assert of_torch.has_hooks(linear), register
            handle.remove()
            assert not of_torch.has_hooks(linear), register


def test_changes_of_tensors() -> None:
    with needed_for("converting what several LoRA layers read once, unless it was changed in between"):
        x = torch.ones(2)
        before = of_torch.change_count(x)
        assert of_torch.change_count(x) == before
        x.add_(1)
        assert of_torch.change_count(x) != before
        with torch.inference_mode():
            assert of_torch.change_count(torch.ones(2)) is None


def test_what_a_graph_makes_again() -> None:
    x, y, frozen = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True), torch.randn(4)
    a, b = x * 2, y * 2
    normed = frozen * (a * a.pow(2).mean(-1, keepdim=True).rsqrt())
    made = [a * b, a * b.sum(0), silu(a), gelu(a), gelu(a, approximate="tanh"), silu(a) * b, normed, silu(a) * 0.5]
    made += [normed.to(torch.bfloat16), silu(a).to(torch.float64)]
    with needed_for("activations that the backward pass makes again"):
        for tensor in made:
            again = of_torch.maker_of(tensor)
            assert again is not None and again().equal(tensor) and again().dtype == tensor.dtype
        for tensor in (x, a, x * frozen, x + y, (a * b).flatten(), (a * b).detach(), a.to(torch.bfloat16)):
            assert of_torch.maker_of(tensor) is None, "the graph keeps too little, or it is no such result"


def test_tables_of_parameters() -> None:
    with needed_for("load_light(low_memory=True), which cuts weights as they arrive"):
        linear = nn.Linear(2, 2)
        twin, weight = of_torch.with_own_parameters(linear), linear.weight
        seen: list[str] = []
        handle = register_module_parameter_registration_hook(lambda module, name, parameter: seen.append(name))
        try:
            assert twin.weight is weight
            of_torch.set_without_hooks(twin, "weight", nn.Parameter(torch.ones(2, 2)))
            assert not seen and bool((twin(torch.ones(2)) - linear.bias == 2).all())
            assert linear.weight is weight
            linear.weight = nn.Parameter(torch.zeros(2, 2))
            assert seen == ["weight"]
        finally:
            handle.remove()


def test_the_default_type_of_one_thread() -> None:
    with needed_for("load_light in one thread while others compute"):
        seen = []
        with torch.device("meta"), of_torch.default_dtype(torch.bfloat16):
            counted = torch.arange(4)
            made = [torch.empty(2), torch.tensor(0.5), counted / 2, nn.Linear(2, 2).weight, counted.sqrt()]
            assert {tensor.dtype for tensor in made} == {torch.bfloat16}
            said = [counted.float(), torch.zeros(2, dtype=torch.float32), counted.to(torch.float32) * 2]
            assert {tensor.dtype for tensor in said} == {torch.float32} and counted.dtype == torch.int64
            with of_torch.default_dtype(torch.float16):
                assert torch.ones(1).dtype == torch.float16
            assert torch.ones(1).dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
            thread = threading.Thread(target=lambda: seen.append(torch.ones(1).dtype))
            thread.start()
            thread.join()
        assert torch.ones(1).dtype == torch.float32 and seen == [torch.float32]


# transformers


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny model's folder."""
    make("bert").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


class Lazy:
    """A tensor that is read when it is indexed."""

    def __init__(self, tensor: Tensor, readers: list[str]) -> None:
        self.tensor, self.readers = tensor, readers

    def __getitem__(self, index: Any) -> Tensor:
        self.readers.append(threading.current_thread().name)
        return self.tensor[index]


def test_reading_weights(base: Path) -> None:
    seen: list[Checkpoint] = []

    def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
        assert type(model) is BertForSequenceClassification and next(model.parameters()).is_meta
        seen.append(checkpoint)
        return checkpoint.load(model)

    with needed_for("load_merged and load_light(low_memory=True): cutting a model before its weights are read"):
        model = of_transformers.with_reader(BertForSequenceClassification, read).from_pretrained(base)
        assert type(model) is BertForSequenceClassification
        assert [Path(file).name for file in seen[0].files] == ["model.safetensors"] and not seen[0].quantized
        expected = load_file(base / "model.safetensors")
        assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())


def test_reading_weights_of_whatever_is_loaded(base: Path) -> None:
    seen: list[type] = []

    def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
        seen.append(type(model))
        return checkpoint.load(model)

    own = vars(PreTrainedModel)["_load_pretrained_model"]
    with needed_for("weights_on_disk around any from_pretrained"):
        with of_transformers.reading(read):
            model = AutoModelForSequenceClassification.from_pretrained(base)
            other = threading.Thread(target=BertForSequenceClassification.from_pretrained, args=[base])
            other.start()
            other.join()
        assert seen == [BertForSequenceClassification], "and nothing of other threads"
        assert vars(PreTrainedModel)["_load_pretrained_model"] is own
        expected = load_file(base / "model.safetensors")
        assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())


def test_reading_tensors_one_at_a_time(base: Path) -> None:
    stored, readers = load_file(base / "model.safetensors"), list[str]()

    def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
        with of_transformers.one_at_a_time():
            return checkpoint.load(model, {name: Lazy(tensor, readers) for name, tensor in stored.items()})

    with needed_for("load_light(low_memory=True): no more than one dense tensor in memory"):
        model = of_transformers.with_reader(BertForSequenceClassification, read).from_pretrained(base)
        assert model.classifier.weight.equal(stored["classifier.weight"])
        assert len(readers) >= len(stored) and set(readers) == {threading.main_thread().name}


def test_quantized_checkpoints_are_known(base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    seen: list[bool] = []

    def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
        seen.append(checkpoint.quantized)
        return checkpoint.load(model)

    with needed_for("the line that low_memory cannot read quantized weights"):
        loader = of_transformers.with_reader(BertForSequenceClassification, read)
        loader.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
        assert seen == [True]


@pytest.mark.parametrize("name", ["bert", "llama-classifier"])
def test_loading_apart_from_other_threads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    set_default, own = torch.set_default_dtype, modeling_utils.local_torch_dtype
    seen: list[torch.dtype] = []

    def watched(dtype: torch.dtype) -> None:
        seen.append(dtype)
        set_default(dtype)

    monkeypatch.setattr(torch, "set_default_dtype", watched)
    with needed_for("load_light in one thread while others compute"):
        expected = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert torch.bfloat16 in seen, "which is why"
        seen.clear()
        with of_transformers.apart_from_other_threads():
            loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert not seen and modeling_utils.local_torch_dtype is own
        types = [{key: value.dtype for key, value in each.state_dict().items()} for each in (loaded, expected)]
        assert types[0] == types[1] and loaded.dtype == torch.bfloat16


def test_parameters_that_count_as_read(base: Path) -> None:
    def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
        done = checkpoint.load(model)
        for linear in (model.classifier, model.bert.pooler.dense):
            of_torch.set_without_hooks(linear, "weight", nn.Parameter(torch.full_like(linear.weight, 7.0)))
        of_transformers.mark_read(model.classifier.weight)
        return done

    with needed_for("load_light(low_memory=True): projections that wait for their cut weights are not drawn at random"):
        model = of_transformers.with_reader(BertForSequenceClassification, read).from_pretrained(base)
        assert bool((model.classifier.weight == 7).all()), "marked"
        assert not bool((model.bert.pooler.dense.weight == 7).any()), "not marked"


def test_names_that_weights_are_saved_under(tmp_path: Path) -> None:
    make("llama-gqa").save_pretrained(tmp_path / "base")
    renaming = {r"^model\.": "transformer."}
    with needed_for("merged models for question answering that load plainly"):
        model = LlamaForQuestionAnswering.from_pretrained(tmp_path / "base", key_mapping=renaming)
        of_transformers.forget_renaming(model, renaming)
        model.save_pretrained(tmp_path / "saved")
        assert load_file(tmp_path / "saved" / "model.safetensors").keys() == model.state_dict().keys()


def test_adapters_beside_a_model(base: Path) -> None:
    with needed_for("the line that a model's folder has an adapter beside it"):
        assert not of_transformers.has_adapter(str(base), revision="main")
        with_lora(make("bert")).save_pretrained(str(base))
        assert of_transformers.has_adapter(str(base), revision="main")


def test_attention_backends() -> None:
    with needed_for("counting FLOPs whatever the attention backend, and looking at families that are not listed"):
        model = make("bert", attn_implementation="eager")
        assert of_transformers.attention_of(model.config) == "eager"
        model.set_attn_implementation("sdpa")
        assert of_transformers.attention_of(model.config) == "sdpa"
        model.set_attn_implementation("eager")
        of_transformers.forget_attention(model.config)
        assert of_transformers.attention_of(type(model)(model.config).config) == "sdpa", "the class's own choice"
        assert of_transformers.attention_of(None) is None


def test_the_loss_of_language_models() -> None:
    model, inputs = make("llama-gqa"), batch(labels=False)
    with needed_for("computing logits in training only where the loss reads them"):
        assert of_transformers.has_causal_loss(model) and not of_transformers.has_causal_loss(make("bert"))
        logits, labels = model(**inputs).logits, inputs["input_ids"]
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        size = model.config.vocab_size
        torch.testing.assert_close(of_transformers.causal_loss(logits, labels, size), expected)
        shifted = {"shift_labels": labels[:, 1:].contiguous()}
        torch.testing.assert_close(
            of_transformers.causal_loss(logits[:, :-1].contiguous(), labels, size, **shifted), expected
        )


def test_another_loss_for_a_while() -> None:
    model = make("llama-gqa")
    usual, inputs = model.loss_function, batch(labels=False)

    def loss() -> float:
        return float(model(**inputs, labels=inputs["input_ids"]).loss.detach())

    before = loss()
    with needed_for("computing logits in training only where the loss reads them"):
        with of_transformers.override_loss(model, lambda *args, **options: torch.tensor(7.0)):
            assert loss() == 7
            with of_transformers.override_loss(model, lambda *args, **options: torch.tensor(8.0)):
                assert loss() == 8
            assert loss() == 7
        assert loss() == before and model.loss_function is usual


@needs("transformers", "5.16", "older ones allocate static caches at their first keys anyway")
def test_the_shape_of_static_caches() -> None:
    with needed_for("generate() with a static cache after heads were cut"):
        model = make("llama-gqa")
        heads, _ = model._get_static_cache_init_shape()
        assert heads == model.config.num_key_value_heads, "which holds for no layer that lost some"
        of_transformers.grow_static_cache(model)
        assert model._get_static_cache_init_shape() is None
        assert "None" in str(GenerationMixin._get_static_cache_init_shape.__doc__), "and means: not yet"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_hidden_channels_of_experts(name: str) -> None:
    """Of gate and up one after the other, or in turns: the step that each class of experts has."""
    experts = next(module for module in make(name).modules() if hasattr(module, "gate_up_proj"))
    gate, up = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    if name == "mixtral":
        found, expected = of_transformers.gated(experts, torch.cat([gate, up], 1)), nn.functional.silu(gate) * up
    else:
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
        found = of_transformers.gated(experts, torch.stack([gate, up], 2).flatten(1))
        expected = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    torch.testing.assert_close(found, expected)


# PEFT


def test_adapters_in_a_module() -> None:
    with needed_for("the line that a model has several adapters"):
        model = get_peft_model(make("bert"), LoraConfig(target_modules=["query"]), adapter_name="one")
        model.add_adapter("two", LoraConfig(target_modules=["query"]))
        layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        assert sorted(of_peft.adapters_in(layer)) == ["one", "two"]


@needs("peft", "0.19", "older ones take no name for that of experts")
@needs_family("deepseek_v3")
def test_names_that_lora_takes_for_experts() -> None:
    """A linear layer of that name gets no LoRA; parameters of experts, in every block, do."""
    with needed_for("LoRA by default on the layers that are named"):
        assert {"gate_proj", "up_proj", "down_proj"} <= of_peft.names_of_experts("deepseek_v3")
        assert not of_peft.names_of_experts("qwen2_moe") and not of_peft.names_of_experts("llama")
        shared = [f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]
        model = get_peft_model(make("deepseek_v3"), LoraConfig(target_modules=shared))
        adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        assert adapted and all(".mlp.experts" in name for name in adapted)


@needs("peft", "0.19", "older ones keep no norms")
def test_norms_that_dora_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.lora.dora, "ENABLE_DORA_CACHING", True)
    model = get_peft_model(make("bert"), LoraConfig(target_modules=["query"], use_dora=True)).eval()
    layer: Any = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    x = torch.ones(1, layer.in_features)
    with needed_for("cutting DoRA modules that have run in evaluation mode"), torch.no_grad():
        before = layer(x)
        layer.get_base_layer().weight.mul_(2)
        of_peft.forget_norms(layer.lora_magnitude_vector["default"])
        torch.testing.assert_close(layer(x), before, msg="the same direction, and the same length")


# bitsandbytes


ROWS, COLUMNS = 8, 128


@pytest.fixture
def library() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes")


def four_bits(library: Any, double: bool = False, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Any:
    layer = library.nn.Linear4bit(COLUMNS, rows, bias=False, compress_statistics=double, quant_type="nf4")
    layer.weight.data = layer.weight.data.to(dtype)
    return layer.to("cpu").requires_grad_(False)  # which quantizes


def eight_bits(library: Any) -> Any:
    layer = library.nn.Linear8bitLt(COLUMNS, ROWS, bias=False, has_fp16_weights=False)
    layer.weight = library.nn.Int8Params(torch.randn(ROWS, COLUMNS), requires_grad=False)
    return layer.to("cpu")


def test_types_of_layers(library: Any) -> None:
    with needed_for("telling layers in 4 and 8 bits from others"):
        four, eight = four_bits(library), eight_bits(library)
        assert bnb.has_type(four, "Linear4bit") and not bnb.has_type(eight, "Linear4bit")
        assert bnb.has_type(eight, "Linear8bitLt") and not bnb.has_type(nn.Linear(2, 2), "Linear8bitLt")
        assert isinstance(four, bnb.class_of_layers("Linear4bit"))
        assert bnb.quant_state(four.weight).shape == (ROWS, COLUMNS)
        assert bnb.quant_state(eight.weight) is None and bnb.quant_state(torch.ones(2)) is None
        assert bnb.quant_state(library.nn.Linear4bit(8, 8).weight) is None, "nothing quantized it yet"


@pytest.mark.parametrize("double", [False, True])
def test_codes_and_scales(library: Any, double: bool) -> None:
    with needed_for("reading and cutting weights in 4 bits"):
        weight = four_bits(library, double).weight
        state = bnb.quant_state(weight)
        packed, scales = bnb.codes(weight)
        assert packed.dtype == torch.uint8 and len(packed) == weight.shape.numel() == ROWS * COLUMNS // 2
        assert len(scales) == ROWS * COLUMNS // state.blocksize
        expected = library.functional.dequantize_4bit(weight.data, state).float()
        dense = bnb.dequantized(packed, scales, state).view(ROWS, COLUMNS)
        torch.testing.assert_close(dense, expected, atol=1e-6, rtol=0)
        assert bnb.unquantized_dtype(state) == torch.float32


@pytest.mark.parametrize("double", [False, True])
def test_weights_packed_for_cpus(library: Any, double: bool) -> None:
    layer = four_bits(library, double, rows=32)  # the least that such a layout has
    packed, scales = bnb.codes(layer.weight)
    with needed_for("reading weights in 4 bits that a forward pass on a CPU with AVX512-BF16 has packed anew"):
        functional = library.functional
        again, state = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        layer.weight.data, layer.weight.quant_state = again, state
        unpacked, rounded = bnb.codes(layer.weight)
        assert unpacked.equal(packed)
        torch.testing.assert_close(rounded, scales, atol=0, rtol=2**-8)
        assert bnb.unquantized_dtype(state) == torch.float32


@pytest.mark.parametrize("double", [False, True])
def test_quantizing_as_before(library: Any, double: bool) -> None:
    with needed_for("cutting weights in 4 bits"):
        layer = four_bits(library, double, dtype=torch.bfloat16)
        old, dense = bnb.quant_state(layer.weight), torch.randn(4, COLUMNS)
        layer.weight = bnb.quantized_like(layer.weight, dense, layer)
        new = bnb.quant_state(layer.weight)
        assert old.dtype == torch.bfloat16
        assert (new.shape, new.dtype, new.quant_type, new.blocksize) == (
            (4, COLUMNS),
            old.dtype,
            "nf4",
            old.blocksize,
        )
        assert new.nested == double
        error = bnb.dequantized(*bnb.codes(layer.weight), new).view(4, COLUMNS) - dense
        assert error.norm() < 0.12 * dense.norm()


def test_the_layout_for_cpus_can_be_declined(library: Any) -> None:
    with needed_for("weights in 4 bits that stay the same when a model is evaluated"):
        layer = four_bits(library, rows=32)  # the least that such a layout has
        assert hasattr(layer, "support_avx512bf16_for_cpu")
        bnb.keep_layout(layer)
        before = layer.weight.data.clone()
        layer.eval()(torch.ones(1, COLUMNS, dtype=torch.bfloat16))
        assert layer.weight.data.equal(before)


def test_kernels_that_are_right(library: Any) -> None:
    with needed_for("layers in 4 bits of any width on CPUs"):
        assert bnb.cpu_kernel_is_right(COLUMNS, 64)
        assert isinstance(bnb.cpu_kernel_is_right(48, 64), bool)


@pytest.mark.parametrize("ran", [False, True])
def test_row_scales(library: Any, ran: bool) -> None:
    with needed_for("reading and cutting weights in 8 bits"):
        layer, x = eight_bits(library), torch.randn(3, COLUMNS)
        if ran:
            layer(x)
        dense = layer.weight.data.float() * bnb.row_scales(layer)[:, None] / 127
        torch.testing.assert_close(layer(x), x @ dense.T, atol=0.2, rtol=0.1)
        index = torch.tensor([1, 3])
        bnb.set_row_quantized(layer, layer.weight.data[index], bnb.row_scales(layer)[index])
        assert bnb.row_scales(layer).shape == (2,)
        torch.testing.assert_close(layer(x), x @ dense[index].T, atol=0.2, rtol=0.1)


# Tokenizers


def test_checkpointing_is_seen_in_the_whole_model_and_in_its_parts() -> None:
    model = make("llama-gqa").train()
    assert not of_transformers.recomputes(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert of_transformers.recomputes(model) and of_transformers.recomputes(model.model.layers[0])
    model.gradient_checkpointing_disable()
    assert not of_transformers.recomputes(model)


def test_checkpointing_leaves_a_block_alone() -> None:
    """It goes around a block's own forward or, before transformers 5.24, around any."""
    model = make("llama-gqa").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    block, rows, seen = model.model.layers[0], batch(length=4), []
    block.mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    for runs, once in ((1, True), (2, False)):
        seen.clear()
        with of_transformers.computed_once(block) if once else nullcontext():
            model(**rows, labels=rows["input_ids"]).loss.backward()
        assert len(seen) == runs


def test_a_cpu_without_a_number(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    vars(args)["_setup_devices"] = torch.device("cpu", 1)
    with needed_for("going on over several CPUs, before transformers 5.24"):
        assert args.device.index == 1, "as of the second process of two"
        with of_transformers.cpu_without_number(args):
            assert args.device == torch.device("cpu")
        assert args.device.index == 1


def test_a_tokenizer_around_another_backend() -> None:
    with needed_for("tokenizers with fewer tokens"):
        tokenizer = tokenizer_of_bytes(texts=["good movies"] * 3, chat_template="{{ messages }}")
        backend = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<bos>": 2, "<eos>": 3, "good": 4}, "<unk>"))
        other = of_transformers.with_backend(tokenizer, backend)
        assert type(other) is type(tokenizer) and len(other) == 5
        assert other("good")["input_ids"] == [4] and other.pad_token_id == 0
        assert other.chat_template == tokenizer.chat_template
        other.pad_token = "<eos>"
        assert tokenizer.pad_token == "<pad>", "nothing is shared"


# The hub


def test_going_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with needed_for("names that are not on this machine where there is no network: one line at once"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        assert not huggingface_hub.is_offline_mode()
        hub.go_offline()
        assert huggingface_hub.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
        with pytest.raises(ConnectionError):
            datasets.load_dataset("someone/rows")


# -- torch: tensors without storage ----------------------------------------------------------------------------------


def test_stand_ins_are_counted_as_long_as_they_live() -> None:
    with StorageWatch() as watch:
        first = torch.zeros(1000)
        assert isinstance(first, StandIn) and watch.now == watch.peak == 4000
        view = first[:10]
        assert watch.now == 4000 and of_torch.storage_of(view) == of_torch.storage_of(first)
        second = first * 2
        assert watch.now == 8000
        del first, view
        assert watch.now == 4000 and watch.peak == 8000
        assert second.device.type == "cpu" and second.shape == (1000,)


def test_stand_ins_answer_where_values_are_asked_for() -> None:
    with StorageWatch(share=0.25) as watch:
        values = torch.zeros(8, 4)
        assert values.equal(values + 1) and not bool((values > 0).any()) and float(values.sum()) == 1.0
        assert (values > 0).nonzero().shape == (8, 2)
        assert values[values > 0].shape == (8,)
        assert values[torch.zeros(8, dtype=torch.bool)].shape == (2, 4)
        assert watch.peak > 0


def test_stand_ins_are_counted_by_the_formulas_of_the_flop_counter() -> None:
    with StorageWatch(formulas=flop_counter().flop_registry) as watch:
        left, right = torch.zeros(3, 5, requires_grad=True), torch.zeros(5, 7)
        torch.nn.functional.linear(left, right.T).relu().sum().backward()
        assert watch.flops == 2 * 2 * 3 * 5 * 7, "once forward, and once for the gradient of the left one"


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this PyTorch has none in float32")
def test_stand_ins_of_groups_are_as_the_real_ones() -> None:
    """In float32, too, which PyTorch's own stand-in for products of groups refuses."""

    def computed() -> list[Any]:
        rows, experts = torch.ones(6, 8, requires_grad=True), torch.ones(2, 8, 16, requires_grad=True)
        ends = torch.tensor([4, 6], dtype=torch.int32)
        result = torch.nn.functional.grouped_mm(rows, experts, offs=ends)
        result.backward(torch.ones_like(result))
        return [(tensor.shape, tensor.dtype) for tensor in (result, rows.grad, experts.grad) if tensor is not None]

    real = computed()
    with StorageWatch(formulas=flop_counter().flop_registry) as watch:
        assert computed() == real
        assert watch.flops == 3 * 2 * 6 * 8 * 16
        assert torch.zeros(7, dtype=torch.long).bincount(minlength=4).tolist() == [2, 2, 2, 1]


def test_storages_of_real_tensors_tell_views_from_copies() -> None:
    values = torch.zeros(8)
    assert (
        of_torch.storage_of(values)
        == of_torch.storage_of(values.view(2, 4).detach())
        != of_torch.storage_of(values.clone())
    )


def test_attention_of_cpus_is_known_by_its_name() -> None:
    """For the counting of what it computes: two products forward, and four backward."""
    query, key = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 7))
    with flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, key, key).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 2 * 3 * 5 * 7 * (8 + 8))
