"""One view of linear layers: their width, their weight as [out, in], and how features are cut out of them.

PyTorch's `Linear` (and subclasses that only compute differently) and transformers' `Conv1D`, which keeps its weight
transposed, either with its weight in memory or on disk; layers of bitsandbytes in 4 or 8 bits. A kind of
layers is one class (`kinds.LinearKind`); bitsandbytes is not imported here.
"""
