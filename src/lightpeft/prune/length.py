"""How long the estimation stage goes on, and what is too short to be trusted."""

from __future__ import annotations

from dataclasses import dataclass

from lightpeft.config import LightConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.training.schedule import Pace, scored_steps

PART, LEAST_STEPS = 0.075, 32
"""`light.estimate.length: auto`: part of the run, and steps at least, so that a short run has something to score."""
ENOUGH_LEARNED = 0.1
"""Part of the loss of an answer by the frequencies of labels that a stage of that length takes away, where the model
gives a row one of several classes; it goes on for it."""
MOST_PART = 0.3
"""Part of the run at which it stops at the latest; only `LEAST_EXAMPLES` may take more."""
LEAST_EXAMPLES = 256
"""Examples, repeated ones included, that the stage's second half scores at least: a stage whose length is auto or a
part of the run is longer for it, and from fewer no plan is made. A number of steps is taken at its word."""
MOST_OF_SHORT = 0.5
"""Part of a run that estimation may take to score these, over `MOST_PART`: a short run is better cut in its middle than
not at all."""


@dataclass(frozen=True)
class Stage:
    """How long an estimation takes."""

    steps: int
    """Optimizer steps; 0 where all stays."""
    longest: int
    """Steps that it may go on to where it has taught too little."""


def fitted(light: LightConfig, pace: Pace | None, steps: int, last: int = 0, longer: str = "training.epochs") -> Stage:
    """The stage of a run of so many steps, long enough to be trusted.

    Args:
        last: how many of these the light model leaves to the whole one.
        longer: the setting that makes training longer, as the caller knows it.

    Raises:
        LightPeftError: it would leave no steps to train with, or score too little to be trusted.
    """
    if not light.chooses:
        return Stage(0, 0)
    enough = 2 if pace is None else max(2, pace.enough_steps(LEAST_EXAMPLES, steps))
    stage = stage_of(light, steps, enough)
    besides = f" and {last} at full width leave" if last else " leaves"
    shorten = "shorten light.estimate.length" + (" or light.after.full_width_steps" if last else "")
    none_left = f"estimation of {stage.steps} steps{besides} none of the run's {steps}; {shorten}"
    require(stage.steps + last < steps, none_left)
    if pace is not None:
        check_examples(light, pace.least_examples(scored_steps(stage.steps)), longer)
    return stage


def able(
    light: LightConfig, pace: Pace | None, steps: int, longer: str = "training.epochs"
) -> tuple[LightConfig, str | None]:
    """The settings of a run that is long enough to estimate with them; of one that is not, and whose amount is to be
    found, settings that remove nothing, and why."""
    if not light.is_auto:
        return light, None
    try:
        fitted(light, pace, steps, longer=longer)
    except LightPeftError as error:
        return light.removing_nothing(), str(error)
    return light, None


def stage_of(light: LightConfig, total_steps: int | None, enough: int = 2) -> Stage:
    """The stage by its settings.

    Args:
        total_steps: of the whole run, of which a length may be a part.
        enough: steps that score `LEAST_EXAMPLES`.

    Raises:
        LightPeftError: the length needs `total_steps`, or the stage would be longer than the run.
    """
    length = light.estimate.length
    if not light.chooses:
        return Stage(0, 0)
    if isinstance(length, int):
        longer = f"estimation of {length} steps is longer than the run of {total_steps}; shorten it or train longer"
        require(total_steps is None or length <= total_steps, longer)
        return Stage(length, length)
    if total_steps is None:
        raise LightPeftError(f"light.estimate.length {length} needs the number of steps of the whole run")
    auto = not isinstance(length, float)
    part, least = (length, 2) if isinstance(length, float) else (PART, LEAST_STEPS)
    most = _part(max(MOST_PART, enough / total_steps if enough <= MOST_OF_SHORT * total_steps else 0.0), total_steps)
    steps = max(_part(part, total_steps), min(max(least, enough), most))
    require(steps <= total_steps, f"estimation of {steps} steps is longer than the run of {total_steps}; train longer")
    room = min(most, total_steps - light.last_steps(total_steps) - 1)
    return Stage(steps, max(steps, room) if auto else steps)


def check_examples(light: LightConfig, examples: int, longer: str = "training.epochs") -> None:
    """Refuse scores of next to nothing, unless somebody asked for just so many steps.

    Args:
        longer: the setting that makes training longer, as the caller knows it.

    Raises:
        LightPeftError: fewer than `LEAST_EXAMPLES`.
    """
    line = few_examples(light, examples)
    asked = isinstance(light.estimate.length, int)
    require(line is None or asked, f"{line}; raise light.estimate.length, or train for longer ({longer})")


def few_examples(light: LightConfig, examples: int) -> str | None:
    """What to say of a plan from so many examples, which is little better than chance if they are few; None: nothing.

    On movie reviews plans from 128 or fewer cost 2 to 6 points (docs/explanation/results.md#short-runs-and-few-rows).
    """
    if examples >= LEAST_EXAMPLES or not light.chooses:
        return None
    return f"estimation scores {examples} examples, and from fewer than {LEAST_EXAMPLES} no plan is to be trusted"


def _part(fraction: float, total_steps: int) -> int:
    return max(2, int(fraction * total_steps + 0.5))
