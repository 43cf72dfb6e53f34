"""The ways in which a run can fine-tune: what each trains, leaves behind, and has no use for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MethodName = Literal["light", "plain", "full"]


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning."""

    name: MethodName
    result: Literal["adapter", "model"]
    """Folder of a run that training leaves its result in."""
    last_file: str
    """The file there that is written last."""
    unused: Sequence[str]
    """Beginnings of the names of settings that it has no use for."""
    prunes: bool = False
    """Whether the model is estimated and cut on the way."""
    has_peft: bool = True
    """Whether PEFT modules train, and not every weight."""
    by_habit: bool = False
    """Whether PEFT modules sit where their kind is used by habit, and not wherever they may be of use."""


METHODS: dict[str, Method] = {
    "light": Method("light", "adapter", "lightpeft.json", (), prunes=True),
    "plain": Method("plain", "adapter", "adapter_config.json", ("light.",), by_habit=True),
    "full": Method("full", "model", "config.json", ("light.", "peft"), has_peft=False),
}
"""Method by name."""
