"""One view of linear layers: their width, their weight as [out, in], and how features are cut out of them.

PyTorch's `Linear` (and subclasses that only compute differently) and transformers' `Conv1D`, which keeps its weight
transposed, either with its weight in memory or on disk; layers of bitsandbytes in 4 or 8 bits. A kind of
layers is one class (`kinds.LinearKind`); bitsandbytes is not imported here.
"""

from lightpeft.models.linears.bitsandbytes import logical_numel, prepare_quantised
from lightpeft.models.linears.kinds import sliced
from lightpeft.models.linears.on_disk import LinearOnDisk, bring_in, can_be_left, is_on_disk, leave_on_disk, lying_over
from lightpeft.models.linears.registry import (
    dense_weight,
    describe,
    features,
    is_linear,
    slice_linear,
    stored_weight,
)

__all__ = [
    "LinearOnDisk",
    "bring_in",
    "can_be_left",
    "dense_weight",
    "describe",
    "features",
    "is_linear",
    "is_on_disk",
    "leave_on_disk",
    "logical_numel",
    "lying_over",
    "prepare_quantised",
    "slice_linear",
    "sliced",
    "stored_weight",
]
