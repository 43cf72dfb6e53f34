"""Fine-tuning methods of a run: which weights train, which result is saved, which settings are ignored."""

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
    """Folder inside the run folder to which training saves its result."""
    last_file: str
    """File in that folder that is written last; a result without it is incomplete."""
    unused: Sequence[str]
    """Prefixes of the names of settings that the method ignores."""
    prunes: bool = False
    """True: the run estimates importance and prunes the model."""
    has_peft: bool = True
    """True: PEFT modules train; False: every weight trains."""
    by_habit: bool = False
    """True: PEFT modules sit on the customary projections of their kind; False: on all projections."""


METHODS: dict[str, Method] = {
    "light": Method("light", "adapter", "lightpeft.json", (), prunes=True),
    "plain": Method("plain", "adapter", "adapter_config.json", ("light.",), by_habit=True),
    "full": Method("full", "model", "config.json", ("light.", "peft"), has_peft=False),
}
"""Method by name."""
