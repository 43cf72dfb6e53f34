"""Uniform access to linear layers: their features, their weight as [out, in], and cutting of features.

The kinds are PyTorch's `Linear` (and subclasses that only compute differently) and transformers' `Conv1D`, which keeps
its weight transposed, each with its weight in memory or on disk, and layers of bitsandbytes in 4 or 8 bits. Each kind
is one class (`kinds.LinearKind`); bitsandbytes is not imported here.
"""
