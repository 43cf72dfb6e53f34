"""The arguments of any trainer, as a training that cuts its model can take them."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any

from lightpeft.errors import require
from lightpeft.training.arguments import refuse_deepspeed

_log = logging.getLogger(__name__)


def trainer_kwargs(
    init: Callable[..., None], args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a trainer is to be made with behind its model; by names, as far as arguments have any.

    Args:
        init: of the trainer.
        args, options: that were given.

    Raises:
        LightPeftError: an argument that cannot follow the cut.
    """
    named, args = _by_name(init, args)
    options = dict(**named, **options)
    refuse_deepspeed(getattr(options.get("args"), "deepspeed", None))
    given_optimizers = options.get("optimizers") or (None, None)
    require(
        given_optimizers == (None, None),
        "an optimizer or a scheduler made before cannot follow the cut; leave optimizers out and say which one by "
        "args.optim and args.lr_scheduler_type, or by optimizer_cls_and_kwargs",
    )
    require(options.get("model_init") is None, "model_init makes a dense model anew for each trial; give the model")
    return args, options


def _by_name(init: Callable[..., None], args: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """A trainer's positional arguments behind its model: by their names, and those that have none."""
    _, *behind = inspect.signature(init).parameters.values()
    names = [each.name for each in behind if each.kind is each.POSITIONAL_OR_KEYWORD]
    return dict(zip(names, args, strict=False)), args[len(names) :]


def with_dense_reference(options: dict[str, Any]) -> dict[str, Any]:
    """The options, by which a preference trainer without a reference model asks the dense model before training."""
    settings: Any = options.get("args")
    if getattr(settings, "precompute_ref_log_probs", True) or options.get("ref_model") is not None:
        return options
    _log.info("the reference's log-probabilities are computed once, before training, by the dense model")
    settings = copy.copy(settings)
    settings.precompute_ref_log_probs = True
    return {**options, "args": settings}
