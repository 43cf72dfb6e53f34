"""Arguments of any trainer, checked and changed so that the trainer can cut its model."""

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
    """Return a trainer's arguments after `model`: positional arguments that have a name are passed by it.

    Args:
        init: the trainer's `__init__`.
        args, options: positional and keyword arguments that the caller passed after the model.

    Raises:
        LightPeftError: an argument that does not survive the cut.
    """
    named, args = _split_by_name(init, args)
    options = dict(**named, **options)
    refuse_deepspeed(getattr(options.get("args"), "deepspeed", None))
    given_optimizers = options.get("optimizers") or (None, None)
    require(
        given_optimizers == (None, None),
        "optimizers: an optimizer or scheduler made before training does not survive the cut; leave it out and set "
        "args.optim and args.lr_scheduler_type, or optimizer_cls_and_kwargs",
    )
    require(options.get("model_init") is None, "model_init makes a new dense model for each trial; pass model instead")
    return args, options


def _split_by_name(init: Callable[..., None], args: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Split positional arguments after the model into those with a parameter name and those without (`*args`)."""
    _, *behind = inspect.signature(init).parameters.values()
    names = [each.name for each in behind if each.kind is each.POSITIONAL_OR_KEYWORD]
    return dict(zip(names, args, strict=False)), args[len(names) :]


def with_dense_reference(options: dict[str, Any]) -> dict[str, Any]:
    """Let a preference trainer without a reference model compute reference log-probabilities before the cut.

    Returns:
        The options, with `precompute_ref_log_probs` set in a copy of `args` where that is needed.
    """
    settings: Any = options.get("args")
    if getattr(settings, "precompute_ref_log_probs", True) or options.get("ref_model") is not None:
        return options
    _log.info("precompute_ref_log_probs: the dense model computes the reference log-probabilities once, before the cut")
    settings = copy.copy(settings)
    settings.precompute_ref_log_probs = True
    return {**options, "args": settings}
