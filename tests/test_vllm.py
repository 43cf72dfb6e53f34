"""Merged light models in vLLM: it writes what transformers writes; what it does not serve is refused in one line.

vLLM lives in an environment of its own (`make test-vllm`); without one, what needs no vLLM is tested.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightpeft_vllm import configs
from lightpeft_vllm.configs import ARCHITECTURE, MergedConfig
from lightpeft_vllm.hooks import Hooks, undivided
from tiny import make, plan_for, with_lora
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from vllm_engine import PYTHON, Refused, Vllm
from workbench import edit, read

from lightpeft import LightModel, cut_vocabulary, load_merged, save_merged
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving import whole, whole_config

SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
"""vLLM computes attention on CPUs for heads of 32 channels or more."""
ALL = range(8)
Layers = Sequence[tuple[Sequence[int], int]]
"""By layer: query heads that stay, and how many neurons."""
UNEVEN: Layers = [((0, 1, 2, 3, 6, 7), 40), ((0, 5), 24), (ALL, 48)]
"""3, 2 and 4 KV heads with 2, 1 and 2 query heads each."""
EVEN: Layers = [((0, 1, 6, 7), 24)] * 3
ALONE = {"max_model_len": 256, "skip_tokenizer_init": True}
"""A context that is enough, and no tokenizer."""
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
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, **options)
        found.append(written[0, ids.shape[1] :].tolist())
    return found


# -- in vLLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_vllm_writes_what_transformers_writes(name: str, vllm: Vllm, tmp_path: Path) -> None:
    assert not save_merged(SERVED[name](), tmp_path / "merged")
    expected = continued(load_merged(tmp_path / "merged"))
    assert vllm.ask(tmp_path / "merged", PROMPTS, TOKENS, **ALONE).tokens == expected


def test_equal_widths_that_vllm_itself_misreads(vllm: Vllm, tmp_path: Path) -> None:
    """vLLM's Qwen2 takes the width of a head from the number of heads, whatever the config says."""
    assert save_merged(light("qwen2", EVEN), tmp_path), "a checkpoint like any other"
    with pytest.raises(Refused):
        vllm.ask(tmp_path, PROMPTS, TOKENS, **ALONE)
    ours = {"hf_overrides": {"architectures": [ARCHITECTURE]}}
    assert vllm.ask(tmp_path, PROMPTS, TOKENS, **ALONE, **ours).tokens == continued(load_merged(tmp_path))


def test_two_devices(vllm: Vllm, tmp_path: Path) -> None:
    """Where the units of every layer divide; a sub-layer that is gone is nothing on both."""
    save_merged(light("llama-bias", [((0, 1, 4, 5), 40), (ALL, 24), ((), 0)]), tmp_path)
    written = vllm.ask(tmp_path, PROMPTS, TOKENS, **ALONE, tensor_parallel_size=2)
    assert written.tokens == continued(load_merged(tmp_path))


def test_compiled(vllm: Vllm, tmp_path: Path) -> None:
    save_merged(SERVED["no FFN"](), tmp_path)
    written = vllm.ask(tmp_path, PROMPTS, TOKENS, **ALONE, enforce_eager=False)
    assert written.tokens == continued(load_merged(tmp_path))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tensor_parallel_size": 2}, "layer 0 of this light model cannot be spread evenly over 2 devices"),
        ({"pipeline_parallel_size": 2}, "a light model is not spread over devices by layers"),
        ({"enable_lora": True}, "a light model takes no adapters in vLLM"),
    ],
)
def test_what_vllm_cannot_do(options: dict[str, Any], reason: str, vllm: Vllm, tmp_path: Path) -> None:
    save_merged(SERVED["llama-gqa"](), tmp_path)
    with pytest.raises(Refused, match=reason):
        vllm.ask(tmp_path, PROMPTS, TOKENS, **ALONE, **options)


def test_vllm_says_in_a_line_what_is_not_served(vllm: Vllm, tmp_path: Path) -> None:
    save_merged(light("gemma"), tmp_path)
    with pytest.raises(Refused, match="is of the family gemma; models of llama, mistral, qwen2, qwen3 are served"):
        vllm.ask(tmp_path, PROMPTS, TOKENS, **ALONE)


