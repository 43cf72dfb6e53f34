"""Support for merged light models of unequal widths in transformers' auto classes and pipelines.

The model type in such a model's config.json is registered by `AutoConfig.register` and `AutoModel.register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lightpeft.compat.transformers import class_names
from lightpeft.errors import LightPeftError, require
from lightpeft.machine import accelerator
from lightpeft.saving.whole_config import MERGED_TYPE, OWN

_TABLE_NAMES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
"""Auto class -> name of transformers' table of the classes that it returns."""
_SUPPORTED = {"dtype", "attn_implementation", "revision", "token"}
"""Options of `from_pretrained` that `load_merged` has, too."""
_WITHOUT_EFFECT = {"adapter_kwargs", "code_revision", "trust_remote_code", "local_files_only", "low_cpu_mem_usage"}
_WITHOUT_EFFECT |= {"use_safetensors", "weights_only", "_from_auto"}
"""Ignored options: about code, adapters and pickled weights, which a merged model never has, or always in effect."""


class LightModelConfig(PretrainedConfig):
    """Configuration that transformers reads from a merged light model; the loaded model has that of its family."""

    model_type = MERGED_TYPE


_AS_SAVED = LightModelConfig().to_diff_dict().keys() | {OWN, "name_or_path"}
"""Keys of an unchanged `LightModelConfig`."""


def register_auto_classes(load: Callable[..., PreTrainedModel]) -> None:
    """Make `AutoModelFor...from_pretrained(folder)` call `load(folder)` for merged light models."""
    AutoConfig.register(MERGED_TYPE, LightModelConfig)
    for name, table in _TABLE_NAMES.items():
        getattr(transformers, name).register(LightModelConfig, _make_reader(name, table, load))


def _make_reader(auto: str, table: str, load: Callable[..., PreTrainedModel]) -> type:
    """Return a stand-in for a model class that one auto class calls `from_pretrained` of.

    Args:
        auto: name of the auto class.
        table: name of transformers' table of its classes.
        load: loads a merged light model.
    """

    class Reader:
        config_class = LightModelConfig

        @classmethod
        def from_pretrained(cls, folder: Any, *, config: Any = None, **options: Any) -> PreTrainedModel:
            changed = {} if config is None else config.to_diff_dict().keys() - _AS_SAVED
            model = load(folder, **_convert_options({**dict.fromkeys(changed, True), **options}, str(folder)))
            kind = type(model).__name__
            loaded = class_names(table, "A merged model in transformers' auto classes")
            require(kind in loaded, f"{folder} is a {kind}, which {auto} does not load; use lightpeft.load_merged")
            return model

    return Reader


def _convert_options(given: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Convert options of `from_pretrained` to those of `load_merged`.

    Raises:
        LightPeftError: an option is not supported.
    """
    options = {name: value for name, value in given.items() if name in _SUPPORTED and value is not None}
    rest = {
        name for name, value in given.items() if value and name not in {*_SUPPORTED, *_WITHOUT_EFFECT, "device_map"}
    }
    refused = f"{folder} is a merged light model, which does not support"
    require(not rest, f"{refused} {', '.join(sorted(rest))}; leave that out")
    where = given.get("device_map")
    if isinstance(where, Mapping):
        if set(where) != {""}:
            raise LightPeftError(f"{refused} a device_map with several devices; use one device")
        where = where[""]
    return {**options, **({} if where is None else {"device": accelerator() if where == "auto" else where})}
