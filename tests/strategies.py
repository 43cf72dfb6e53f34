"""Hypothesis strategies of budgets."""

from __future__ import annotations

import math

from hypothesis import strategies as st

ratios = st.one_of(st.sampled_from([0.0, 1 / 3, 0.5, 0.75, 0.999]), st.floats(0, 0.999))


scopes = st.sampled_from(["layerwise", "global"])


def half_up(value: float) -> int:
    return math.floor(value + 0.5)
