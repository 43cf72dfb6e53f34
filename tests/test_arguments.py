"""Arguments of a module are changed by name, however it is called with them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightpeft.models.arguments import change_arguments


class Sum(nn.Module):
    """Adds up its arguments; one that is None counts as a hundred."""

    def forward(self, first: int, second: int | None = None, *rest: int, third: int = 0, **more: int) -> int:
        return first + (100 if second is None else second) + sum(rest) + third + sum(more.values())


@pytest.mark.parametrize(
    ("args", "kwargs", "result"),
    [
        ((1, 2), {}, 21),
        ((1,), {"second": 2}, 21),
        ((), {"first": 1, "second": 2}, 21),
        ((1, 2, 3, 4), {}, 28),
        ((1, 2), {"third": 5, "other": 6}, 1 + 20 + 50 + 60),
        ((1,), {}, 101),
        ((1, None), {}, 101),
        ((1,), {"second": None}, 101),
    ],
)
def test_by_position_or_by_keyword(args: tuple[Any, ...], kwargs: dict[str, Any], result: int) -> None:
    module = Sum()
    before = module(*args, **kwargs)
    handle = change_arguments(module, dict.fromkeys(("second", "third", "other"), lambda value: 10 * value))
    assert module(*args, **kwargs) == result
    handle.remove()
    assert module(*args, **kwargs) == before
