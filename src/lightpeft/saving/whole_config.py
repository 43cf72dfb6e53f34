"""config.json of a merged light model with unequal widths: the family's config, nested under a model type of lightpeft.

The family's own class would fail to load such weights or, if a layer has lost a sub-layer, initialize it randomly
without an error. So the model type is one that transformers refuses, and that tells the user what to do; the family's
keys are one level deeper, for programs that ignore the type. Once lightpeft is imported, transformers knows the type
(`auto_classes`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from lightpeft.errors import require
from lightpeft.files import write_text
from lightpeft.files.foreign import check_config, parsing, read_config

CONFIG_FILE = "config.json"
MERGED_TYPE = "LIGHT_PEFT: layers of unequal widths; load it with lightpeft.load_merged(folder)"
OWN = "pruned_config"
"""Key of the family's config in the file."""


def nest_config(folder: Path) -> None:
    """Nest the config.json that transformers has written under `OWN`, so that only `own_config` reads it."""
    config = read_config(folder / CONFIG_FILE)
    write_text(folder / CONFIG_FILE, json.dumps({"model_type": MERGED_TYPE, OWN: config}, indent=2) + "\n")


def read_own(folder: Path) -> dict[str, Any]:
    """Read the family's config of a merged light model, nested or (of native ones) not.

    Raises:
        LightPeftError: the file is missing or damaged, or refers to code on the hub.
    """
    data = read_config(folder / CONFIG_FILE)
    own = data.get(OWN, data)
    require(
        isinstance(own, dict), f"{folder / CONFIG_FILE} is damaged: {OWN} is not a model config; copy the folder again"
    )
    check_config(own, f"model {folder}")
    return dict(own)


def own_config(folder: Path, architecture: type[PreTrainedModel]) -> PretrainedConfig:
    """Read the family's config of a merged light model as a transformers configuration.

    Raises:
        LightPeftError: the file is missing or damaged, refers to code on the hub, or does not fit the architecture.
    """
    with parsing(f"{folder / CONFIG_FILE} cannot be read"):
        config = architecture.config_class.from_dict(read_own(folder))
    config.name_or_path = str(folder)
    return config
