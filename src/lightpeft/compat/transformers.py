"""transformers: how it reads weights into a model, and what models, configurations and tokenizers know beside their
settings."""

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
from datasets import Dataset
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from lightpeft.compat.missing import missing, needed_for, unavailable
from lightpeft.compat.torch import default_dtype

# Names that transformers does not have at its top

try:
    from transformers.activations import ACT2FN as ACT2FN
except ImportError:
    ACT2FN = {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}
try:
    from transformers.loss.loss_utils import ForCausalLMLoss
except ImportError as _error:
    ForCausalLMLoss = missing("The loss of labelled tokens alone", _error)
try:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
except ImportError:
    LlamaRMSNorm = None
try:
    from transformers.trainer_pt_utils import LengthGroupedSampler as LengthGroupedSampler
except ImportError as _error:
    LengthGroupedSampler = missing("Batches of rows that are equally long", _error)

TRAINER_STATE_NAME = "trainer_state.json"
"""What a trainer calls the file that says how far it has come."""
SCALER_NAME = "scaler.pt"
"""And that of the gradient scaler."""


def class_names(table: str, feature: str) -> Mapping[str, Any]:
    """Model type -> name of the class, or names, that an auto class of transformers gives.

    Args:
        table: its name in `transformers.models.auto.modeling_auto`.
        feature: needs it; at the beginning of a sentence.
    """
    with needed_for(feature):
        from transformers.models.auto import modeling_auto
    found: Mapping[str, Any] | None = getattr(modeling_auto, table, None)
    if found is None:
        raise unavailable(feature, f"transformers.models.auto.modeling_auto has no {table}")
    return found


def hub_tasks() -> Mapping[str, Mapping[str, Any]]:
    """The hub's name of a task -> names of the classes that answer it, by model type; empty where nobody knows."""
    try:
        from transformers.modelcard import TASK_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES
    except ImportError:
        return {}
    return {**TASK_MAPPING, "multiple-choice": MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES}


# Reading weights


@dataclass(frozen=True)
class Checkpoint:
    """What `from_pretrained` is about to read into a model on the meta device."""

    files: Sequence[str]
    """The files with the weights."""
    quantised: bool
    """Whether they are quantised, or are to be."""
    _load: Callable[..., Any]
    _tensors: Mapping[str, Any] | None
    _options: tuple[Any, ...]

    def load(self, model: PreTrainedModel, tensors: Mapping[str, Any] | None = None) -> Any:
        """Let transformers rename, convert, cast and tie, and set the model's parameters.

        Args:
            tensors: by the names of the files; a tensor is indexed when it is its turn. None: those of the files.

        Returns:
            What a reader (`with_reader`) has to return.
        """
        tensors = self._tensors if tensors is None else tensors
        return self._load(model, tensors, self.files or None, *self._options)


def with_reader(
    architecture: type[PreTrainedModel], read: Callable[[PreTrainedModel, Checkpoint], Any]
) -> type[PreTrainedModel]:
    """The class, with a `from_pretrained` whose weights `read` brings in; the models it makes are of the class itself.

    transformers builds, renames, converts, casts and ties, as for any model.

    Args:
        read: takes the model on the meta device and what there is to read; returns what `Checkpoint.load` returns.
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
    """Inside the block, `read` brings in the weights of every model that this thread loads, of whatever class.

    Args:
        read: as for `with_reader`.
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
    """What transformers hands to the function that loads weights, behind the model."""
    return Checkpoint(files or (), settings.hf_quantizer is not None, load, tensors, (settings, *rest))


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside the block tensors are read when it is their turn; else threads read ahead, at worst the whole model."""
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
    """Inside the block transformers builds and loads models without touching what other threads compute.

    While it builds a model it sets PyTorch's default data type, which is that of all threads, to the model's, and
    replaces functions of its own. So one thread at a time is in such a block, and the default type stays what it is.

    Raises:
        LightPeftError: this is not the main thread, and transformers has no place for that.
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
    """Let transformers take a parameter for one that has its weights; it else draws random values for it."""
    parameter._is_hf_initialized = True


def forget_renaming(model: PreTrainedModel, mapping: Mapping[str, str]) -> None:
    """Save a model under its own names, although it was loaded with this `key_mapping`."""
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [each for each in conversions if not mapping.keys() & set(each.source_patterns)]


def has_adapter(name: str, revision: str) -> bool:
    """Whether a model on the hub or in a folder has a PEFT adapter beside it, which transformers would put into it."""
    try:
        from transformers.utils.peft_utils import find_adapter_config_file
    except ImportError:
        return (Path(name) / "adapter_config.json").exists()
    return find_adapter_config_file(name, revision=revision) is not None


