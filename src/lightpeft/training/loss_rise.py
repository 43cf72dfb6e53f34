"""Did the training loss rise during training? A model that unlearns its task often ends with a plausible score."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

WINDOW = 0.1
"""Part of all logged losses that one mean is over."""
FEWEST = 5
"""Fewest losses that a mean is over; training needs three times as many."""
LEAST_RISE = 0.05
"""Smallest rise that counts, relative to the lower loss."""
LEAST_ERRORS = 3.5
"""Smallest rise that counts, in its standard errors. MiniLM with LoRA on all projections has 6.8 and 3.7 in two runs
that unlearned movie reviews; 74 other runs have at most 1.9, and of 6,000 drawn with noise alone, 3 are above 3.5.
(configs/frontier/predictions.txt)"""


@dataclass(frozen=True)
class LossRise:
    """A rise of the training loss that is larger than its noise."""

    low: float
    """Lowest mean loss before the rise, in nats."""
    low_step: int
    """Step at which the loss was that low."""
    high: float
    """Highest mean loss after that, in nats."""
    high_step: int
    """Step at which the loss was that high."""

    def __str__(self) -> str:
        """Return the line of a warning."""
        path = f"from {self.low:.3f} at step {self.low_step} to {self.high:.3f} at step {self.high_step}"
        return f"the training loss rose {path}: the model unlearned a part of its task; {LOWER_RATE}"


LOWER_RATE = "use a lower learning rate (such as a third of this one)"
"""Remedy of a rise."""


def loss_rise(logs: Iterable[Mapping[str, Any]], begun: int = 0) -> LossRise | None:
    """Find the largest rise of the training loss; None: it did not rise, or not beyond its noise.

    Losses are averaged over windows of a tenth of training. The noise of a mean follows from the differences of
    successive losses.

    Args:
        logs: `state.log_history` of a trainer.
        begun: losses count after this step only, such as the step of the cut, which raises the loss itself.

    Example:
        ```python
        rise = loss_rise(trainer.state.log_history)
        ```
    """
    logged = [(entry["step"], entry["loss"]) for entry in logs if "loss" in entry and entry["step"] > begun]
    losses = [(step, loss) for step, loss in logged if math.isfinite(loss)]
    size = max(FEWEST, math.ceil(WINDOW * len(losses)))
    if len(losses) < 3 * size:
        return None
    values = [loss for _, loss in losses]
    means = [statistics.fmean(values[end - size : end]) for end in range(size, len(values) + 1)]
    steps = [step for step, _ in losses[size - 1 :]]
    low, best = 0, (0, 0)
    for place, mean in enumerate(means):
        low = place if mean < means[low] else low
        if place - low >= size and mean - means[low] > means[best[1]] - means[best[0]]:
            best = (low, place)
    first, last = best
    rise = means[last] - means[first]
    changes = [after - before for before, after in pairwise(values)]
    error = statistics.pstdev(changes) / math.sqrt(size)  # of the difference of two means
    if rise <= max(LEAST_RISE * means[first], LEAST_ERRORS * error):
        return None
    return LossRise(means[first], steps[first], means[last], steps[last])
