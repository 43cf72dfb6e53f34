"""transformers: the loading of weights, and private attributes of models, configurations, trainers and tokenizers."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from lightpeft.compat.missing import missing, needed_for, unavailable
from lightpeft.compat.torch import default_dtype

# Names that transformers does not export at its top level

try:
    from transformers.activations import ACT2FN as ACT2FN
except ImportError:
    ACT2FN = {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}
try:
    from transformers.loss.loss_utils import ForCausalLMLoss
except ImportError as _error:
    ForCausalLMLoss = missing("The loss of labeled tokens alone", _error)
try:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
except ImportError:
    LlamaRMSNorm = None
try:
    from transformers.trainer_pt_utils import LengthGroupedSampler as LengthGroupedSampler
except ImportError as _error:
    LengthGroupedSampler = missing("Batches of rows that are equally long", _error)

TRAINER_STATE_NAME = "trainer_state.json"
"""File name of the trainer state in a checkpoint."""
SCALER_NAME = "scaler.pt"
"""File name of the gradient scaler in a checkpoint."""


def class_names(table: str, feature: str) -> frozenset[str]:
    """Return the names of the classes that an auto class loads.

    Args:
        table: name of the table in `transformers.models.auto.modeling_auto`.
        feature: feature that needs it, as the subject of the error line.

    Raises:
        LightPeftError: this release of transformers has no such table.
    """
    with needed_for(feature):
        from transformers.models.auto import modeling_auto
    found: Mapping[str, Any] | None = getattr(modeling_auto, table, None)
    if found is None:
        raise unavailable(feature, f"transformers.models.auto.modeling_auto has no {table}")
    return _all_names(found)


def _all_names(table: Mapping[str, Any]) -> frozenset[str]:
    """Return the class names of a table from model type to class name, or to several."""
    return frozenset(name for names in table.values() for name in ((names,) if isinstance(names, str) else names))


def hub_tasks() -> Mapping[str, frozenset[str]]:
    """Return the hub's task names: task -> its class names; empty if transformers has no such table."""
    try:
        from transformers.modelcard import TASK_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES
    except ImportError:
        return {}
    tables = {**TASK_MAPPING, "multiple-choice": MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES}
    return {task: _all_names(table) for task, table in tables.items()}


# Reading weights


@dataclass(frozen=True)
class Checkpoint:
    """Weights that `from_pretrained` is about to load into a model on the meta device."""

    files: Sequence[str]
    """Weight files."""
    quantized: bool
    """True if the weights are quantized, or will be on loading."""
    _load: Callable[..., Any]
    _tensors: Mapping[str, Any] | None
    _options: tuple[Any, ...]

    def load(self, model: PreTrainedModel, tensors: Mapping[str, Any] | None = None) -> Any:
        """Let transformers load the weights: rename, convert, cast, tie, and set the model's parameters.

        Args:
            tensors: tensors by their names in the files, which are indexed one after another; None: read the files.

        Returns:
            Result of transformers' loading function, which a reader (`with_reader`) must return.
        """
        tensors = self._tensors if tensors is None else tensors
        return self._load(model, tensors, self.files or None, *self._options)


def with_reader(
    architecture: type[PreTrainedModel], read: Callable[[PreTrainedModel, Checkpoint], Any]
) -> type[PreTrainedModel]:
    """Return a subclass whose `from_pretrained` loads weights by `read`, and returns instances of `architecture`.

    transformers still builds the model, and renames, converts, casts and ties weights.

    Args:
        architecture: class of the model.
        read: takes the model on the meta device and its checkpoint; returns the result of `Checkpoint.load`.

    Raises:
        LightPeftError: this release of transformers has other internals.
    """

    with needed_for(_IN_PARTS):
        usual = architecture._load_pretrained_model

    def load(model: PreTrainedModel, *options: Any) -> Any:
        model.__class__ = architecture
        return read(model, _checkpoint(usual, *options))

    # transformers looks up settings by these names, and treats classes of other packages as code of the user's own
    names = {"__module__": architecture.__module__, "__qualname__": architecture.__qualname__}
    members = {**names, "_load_pretrained_model": staticmethod(load)}
    return cast(type[PreTrainedModel], type(architecture.__name__, (architecture,), members))


@contextmanager
def reading(read: Callable[[PreTrainedModel, Checkpoint], Any]) -> Iterator[None]:
    """Load the weights of every model that this thread loads inside the block by `read`, for any class.

    Args:
        read: takes the model on the meta device and its checkpoint; returns the result of `Checkpoint.load`.

    Raises:
        LightPeftError: this release of transformers has other internals.
    """
    with needed_for(_IN_PARTS):
        usual = PreTrainedModel._load_pretrained_model
    own, thread = vars(PreTrainedModel)["_load_pretrained_model"], threading.get_ident()

    def load(model: PreTrainedModel, *options: Any) -> Any:
        if threading.get_ident() != thread:
            return usual(model, *options)
        return read(model, _checkpoint(usual, *options))

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = own


