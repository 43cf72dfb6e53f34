"""adapter_config.json of a light adapter: PEFT's configuration of it, under a type that PEFT does not know.

Over the dense base the adapter would answer wrongly where its shapes happen to fit. So PEFT, and whatever reads such
folders through it, stops at the type, which is the line that its user then sees; PEFT's own keys are one level deeper,
so that programs which read them without asking for the type stop as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

import lightpeft.peft_kinds.bottleneck  # noqa: F401 (so that PEFT knows the type)
from lightpeft.errors import require
from lightpeft.files import parse_json, read_text, understandable, write_text

LIGHT_TYPE = "LIGHT_PEFT: this adapter belongs to a pruned base; load it with lightpeft.load_light(folder)"
CONFIG_NAME = "adapter_config.json"
"""PEFT's own name."""
_OWN = "peft_config"
"""Key of what PEFT wrote."""


def hide_config(folder: Path) -> None:
    """Make the configuration that PEFT has written into a folder one that only `read_config` understands."""
    config = _read(folder)
    # transformers loads the base before it asks PEFT for the adapter
    shown = {"peft_type": LIGHT_TYPE, "base_model_name_or_path": config["base_model_name_or_path"]}
    write_text(folder / CONFIG_NAME, json.dumps({**shown, _OWN: config}, indent=2, sort_keys=True))


def read_config(folder: Path, light: bool = True) -> PeftConfig:
    """PEFT's configuration of the adapter in a folder.

    Args:
        light: the adapter is a light one, whose configuration may be hidden; else it is as PEFT writes it.

    Raises:
        LightPeftError: the file is missing or damaged, hidden, or no configuration of a PEFT method.
    """
    data = _read(folder)
    alone = f"{folder} has an adapter of a pruned base, but not the plan of that: lightpeft.json is missing"
    require(light or _OWN not in data, alone)
    with understandable(folder / CONFIG_NAME):
        own = dict(data.get(_OWN, data))
        return PEFT_TYPE_TO_CONFIG_MAPPING[own["peft_type"]].from_peft_type(**own)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    data = parse_json(read_text(file), file)
    require(isinstance(data, dict), f"{file} does not hold a JSON object")
    return data
