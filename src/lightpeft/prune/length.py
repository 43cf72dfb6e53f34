"""How long the estimation stage goes on, and what is too short to be trusted."""

from __future__ import annotations

from dataclasses import replace

from lightpeft.config import LightConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.training.schedule import Pace, scored_steps

MOST_OF_SHORT = 0.5
"""Part of a run that estimation may take to score `least_examples`, over `max_fraction`: a short run is better cut in
its middle than not at all."""


def fitted(
    light: LightConfig, pace: Pace | None, steps: int, last: int = 0, longer: str = "training.epochs"
) -> LightConfig:
    """The settings with an estimation that is long enough for a run of so many steps.

    Args:
        last: how many of these the light model leaves to the whole one.
        longer: the setting that makes training longer, as the caller knows it.

    Raises:
        LightPeftError: it would leave no steps to train with, or score too little to be trusted.
    """
    if not light.chooses:
        return light
    if pace is not None:
        enough = max(2, pace.enough_steps(light.least_examples, steps))
        part = max(light.max_fraction, enough / steps if enough <= MOST_OF_SHORT * steps else 0.0)
        light = replace(light, least_steps=max(light.least_steps, enough), max_fraction=part)
    length = stage_length(light, steps)
    besides = f" and {last} at full width leave" if last else " leaves"
    shorten = "shorten light.length" + (" or light.full_width_steps" if last else "")
    require(length + last < steps, f"estimation of {length} steps{besides} none of the run's {steps}; {shorten}")
    if pace is not None:
        check_examples(light, pace.least_examples(scored_steps(length)), longer)
    return light


def stage_length(config: LightConfig, total_steps: int | None) -> int:
    """Optimizer steps of the stage; `least_learned` may end it later (see `longest_stage`), and where all stays there
    are none.

    Raises:
        LightPeftError: the length needs `total_steps`, or the stage would be longer than the run.
    """
    if not config.chooses:
        return 0
    if isinstance(config.length, int):
        steps = config.length
    else:
        if total_steps is None:
            raise LightPeftError(f"length {config.length} needs the number of steps of the whole run")
        most = _part(config.max_fraction, total_steps)
        steps = max(_part(config.length, total_steps), min(config.least_steps, most))
    if total_steps is not None:
        require(
            steps <= total_steps,
            f"estimation of {steps} steps is longer than the run of {total_steps}; shorten it or train longer",
        )
    return steps


def longest_stage(config: LightConfig, total_steps: int | None) -> int:
    """Optimizer steps that the stage may go on to where it has taught too little; `stage_length` where it may not.

    Raises:
        LightPeftError: as `stage_length` does.
    """
    length = stage_length(config, total_steps)
    if not config.least_learned or isinstance(config.length, int) or total_steps is None:
        return length
    room = total_steps - config.last_steps(total_steps) - 1
    return max(length, min(_part(config.max_fraction, total_steps), room))


def check_examples(config: LightConfig, examples: int, longer: str = "training.epochs") -> None:
    """Refuse scores of next to nothing: a plan of those is little better than chance, if it chooses anything.

    Args:
        longer: the setting that makes training longer, as the caller knows it.

    Raises:
        LightPeftError: fewer than `least_examples`.
    """
    require(
        examples >= config.least_examples or not config.chooses,
        f"estimation scores {examples} examples, and from fewer than {config.least_examples} (light.least_examples) no "
        f"plan is to be trusted; raise light.length, or train for longer ({longer})",
    )


def _part(fraction: float, total_steps: int) -> int:
    return max(2, int(fraction * total_steps + 0.5))