_IN_PARTS = "Reading a model tensor by tensor (low_memory, weights_on_disk, load_merged)"


def _checkpoint(
    load: Callable[..., Any], tensors: Any, files: list[str] | None, settings: Any, *rest: Any
) -> Checkpoint:
    """Make a `Checkpoint` from the arguments that transformers passes to its loading function after the model."""
    return Checkpoint(files or (), settings.hf_quantizer is not None, load, tensors, (settings, *rest))


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Make transformers read tensors one at a time inside the block; by default threads read ahead, up to the whole
    model."""
    switch = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        os.environ.pop(switch) if before is None else os.environ.update({switch: before})


_BUILDING = threading.RLock()


@contextmanager
def apart_from_other_threads() -> Iterator[None]:
    """Let transformers build and load models inside the block without side effects on other threads.

    transformers sets PyTorch's default data type for all threads while it builds a model, and patches functions of its
    own. So only one thread at a time can be in such a block, and the default data type is set for this thread only.

    Raises:
        LightPeftError: this is not the main thread, and this release of transformers does not allow it.
    """
    from transformers import modeling_utils

    def of_this_thread(dtype: torch.dtype, model_class_name: str | None = None) -> AbstractContextManager[None]:
        return default_dtype(dtype)

    with _BUILDING:
        before = getattr(modeling_utils, "local_torch_dtype", None)
        if before is None:
            if threading.current_thread() is not threading.main_thread():
                raise unavailable("Loading a model in a thread", "transformers.modeling_utils.local_torch_dtype")
            yield
            return
        modeling_utils.local_torch_dtype = of_this_thread
        try:
            yield
        finally:
            modeling_utils.local_torch_dtype = before


def mark_read(parameter: Any) -> None:
    """Mark a parameter as loaded, so that transformers does not initialize it randomly."""
    parameter._is_hf_initialized = True


def forget_renaming(model: PreTrainedModel, mapping: Mapping[str, str] | None) -> None:
    """Make a model save its weights under its own names, although it was loaded with this `key_mapping`."""
    if mapping:
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [each for each in conversions if not mapping.keys() & set(each.source_patterns)]


def unpacking_gguf() -> dict[str, Any]:
    """Return arguments of `from_pretrained` by which the weights of a GGUF file become ordinary ones.

    Older releases of transformers always unpack them, and have no such setting.
    """
    settings = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def forget_quantization(model: PreTrainedModel) -> None:
    """Make a model whose weights were unpacked at loading an ordinary one, which can be trained and saved."""
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False


def has_adapter(name: str, revision: str, token: str | bool | None = None) -> bool:
    """Return True if a model on the hub or in a folder has a PEFT adapter beside it, which transformers would load."""
    try:
        from transformers.utils.peft_utils import find_adapter_config_file
    except ImportError:
        return (Path(name) / "adapter_config.json").exists()
    return find_adapter_config_file(name, revision=revision, token=token) is not None


# Models


def attention_of(config: PretrainedConfig | None) -> str | None:
    """Return the attention backend in a configuration; None: not chosen yet, or unknown."""
    return getattr(config, "_attn_implementation", None)


def forget_attention(config: PretrainedConfig) -> None:
    """Reset the attention backend in a configuration, so that the model class chooses it."""
    config._attn_implementation = None


_CODE = ("co_code", "co_names", "co_consts")
"""Attributes of code objects that are equal if two functions do the same."""


def is_rms_norm(module: Any) -> bool:
    """Return True if a module has the forward of Llama's RMS norm, whose code transformers copies to most decoders."""
    if LlamaRMSNorm is None:
        return False
    own, ideal = getattr(type(module).forward, "__code__", None), LlamaRMSNorm.forward.__code__
    same = own is not None and all(getattr(own, name) == getattr(ideal, name) for name in _CODE)
    return same and "forward" not in vars(module)


@contextmanager
def keep_kernels(model: nn.Module) -> Iterator[None]:
    """Keep the kernels of a model's layers inside the block, those for training, whenever its mode changes.

    From 5.25 on, transformers chooses kernels from the hub again when a model enters train or eval mode, which removes
    every forward that was set on a layer it has kernels for.
    """
    chosen: list[Any] = [module for module in model.modules() if getattr(module, "_use_kernels", False)]
    for module in chosen:
        _choose_kernels(module, training=True)
        module._use_kernels = False
    try:
        yield
    finally:
        for module in chosen:
            module._use_kernels = True
            _choose_kernels(module, training=module.training)


