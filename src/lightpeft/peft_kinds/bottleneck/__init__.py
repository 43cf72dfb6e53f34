"""Bottleneck adapters as a PEFT method: importing this package registers `peft_type` "BOTTLENECK" with PEFT.

    from peft import get_peft_model
    from lightpeft import BottleneckConfig

    model = get_peft_model(base, BottleneckConfig(placement="houlsby", size=64, task_type="SEQ_CLS"))

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP" (serial adapters after attention and FFN);
Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning" (after the FFN alone).
"""

from lightpeft.peft_kinds.bottleneck.config import BottleneckConfig
from lightpeft.peft_kinds.bottleneck.layer import Bottleneck, BottleneckLayer
from lightpeft.peft_kinds.bottleneck.model import BottleneckModel, placed_modules
from lightpeft.peft_kinds.bottleneck.registration import register

register(BottleneckConfig, BottleneckModel)

__all__ = ["Bottleneck", "BottleneckConfig", "BottleneckLayer", "BottleneckModel", "placed_modules"]
