"""A model that is given by its name: the trainer loads it, and the recipe says where its PEFT modules sit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from transformers import Trainer

from lightpeft.compat.peft import peft_model_made_by
from lightpeft.config import Light
from lightpeft.errors import require
from lightpeft.recipe.refusals import refuse_parts
from lightpeft.recipe.settling import settings_of_trainer
from lightpeft.recipe.wrapping import with_peft


class NamedModel:
    """A model to be loaded by its name, as TRL's trainers do, which put PEFT modules on it at once.

    Args:
        name: what the trainer is given.
        peft_config: stays as it is.
        light: as in `LightTraining`.
        options: what the trainer is made with beside it.

    Attributes:
        light: the settings for the model, once it is loaded.
        peft_config: what the trainer is to be given.
    """

    def __init__(self, name: object, peft_config: PeftConfig, light: Light, options: Mapping[str, Any]) -> None:
        self.name, self.light, self.options = name, light, options
        self.peft_config = copy.deepcopy(peft_config)  # TRL's trainers add to it

    @contextmanager
    def loaded_by(self, trainer_class: type) -> Iterator[None]:
        """Inside the block a trainer is made, and puts the modules where the recipe wants them.

        Raises:
            LightPeftError: it loads no model, or puts modules on it in another way than by `get_peft_model`.
        """
        bases = [base for base in trainer_class.__mro__ if issubclass(base, Trainer) and "__init__" in vars(base)]
        loads = any("peft_config" in inspect.signature(vars(base)["__init__"]).parameters for base in bases)
        require(loads, f"{bases[0].__name__} loads no model by its name; give it loaded, in place of {self.name!r}")
        with peft_model_made_by(self._peft_model, self.peft_config) as made:
            yield
        require(
            len(made) == 1, f"{bases[0].__name__} puts PEFT modules on {self.name!r} in its own way; give it loaded"
        )

    def _peft_model(self, model: Any, config: PeftConfig, **options: Any) -> Any:
        refuse_parts(model)
        settings = settings_of_trainer(self.light, config, model, self.options)
        self.light = settings
        return with_peft(model, config, settings, **options)
