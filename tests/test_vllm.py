"""Merged light models in vLLM: it writes what transformers writes; what it does not serve is refused in one line.

vLLM lives in an environment of its own (`make test-vllm`); without one, what needs no vLLM is tested.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightpeft_vllm import configs
from lightpeft_vllm.configs import ARCHITECTURE, MergedConfig
from tiny import make, plan_for, with_lora
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from vllm_engine import PYTHON, Refused, Vllm
from workbench import edit, read

from lightpeft import LightModel, load_merged, save_merged
from lightpeft.plans.records import BlockPlan, PrunePlan
from lightpeft.prune.refit import Correction, apply_refit
from lightpeft.prune.surgery import apply_plan
from lightpeft.saved import merging, whole_config
from lightpeft.saved.light_adapter import as_light

SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
"""vLLM computes attention on CPUs for heads of 32 channels or more."""
ALL = range(8)
Layers = Sequence[tuple[Sequence[int], int]]
"""By layer: query heads that stay, and how many neurons."""
UNEVEN: Layers = [((0, 1, 2, 3, 6, 7), 40), ((0, 5), 24), (ALL, 48)]
"""3, 2 and 4 KV heads with 2, 1 and 2 query heads each."""
EVEN: Layers = [((0, 1, 6, 7), 24)] * 3
PROMPTS = [list(range(5, 17)), [200], [7 * number % 300 + 3 for number in range(150)]]
"""The last is longer than a block of vLLM's KV cache."""
TOKENS = 8


def light(name: str, layers: Layers = UNEVEN, **changes: Any) -> LightModel:
    """A light model with these heads and neurons; blocks beyond `layers` are left out."""
    sizes = {**SIZES, **({"num_key_value_heads": 8} if name == "llama-mha" else {})}
    model = with_lora(make(name, **sizes, max_position_embeddings=256, **changes))
    dense = plan_for(model, depth=1 - len(layers) / 3)
    blocks = [block(spec, *kept) for spec, kept in zip(dense.specs, layers, strict=False)]
    there = {
        name
        for spec, kept in zip(dense.specs, blocks, strict=False)
        for slot, name in spec.projections.items()
        if (kept.neurons if slot.startswith("ffn") else kept.heads)
    }
    sites = {site: ranks for site, ranks in dense.sites.items() if site in there}
    plan = replace(dense, blocks=tuple(blocks), sites=sites)
    apply_plan(model, plan)
    return as_light(model.eval(), plan)


def block(spec: Any, heads: Sequence[int], neurons: int) -> BlockPlan:
    kv_heads = sorted({head // spec.heads_per_kv for head in heads})
    return BlockPlan(tuple(heads), tuple(kv_heads), tuple(range(neurons)))


def refitted() -> LightModel:
    """With biases that the base does not have, one of them in place of attention."""
    model = light("llama-gqa", [(ALL, 40), ((), 24), ((0, 5), 48)])
    names = [model.light_plan.specs[layer].projections[slot] for layer, slot in ((1, "o"), (2, "o"), (0, "ffn_out"))]
    apply_refit(model, {name: Correction(torch.randn(256)) for name in names})
    return model


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
SERVED: dict[str, Callable[[], LightModel]] = {
    "llama-gqa": lambda: light("llama-gqa"),
    "llama-mha": lambda: light("llama-mha"),
    "llama-bias": lambda: light("llama-bias"),
    "llama-tied": lambda: light("llama-tied"),
    "llama-head-dim": lambda: light("llama-gqa", head_dim=64),
    "llama3": lambda: light("llama-gqa", rope_parameters=LLAMA3),
    "mistral": lambda: light("mistral", sliding_window=16),
    "qwen2": lambda: light("qwen2"),
    "qwen2-windows": lambda: light("qwen2", **WINDOWS),
    "qwen3": lambda: light("qwen3", head_dim=32),
    "qwen3-bias": lambda: light("qwen3", head_dim=32, attention_bias=True),
    "no attention": lambda: light("llama-gqa", [((), 40), ((0, 5), 24), ((), 48)]),
    "no attention, but its bias": lambda: light("llama-bias", [(ALL, 40), ((), 24), ((0, 5), 48)]),
    "no attention of qwen3": lambda: light("qwen3", [(ALL, 40), ((), 24), ((0, 5), 48)], head_dim=32),
    "no FFN": lambda: light("llama-bias", [(ALL, 0), ((0, 5), 24), ((), 0)]),
    "fewer blocks": lambda: light("llama-gqa", UNEVEN[:2]),
    "refit": refitted,
}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"vLLM lives in an environment of its own; set {PYTHON} to the Python there, or make test-vllm")
    with (tmp_path_factory.mktemp("vllm") / "log").open("w") as log, Vllm(python, log) as engine:
        yield engine


@torch.inference_mode()
def continued(model: PreTrainedModel, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    """The most probable tokens behind each prompt, in float32."""
    model = model.float().eval()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, **options
        )
        found.append(written[0, ids.shape[1] :].tolist())
    return found


# -- in vLLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_vllm_writes_what_transformers_writes(name: str, vllm: Vllm, tmp_path: Path) -> None:
    assert not save_merged(SERVED[name](), tmp_path / "merged")
    expected = continued(load_merged(tmp_path / "merged"))
    written = vllm.ask(tmp_path / "merged", PROMPTS, TOKENS, max_model_len=256, skip_tokenizer_init=True)
    assert written.tokens == expected
