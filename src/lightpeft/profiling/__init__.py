"""What a live model costs (parameters, FLOPs, seconds a step, peak memory), and comparisons on a noisy machine.

Nothing here knows about pruning. The functions take a bare transformers model, a PeftModel, or either after surgery,
and return plain numbers.
"""

from lightpeft.profiling.comparing import Spread, alternate, in_rounds, ratio, summarize
from lightpeft.profiling.flops import Flops, count_flops, kv_cache_bytes
from lightpeft.profiling.live import Batch
from lightpeft.profiling.memory import MemoryMethod, PeakMemory, weights_bytes
from lightpeft.profiling.sizes import ParameterCount, count_parameters, folder_bytes
from lightpeft.profiling.speed import WARMUP, OptimizerFactory, measure_inference, measure_training, throughput
from lightpeft.profiling.surroundings import hardware, versions

__all__ = [
    "WARMUP",
    "Batch",
    "Flops",
    "MemoryMethod",
    "OptimizerFactory",
    "ParameterCount",
    "PeakMemory",
    "Spread",
    "alternate",
    "count_flops",
    "count_parameters",
    "folder_bytes",
    "hardware",
    "in_rounds",
    "kv_cache_bytes",
    "measure_inference",
    "measure_training",
    "ratio",
    "summarize",
    "throughput",
    "versions",
    "weights_bytes",
]
