"""The configuration of a merged light model: that of its family, with the widths of every layer.

The folder is as lightpeft writes it: `config.json` hides the family's own settings under a type of lightpeft's, and
`merged.json` says how wide each layer is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file

LIGHT_TYPE = "LIGHT_PEFT: layers of unequal widths; load it with lightpeft.load_merged(folder)"
OWN, MERGED = "pruned_config", "merged.json"
ARCHITECTURE = "LightForCausalLM"
"""Name of the model class in vLLM."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
"""Family -> how it differs from Llama, as settings that its own configuration does not have."""
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Settings that `layer_widths` has one value a layer of, in this order."""


class MergedConfig(PretrainedConfig):
    """Reads such a folder; what it gives is a configuration of the family's own class."""

    model_type = LIGHT_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The family's configuration, with an architecture that this package has.

        Raises:
            ValueError: another family, or a model that does not write.
        """
        name = str(options.get("name_or_path", ""))
        own = config_dict.get(OWN)
        _require(isinstance(own, dict), f"{name} does not say under {OWN} what it was")
        assert own is not None
        family, architectures = own.get("model_type"), own.get("architectures") or ()
        served = f"models of {', '.join(FAMILIES)} are served by vLLM where layers are unequally wide"
        _require(family in FAMILIES, f"{name} is of the family {family}; {served}")
        writes = all(str(each).endswith("ForCausalLM") for each in architectures)
        _require(writes, f"{name} is a {', '.join(map(str, architectures))}; {served} if they write")
        _require(own.get("hidden_act") == "silu", f"{name} has FFNs with {own.get('hidden_act')}; {served} with silu")
        given = AutoConfig.for_model(family).from_dict(own, **options)
        config = given[0] if isinstance(given, tuple) else given
        config.layer_widths = []  # which `hooks` reads: nobody says here which revision of a name on the hub it is
        config.architectures = [ARCHITECTURE]
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return given


def read_widths(config: Any, name: str, revision: str | None = None) -> None:
    """Set `layer_widths` of a configuration to query heads, KV heads and neurons of every layer: [layers][3].

    Args:
        config: what `MergedConfig` gives; others stay as they are.
        name: of the folder, or on the hub.

    Raises:
        ValueError: `merged.json` says them of other layers, or not at all.
        OSError: it is not there.
    """
    if not hasattr(config, "layer_widths"):
        return
    described = json.loads(Path(str(cached_file(name, MERGED, revision=revision))).read_text(encoding="utf-8"))
    config.layer_widths = _widths(described, config.num_hidden_layers, name)


def _widths(described: Mapping[str, Any], layers: int, name: str) -> list[list[int]]:
    said = described.get("per_layer_config")
    complete = isinstance(said, dict) and set(said) == {str(layer) for layer in range(layers)}
    _require(complete, f"{name}/{MERGED} does not say how wide its {layers} layers are; export the model again")
    assert isinstance(said, dict)
    widths = [[said[str(layer)].get(setting) for setting in WIDTHS] for layer in range(layers)]
    for layer, (heads, kv_heads, neurons) in enumerate(widths):
        counts = all(type(count) is int and count >= 0 for count in (heads, kv_heads, neurons))
        fits = counts and (heads % kv_heads == 0 if kv_heads else heads == 0)
        _require(fits, f"{name}/{MERGED} gives layer {layer} impossible widths: {heads}, {kv_heads}, {neurons}")
    _require(any(heads for heads, *_ in widths), f"{name} has attention in no layer; vLLM needs it in one")
    return widths


def widths_of(config: Any, layer: int) -> dict[str, int]:
    """One layer's widths, by `WIDTHS`; those of all layers where a configuration says no others."""
    said = getattr(config, "layer_widths", None)
    values = said[layer] if said else [getattr(config, setting) for setting in WIDTHS]
    return dict(zip(WIDTHS, values, strict=True))


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
