"""adapter_config.json of a light adapter: PEFT's configuration under a type that PEFT does not know.

Over the dense base the adapter could give wrong results where its shapes happen to fit. So PEFT, and programs that load
folders with it, stop at the type, whose text is the error message that the user sees. PEFT's own keys are one level
deeper, so that programs which read them without checking the type stop as well.
"""

from __future__ import annotations

import json
from pathlib import Path

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

import lightpeft.peft_kinds.bottleneck  # noqa: F401 (so that PEFT knows the type)
from lightpeft.errors import require
from lightpeft.files import explain_content_errors, foreign, write_text

LIGHT_PEFT_TYPE = "LIGHT_PEFT: this adapter belongs to a pruned base; load it with lightpeft.load_light(folder)"
CONFIG_NAME = "adapter_config.json"
"""PEFT's name of the file."""
_PEFT_CONFIG = "peft_config"
"""Key of PEFT's configuration."""


def hide_config(folder: Path) -> None:
    """Rewrite the configuration that PEFT has written into a folder so that only `read_config` can read it."""
    config = foreign.read_config(folder / CONFIG_NAME)
    # transformers loads the base before PEFT reads the type
    shown = {"peft_type": LIGHT_PEFT_TYPE, "base_model_name_or_path": config["base_model_name_or_path"]}
    write_text(folder / CONFIG_NAME, json.dumps({**shown, _PEFT_CONFIG: config}, indent=2, sort_keys=True))


def read_config(folder: Path, light: bool = True) -> PeftConfig:
    """Read PEFT's configuration of the adapter in a folder.

    Args:
        light: True for a light adapter, whose configuration may be hidden; False for one of PEFT.

    Raises:
        LightPeftError: the file is missing or damaged, hidden although `light` is False, or has no known PEFT type.
    """
    data = foreign.read_config(folder / CONFIG_NAME)
    alone = f"{folder} holds a light adapter without its plan: lightpeft.json is missing; copy the whole folder"
    require(light or _PEFT_CONFIG not in data, alone)
    with explain_content_errors(folder / CONFIG_NAME):
        own = dict(data.get(_PEFT_CONFIG, data))
        return PEFT_TYPE_TO_CONFIG_MAPPING[own["peft_type"]].from_peft_type(**own)
