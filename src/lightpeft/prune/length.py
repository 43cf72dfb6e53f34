"""Length of the estimation stage, and its minimum for reliable scores."""

from __future__ import annotations

from dataclasses import dataclass

from lightpeft.config import LightConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.training.schedule import Pace, scored_steps

AUTO_PART, LEAST_STEPS = 0.075, 32
"""`light.estimate.length: auto`: fraction of the run, and minimum number of steps, so that short runs are scored."""
ENOUGH_LEARNED = 0.1
"""Fraction by which an `auto` stage of a classifier has to lower the loss of the label frequencies; it is extended
until then."""
NOTHING_LEARNED = 0.02
"""Fraction below which nothing has been learned: with `light.train: all`, the base then joins PEFT in training."""
MOST_PART = 0.3
"""Maximum length of an `auto` stage as a fraction of the run; only `LEAST_EXAMPLES` may exceed it."""
LEAST_EXAMPLES = 256
"""Minimum number of examples, repeated ones included, that the stage's second half scores. A stage whose length is auto
or a fraction is extended for it, and fewer examples make no plan. A length in steps is not changed."""
MOST_OF_SHORT = 0.5
"""Maximum fraction of the run to score `LEAST_EXAMPLES`: a short run is better pruned in its middle than not at all."""


@dataclass(frozen=True)
class StageLength:
    """Length of an estimation stage."""

    steps: int
    """Optimizer steps; 0 if the settings remove nothing."""
    longest: int
    """Maximum number of steps if the model has not learned enough."""


def fit_stage(
    light: LightConfig, pace: Pace | None, steps: int, last: int = 0, longer: str = "training.epochs"
) -> StageLength:
    """Compute the stage of a run of `steps` steps, long enough for reliable scores.

    Args:
        pace: rows of a step and of an epoch; None: not known, so the number of examples is not checked.
        last: number of steps at the end of the run that train at full width.
        longer: name of the setting that makes training longer, for the error message.

    Raises:
        LightPeftError: estimation would leave no steps for training, or score too few examples.
    """
    if not light.uses_scores:
        return StageLength(0, 0)
    enough = 2 if pace is None else max(2, pace.enough_steps(LEAST_EXAMPLES, steps))
    stage = stage_of(light, steps, enough)
    besides = f" and {last} at full width leave" if last else " leaves"
    shorten = "shorten light.estimate.length" + (" or light.after.full_width_steps" if last else "")
    none_left = f"estimation of {stage.steps} steps{besides} none of the run's {steps} steps; {shorten}"
    require(stage.steps + last < steps, none_left)
    if pace is not None:
        check_examples(light, pace.least_examples(scored_steps(stage.steps)), longer)
    return stage


def remove_nothing_if_short(
    light: LightConfig, pace: Pace | None, steps: int, longer: str = "training.epochs"
) -> tuple[LightConfig, str | None]:
    """Replace an `auto` amount by settings that remove nothing if the run is too short for estimation.

    Returns:
        The settings, and the reason if they were replaced.
    """
    if not light.is_auto:
        return light, None
    try:
        fit_stage(light, pace, steps, longer=longer)
    except LightPeftError as error:
        return light.without_pruning(), str(error)
    return light, None


def stage_of(light: LightConfig, total_steps: int | None, enough: int = 2) -> StageLength:
    """Compute the stage from its settings.

    Args:
        total_steps: steps of the whole run, which a fractional length refers to; None: not known.
        enough: number of steps that score `LEAST_EXAMPLES`.

    Raises:
        LightPeftError: the length needs `total_steps`, or the stage would be longer than the run.
    """
    length = light.estimate.length
    if not light.uses_scores:
        return StageLength(0, 0)
    if isinstance(length, int):
        longer = f"estimation of {length} steps is longer than the run of {total_steps}; shorten it, or train longer"
        require(total_steps is None or length <= total_steps, longer)
        return StageLength(length, length)
    if total_steps is None:
        raise LightPeftError(f"light.estimate.length {length} needs the steps of the whole run; give total_steps")
    auto = not isinstance(length, float)
    part, least = (length, 2) if isinstance(length, float) else (AUTO_PART, LEAST_STEPS)
    most = _part_of_steps(
        max(MOST_PART, enough / total_steps if enough <= MOST_OF_SHORT * total_steps else 0.0), total_steps
    )
    steps = max(_part_of_steps(part, total_steps), min(max(least, enough), most))
    require(steps <= total_steps, f"estimation of {steps} steps is longer than the run of {total_steps}; train longer")
    room = min(most, total_steps - light.last_steps(total_steps) - 1)
    return StageLength(steps, max(steps, room) if auto else steps)


def check_examples(light: LightConfig, examples: int, longer: str = "training.epochs") -> None:
    """Check that estimation scores enough examples, unless its length was given in steps.

    Args:
        longer: name of the setting that makes training longer, for the error message.

    Raises:
        LightPeftError: there are fewer than `LEAST_EXAMPLES`.
    """
    line = few_examples(light, examples)
    asked = isinstance(light.estimate.length, int)
    require(line is None or asked, f"{line}, or train for longer ({longer})")


def few_examples(light: LightConfig, examples: int) -> str | None:
    """Return a warning about scores of too few examples, whose plans are little better than random; None: enough.

    On movie reviews plans from 128 or fewer cost 2 to 6 points (docs/explanation/results.md#short-runs-and-few-rows).
    """
    if examples >= LEAST_EXAMPLES or not light.uses_scores:
        return None
    few = f"estimation scores {examples} examples, too few for a reliable plan, which needs {LEAST_EXAMPLES}"
    return f"{few}; raise light.estimate.length"


def _part_of_steps(fraction: float, total_steps: int) -> int:
    return max(2, int(fraction * total_steps + 0.5))
