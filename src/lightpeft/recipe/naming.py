"""A model that is given to one of TRL's trainers by its name, loaded as that trainer would load it."""

from __future__ import annotations

import copy
import os
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from lightpeft.errors import require


def with_loaded_model(model: Any, trainer: type, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model itself, and a trainer's arguments with it; both as they are if the model is loaded already.

    PEFT modules go on the model before the trainer sees it, so that the name cannot be left to the trainer. TRL's
    trainers load by `args.model_init_kwargs`, in float32 unless these say otherwise, with the class that the checkpoint
    names; reward models get a head with one output.

    Args:
        model: the model, or its name on the hub or its folder.
        trainer: the class that will train it.
        options: arguments of the trainer, by name.

    Raises:
        LightPeftError: the trainer is not one that takes a name.
    """
    if not isinstance(model, (str, os.PathLike)):
        return model, options
    args: Any = options.get("args")
    by_name = (
        f"{trainer.__name__} loads no model by its name; give it loaded, by from_pretrained, in place of {model!r}"
    )
    require(hasattr(args, "model_init_kwargs"), by_name)
    args = copy.copy(args)
    settings = {"dtype": "float32", **(args.model_init_kwargs or {})}
    args.model_init_kwargs = None  # TRL warns of settings for a model that is there
    set_seed(args.seed)
    architecture: Any
    if any(kind.__name__ == "RewardTrainer" for kind in trainer.__mro__):
        architecture, settings = AutoModelForSequenceClassification, {"num_labels": 1, **settings}
    else:
        config = AutoConfig.from_pretrained(model, trust_remote_code=settings.get("trust_remote_code", False))
        architecture = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    return architecture.from_pretrained(model, **settings), {**options, "args": args}
