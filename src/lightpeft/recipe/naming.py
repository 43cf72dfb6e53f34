"""Models that are passed to a TRL trainer by name, loaded as that trainer would load them."""

from __future__ import annotations

import copy
import os
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from lightpeft.errors import require


def with_loaded_model(model: Any, trainer: type, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load a model that is given by name, and return it with the trainer's arguments; a loaded model is returned as is.

    PEFT modules go on the model before the trainer sees it, so lightpeft loads it. TRL's trainers load with
    `args.model_init_kwargs`, in float32 unless these say otherwise, by the class that the checkpoint names; reward
    models get a head with one output.

    Args:
        model: a model, or its name on the hub or its folder.
        trainer: the class that will train it.
        options: keyword arguments of the trainer.

    Raises:
        LightPeftError: the trainer does not take a model by name.
    """
    if not isinstance(model, (str, os.PathLike)):
        return model, options
    args: Any = options.get("args")
    by_name = (
        f"{trainer.__name__} does not load a model by name; load {model!r} with from_pretrained and pass the model"
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