# Models


def attention_of(config: PretrainedConfig | None) -> str | None:
    """The attention backend of a model with this configuration; None where it is not chosen yet, or has no name."""
    return getattr(config, "_attn_implementation", None)


def forget_attention(config: PretrainedConfig) -> None:
    """Let the class that a model is made of choose its attention backend."""
    config._attn_implementation = None


_CODE = ("co_code", "co_names", "co_consts")
"""What two functions have in common that do the same."""


def is_rms_norm(module: Any) -> bool:
    """Whether a module computes what Llama's RMS norm does, whose code transformers copies into most decoders."""
    if LlamaRMSNorm is None:
        return False
    own, ideal = getattr(type(module).forward, "__code__", None), LlamaRMSNorm.forward.__code__
    same = own is not None and all(getattr(own, name) == getattr(ideal, name) for name in _CODE)
    return same and "forward" not in vars(module)


def causal_loss(logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
    """The loss of causal language models, [..., length, vocabulary] against [..., length]."""
    return ForCausalLMLoss(logits, labels, vocab_size, *args, **kwargs)


def has_causal_loss(model: PreTrainedModel) -> bool:
    """Whether a model's loss is `causal_loss`, as far as it says so."""
    return getattr(model, "loss_function", None) is ForCausalLMLoss


@contextmanager
def override_loss(model: PreTrainedModel, loss: Callable[..., Tensor]) -> Iterator[None]:
    """Inside the block the model has another loss function."""
    own = model.loss_function
    model.loss_function = loss
    try:
        yield
    finally:
        model.loss_function = own


def recomputes(model: nn.Module) -> bool:
    """Whether gradient checkpointing computes activations of a model, or of a part of one, again on the way back.

    The property of models that says so has another name from 5.24 on; what it reads has not.
    """
    return any(getattr(part, _CHECKPOINTING, False) for part in model.modules())


@contextmanager
def computed_once(block: nn.Module) -> Iterator[None]:
    """Inside the block gradient checkpointing leaves a transformer block alone.

    In releases before 5.24 it goes around whatever `forward` the block has been given, and would compute again, on the
    way back, what needs no gradient.
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
    """Let `generate` allocate each layer's static cache at its first keys, and not all at once by the config."""
    model._get_static_cache_init_shape = _no_common_shape


def _no_common_shape() -> None:
    """Takes the place of transformers' own, whose None means this."""


# Trainers

_RESUMING = (
    "_get_train_sampler",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
)
"""Methods of `Trainer` that lightpeft extends so that a training goes on as if nothing had been."""


def check_resuming() -> None:
    """Refuse to go on from a checkpoint where `Trainer` no longer does that by the methods that are extended here.

    Raises:
        LightPeftError: naming what it lacks.
    """
    lacking = [name for name in _RESUMING if not hasattr(Trainer, name)]
    if lacking:
        raise unavailable("Going on from a checkpoint", f"transformers has no Trainer.{lacking[0]}")


@contextmanager
def cpu_without_number(args: TrainingArguments) -> Iterator[None]:
    """Inside the block the device of a process on a CPU is `cpu`.

    Each of several such processes has a number (`cpu:0`), and releases before 5.24 have PyTorch read the states of
    optimizers for that device, which it refuses.
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
"""What `TrainingArguments.device` returns."""


def used_columns(trainer: Any, rows: Dataset) -> Any:
    """The training rows as a trainer's collator gets them."""
    without_others = getattr(trainer, "_remove_unused_columns", None)
    if without_others is None:
        return trainer.get_train_dataloader().dataset
    return without_others(rows, description="training")


# Tokenizers


def with_backend(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerBase:
    """A copy of a fast tokenizer around another `tokenizers.Tokenizer`, with the same special tokens and settings."""
    copied = copy.deepcopy(tokenizer, {id(tokenizer.backend_tokenizer): backend})
    copied.init_kwargs.pop("added_tokens_decoder", None)  # by the ids of the other one
    copied.vocab_file = None  # which has the tokens of the other one
    return copied


# Experts


def gated(experts: Any, gate_up: Tensor) -> Tensor:
    """The hidden channels of experts, [..., neurons], from those of gate and up, [..., 2 * neurons], as they lie.

    Every class of experts that transformers can run in several ways has this step as a method of its own.
    """
    with needed_for("Cutting hidden channels of experts"):
        hidden: Tensor = experts._apply_gate(gate_up)
    return hidden
