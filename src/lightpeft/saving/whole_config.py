"""config.json of a merged light model whose widths no config can say: the family's own, under a type of lightpeft's.

Read by its family's class, such weights are an error at best, and where a layer lost a sub-layer not even that: the
layer gets random ones. So transformers, and whatever asks it, stops at the type, which is the line that its user then
sees; the family's keys are one level deeper, for programs that do not ask for the type. Where lightpeft is imported,
transformers knows the type (`auto_classes`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from lightpeft.errors import require
from lightpeft.files import write_text
from lightpeft.files.foreign import check_config, parsing, read_config

CONFIG = "config.json"
LIGHT_TYPE = "LIGHT_PEFT: layers of unequal widths; load it with lightpeft.load_merged(folder)"
OWN = "pruned_config"
"""Key of what transformers wrote."""


def hide_config(folder: Path) -> None:
    """Make the configuration that transformers has written into a folder one that only `own_config` understands."""
    config = read_config(folder / CONFIG)
    write_text(folder / CONFIG, json.dumps({"model_type": LIGHT_TYPE, OWN: config}, indent=2) + "\n")


def read_own(folder: Path) -> dict[str, Any]:
    """What transformers wrote of a merged light model, hidden or, as of native ones, not.

    Raises:
        LightPeftError: the file is missing or damaged, or asks for code from the hub.
    """
    data = read_config(folder / CONFIG)
    own = data.get(OWN, data)
    require(isinstance(own, dict), f"{folder / CONFIG} does not hold the configuration of a model")
    check_config(own, f"model {folder}")
    return dict(own)


def own_config(folder: Path, architecture: type[PreTrainedModel]) -> PretrainedConfig:
    """The same as a configuration of transformers.

    Raises:
        LightPeftError: as `read_own`, or it is none of that architecture's.
    """
    with parsing(f"{folder / CONFIG} cannot be read"):
        config = architecture.config_class.from_dict(read_own(folder))
    config.name_or_path = str(folder)
    return config