def _choose_kernels(model: Any, *, training: bool) -> None:
    """Let transformers set the kernels of a mode on the layers of a model that uses kernels."""
    if hasattr(type(model), "kernels_mode"):
        from kernels import Mode

        model.kernels_mode = Mode.TRAINING if training else Mode.INFERENCE


def causal_loss(logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
    """Compute transformers' loss of causal language models.

    Args:
        logits: [..., length, vocabulary].
        labels: [..., length].
        vocab_size: size of the vocabulary.
        args, kwargs: other arguments of transformers' `ForCausalLMLoss`.
    """
    return ForCausalLMLoss(logits, labels, vocab_size, *args, **kwargs)


def has_causal_loss(model: PreTrainedModel) -> bool:
    """Return True if a model's `loss_function` is `causal_loss`."""
    return getattr(model, "loss_function", None) is ForCausalLMLoss


@contextmanager
def override_loss(model: PreTrainedModel, loss: Callable[..., Tensor]) -> Iterator[None]:
    """Replace a model's loss function inside the block."""
    own = model.loss_function
    model.loss_function = loss
    try:
        yield
    finally:
        model.loss_function = own


def recomputes(model: nn.Module) -> bool:
    """Return True if a model, or a part of it, uses gradient checkpointing.

    The model's property for it has another name from 5.24 on; the attributes that it reads do not.
    """
    return any(getattr(part, _CHECKPOINTING, False) for part in model.modules())


@contextmanager
def computed_once(block: nn.Module) -> Iterator[None]:
    """Disable gradient checkpointing of a transformer block inside the block.

    Releases before 5.24 wrap it around any `forward` that the transformer block has, and the backward pass would
    recompute a frozen block, which needs no gradient.
    """
    if not getattr(block, _CHECKPOINTING, False):
        yield
        return
    setattr(block, _CHECKPOINTING, False)
    try:
        yield
    finally:
        setattr(block, _CHECKPOINTING, True)


_CHECKPOINTING = "gradient_checkpointing"


def grow_static_cache(model: PreTrainedModel) -> None:
    """Make `generate` allocate each layer's static cache by its first keys, not all at once by the config."""
    model._get_static_cache_init_shape = _no_common_shape


def _no_common_shape() -> None:
    """Replace a method of transformers: its result None makes the cache allocate layer by layer."""


# Trainers

_RESUMING = (
    "_get_train_sampler",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
)
"""Methods of `Trainer` that lightpeft extends so that a resumed run equals an uninterrupted one."""


def check_resuming() -> None:
    """Refuse to resume if `Trainer` lacks a method that lightpeft extends for it.

    Raises:
        LightPeftError: naming the method.
    """
    lacking = [name for name in _RESUMING if not hasattr(Trainer, name)]
    if lacking:
        raise unavailable("Resuming from a checkpoint", f"transformers has no Trainer.{lacking[0]}")


@contextmanager
def cpu_without_number(args: TrainingArguments) -> Iterator[None]:
    """Let the device of a process on a CPU be `cpu`, without a number, inside the block.

    With several processes the device is `cpu:0`, and releases before 5.24 pass it to `torch.load` as the target of
    optimizer states, which PyTorch refuses.
    """
    numbered = args.device
    if numbered.type != "cpu" or numbered.index is None:
        yield
        return
    vars(args)[_DEVICE] = torch.device("cpu")
    try:
        yield
    finally:
        vars(args)[_DEVICE] = numbered


_DEVICE = "_setup_devices"
"""Cached property that `TrainingArguments.device` returns."""


def used_columns(trainer: Any, rows: Dataset) -> Any:
    """Return training rows with the columns that a trainer passes to its collator."""
    without_others = getattr(trainer, "_remove_unused_columns", None)
    if without_others is None:
        return trainer.get_train_dataloader().dataset
    return without_others(rows, description="training")


# Tokenizers


def with_backend(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerBase:
    """Return a copy of a fast tokenizer around another `tokenizers.Tokenizer`, with the same special tokens and
    settings."""
    copied = copy.deepcopy(tokenizer, {id(tokenizer.backend_tokenizer): backend})
    copied.init_kwargs.pop("added_tokens_decoder", None)  # it has the ids of the other backend
    copied.vocab_file = None  # it has the tokens of the other backend
    return copied


# Experts


def gated(experts: Any, gate_up: Tensor) -> Tensor:
    """Compute the hidden channels of experts, [..., neurons], from gate and up channels, [..., 2 * neurons].

    All classes of experts with several implementations in transformers have this step as a method, which knows how gate
    and up channels are interleaved.

    Raises:
        LightPeftError: this class of experts has no such method.
    """
    with needed_for("Cutting hidden channels of experts"):
        hidden: Tensor = experts._apply_gate(gate_up)
    return hidden