def test_a_real_model(vllm: Vllm, smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2 without 40% of its heads and neurons, by random scores, and without most of its tokens."""
    texts = ["Tracy didn't go home, so", "A cat is an animal that", "The"]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    whole = AutoTokenizer.from_pretrained(smollm2)
    tokenizer = cut_vocabulary(model, whole, whole(texts)["input_ids"])
    base = with_lora(model)
    plan = plan_for(base, heads=0.4, scope="global", neurons=0.4)
    assert len({(len(kept.heads), len(kept.kv_heads)) for kept in plan.blocks}) > 1
    apply_plan(base, plan)
    save_merged(as_light(base.eval(), plan), tmp_path, tokenizer)
    prompts = tokenizer(texts)["input_ids"]
    written = vllm.ask(tmp_path, prompts, TOKENS, max_model_len=128)
    assert written.tokens == continued(load_merged(tmp_path), prompts)


# -- without vLLM ------------------------------------------------------------------------------------------------------


def test_names_are_those_of_lightpeft() -> None:
    """The plug-in depends on nothing of lightpeft, and knows its files by these."""
    assert (configs.LIGHT_TYPE, configs.OWN) == (whole_config.MERGED_TYPE, whole_config.OWN)
    assert configs.MERGED == whole.MERGED


def read_config(folder: Path) -> Any:
    """As transformers' `AutoConfig`, and then vLLM, ask for it."""
    config = MergedConfig.from_dict(read(folder / "config.json"), name_or_path=str(folder))
    Hooks.verify_and_update_model_config(SimpleNamespace(hf_config=config, model=str(folder), revision=None))
    return config


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    save_merged(light("qwen2"), tmp_path / "merged")
    return tmp_path / "merged"


def test_a_folder_says_how_wide_its_layers_are(merged: Path) -> None:
    config = read_config(merged)
    assert type(config).__name__ == "Qwen2Config" and config.architectures == [ARCHITECTURE]
    assert config.layer_widths == [[6, 3, 40], [2, 2, 24], [8, 4, 48]]
    assert (config.num_attention_heads, config.head_dim, config.vocab_size) == (8, 32, 320)
    assert configs.widths_of(config, 1) == dict(zip(configs.WIDTHS, (2, 2, 24), strict=True))
    also, _ = MergedConfig.from_dict(read(merged / "config.json"), name_or_path=str(merged), return_unused_kwargs=True)
    assert also.architectures == [ARCHITECTURE]


def test_equal_widths_are_those_of_the_config() -> None:
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    configs.read_widths(config, "nowhere")
    assert list(configs.widths_of(config, 7).values()) == [4, 2, 48]


def test_layers_that_cannot_be_spread_evenly(merged: Path) -> None:
    config = read_config(merged)
    assert [undivided(config, parts) for parts in (1, 2, 3)] == [None, 0, 0]
    config.layer_widths = [[6, 2, 40], [2, 2, 24], [0, 0, 0]]
    assert [undivided(config, parts) for parts in (2, 4)] == [None, 0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tensor": 2}, "layer 0 of this light model cannot be spread evenly over 2 devices"),
        ({"pipeline": 2}, "set pipeline_parallel_size to 1"),
        ({"adapters": True}, "takes no adapters"),
    ],
)
def test_settings_that_do_not_go_with_it(settings: dict[str, Any], reason: str, merged: Path) -> None:
    def ask(tensor: int = 1, pipeline: int = 1, adapters: bool = False) -> None:
        parallel = SimpleNamespace(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
        model = SimpleNamespace(hf_config=read_config(merged))
        lora = object() if adapters else None
        Hooks.verify_and_update_config(SimpleNamespace(parallel_config=parallel, model_config=model, lora_config=lora))

    ask()
    with pytest.raises(ValueError, match=reason) as error:
        ask(**settings)
    assert "\n" not in str(error.value)


def first_layer(**widths: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["per_layer_config"]["0"].update(widths)


def without_attention(data: dict[str, Any]) -> None:
    for widths in data["per_layer_config"].values():
        widths.update(num_attention_heads=0, num_key_value_heads=0)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.json", lambda data: data.pop("pruned_config"), "does not say under pruned_config what it was"),
        ("config.json", lambda data: data["pruned_config"].update(model_type="gemma"), "is of the family gemma"),
        (
            "config.json",
            lambda data: data["pruned_config"].update(architectures=["Qwen2ForSequenceClassification"]),
            "is a Qwen2ForSequenceClassification; models of .* are served .* if they write",
        ),
        ("config.json", lambda data: data["pruned_config"].update(hidden_act="gelu"), "has FFNs with gelu"),
        ("merged.json", lambda data: data.pop("per_layer_config"), "how wide its 3 layers are; export the model again"),
        ("merged.json", lambda data: data["per_layer_config"].pop("2"), "how wide its 3 layers are"),
        ("merged.json", first_layer(num_attention_heads=5), "layer 0 impossible widths: 5, 3, 40"),
        ("merged.json", first_layer(num_key_value_heads=0), "layer 0 impossible widths: 6, 0, 40"),
        ("merged.json", first_layer(intermediate_size=-1), "layer 0 impossible widths: 6, 3, -1"),
        ("merged.json", first_layer(intermediate_size="40"), "layer 0 impossible widths"),
        ("merged.json", without_attention, "has attention in no layer"),
    ],
)
def test_what_is_no_model_for_vllm_is_refused(file: str, change: Any, reason: str, merged: Path) -> None:
    edit(merged / file, change)
    with pytest.raises(ValueError, match=reason) as error:
        read_config(merged)
    assert "\n" not in str(error.value)
