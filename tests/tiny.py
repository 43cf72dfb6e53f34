"""Tiny random models of every family, batches for them, and random plans: the fixtures of the parity tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers as hf
from lanes import telling, thorough
from lights import light_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.compat.peft import names_of_experts
from lightpeft.errors import LightPeftError
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.kinds import projections
from lightpeft.peft_kinds.sites.bottleneck import BottleneckSite
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.plans import planning
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.planning import make_plan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.selection import Order
from lightpeft.plans.structure import BlockSpec
from lightpeft.profiling.live import device_of
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.masks import UnitMasks

VOCABULARY = 67
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = SIZES | {"intermediate_size": 48}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
Maker = Callable[..., PreTrainedModel]


def encoder(family: str, **settings: Any) -> Maker:
    """A constructor of text classifiers with two labels."""
    return maker(f"{family}Config", f"{family}ForSequenceClassification", TEXT | {"num_labels": 2} | settings)


def decoder(family: str, **settings: Any) -> Maker:
    """A constructor of causal language models with two KV heads."""
    return maker(f"{family}Config", f"{family}ForCausalLM", TEXT | TOKENS | {"num_key_value_heads": 2} | settings)


def maker(config: str, model: str, settings: dict[str, Any]) -> Maker:
    """A constructor of random models; what it is called with changes the settings."""
    return lambda **changes: getattr(hf, model)(getattr(hf, config)(**{**settings, **changes}))


def encoder_decoder(family: str, **settings: Any) -> Maker:
    """A constructor of BART-like models."""
    sides = {"attention_heads": 4, "ffn_dim": 48, "layers": 2}
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sides.items()}
    sizes |= {"vocab_size": VOCABULARY, "d_model": 32, "decoder_start_token_id": 2, **TOKENS}
    return maker(f"{family}Config", f"{family}ForConditionalGeneration", sizes | settings)


T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
IMAGES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 9, "max_target_positions": 32}
FALCON = {"ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64, **TOKENS}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "num_labels": 2}

MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
QWEN2_MOE = MOE | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}
ROUTED = {"moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2}
GROUPED_EXPERTS = ROUTED | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
GPT_OSS = {"intermediate_size": 24, "layer_types": WINDOWS["layer_types"], "sliding_window": 4}

ENCODERS: dict[str, Maker] = {
    "bert": encoder("Bert"),
    "roberta": encoder("Roberta"),
    "xlm-roberta": encoder("XLMRoberta"),
    "camembert": encoder("Camembert"),
    "electra": encoder("Electra", embedding_size=16),
    "esm": encoder("Esm", pad_token_id=0, mask_token_id=3, position_embedding_type="rotary"),
    "distilbert": maker("DistilBertConfig", "DistilBertForSequenceClassification", DISTILBERT),
    "deberta-v2": encoder("DebertaV2", norm_rel_ebd="layer_norm", **DEBERTA),
    "mpnet": encoder("MPNet"),
    "modernbert": encoder("ModernBert", cls_token_id=1, sep_token_id=2, **TOKENS),
    "vit": maker("ViTConfig", "ViTForImageClassification", IMAGES | {"intermediate_size": 48}),
    "dinov2": maker("Dinov2Config", "Dinov2ForImageClassification", IMAGES | {"mlp_ratio": 2}),
}
DECODERS: dict[str, Maker] = {
    "llama-mha": decoder("Llama", num_key_value_heads=4),
    "llama-gqa": decoder("Llama"),
    "llama-mqa": decoder("Llama", num_key_value_heads=1),
    "mistral": decoder("Mistral", sliding_window=4),
    "qwen2": decoder("Qwen2"),
    "qwen3": decoder("Qwen3", head_dim=8),
    "gemma": decoder("Gemma", head_dim=8),
    "gemma2": decoder("Gemma2", head_dim=8, query_pre_attn_scalar=8, **WINDOWS),
    "gemma3": maker(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        TEXT | TOKENS | WINDOWS | {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    "phi3": decoder("Phi3"),
    "granite": decoder("Granite"),
    "starcoder2": decoder("Starcoder2"),
    "olmo2": decoder("Olmo2"),
    "gpt2": maker("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt_neox": decoder("GPTNeoX"),
    "falcon": decoder("Falcon", **FALCON),
    "opt": decoder("OPT", **OPT),
    "mixtral": decoder("Mixtral", intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": decoder("Qwen2Moe", **QWEN2_MOE),
    "qwen3_moe": decoder("Qwen3Moe", head_dim=8, **MOE),
    "gpt_oss": decoder("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, **GPT_OSS),
    "olmoe": decoder("Olmoe", intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    "deepseek_v2": decoder(
        "DeepseekV2", q_lora_rank=None, **GROUPED_EXPERTS, **LATENT, topk_method="group_limited_greedy"
    ),
    "deepseek_v3": decoder("DeepseekV3", q_lora_rank=12, **GROUPED_EXPERTS, **LATENT),
    "glm4_moe": decoder("Glm4Moe", head_dim=8, **ROUTED),
    "glm4_moe_lite": decoder("Glm4MoeLite", q_lora_rank=12, **ROUTED, **LATENT),
}
ENCODER_DECODERS: dict[str, Maker] = {
    "mt5": maker("MT5Config", "MT5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}),
    "t5": maker("T5Config", "T5ForConditionalGeneration", T5),
    "bart": encoder_decoder("Bart"),
    "mbart": encoder_decoder("MBart"),
    "whisper": encoder_decoder("Whisper", **WHISPER),
}
MODELS = ENCODERS | DECODERS | ENCODER_DECODERS
"""One constructor a family, and Llama with all, some and one KV head. Adding a family is one more entry."""

VARIANTS: dict[str, Maker] = {
    "llama-classifier": maker(
        "LlamaConfig", "LlamaForSequenceClassification", TEXT | TOKENS | {"num_key_value_heads": 2, "num_labels": 2}
    ),
    "llama-bias": decoder("Llama", attention_bias=True, mlp_bias=True),
    "llama-head-dim": decoder("Llama", head_dim=12),
    "llama-tied": decoder("Llama", tie_word_embeddings=True),
    "opt-post-norm": decoder("OPT", do_layer_norm_before=False, **OPT),
    "opt-no-bias": decoder("OPT", enable_bias=False, **OPT),
    "falcon-mqa": decoder("Falcon", ffn_hidden_size=48, multi_query=True),
    "falcon-mha": decoder("Falcon", ffn_hidden_size=48, multi_query=False, bias=True),
    "t5-gated": maker("T5Config", "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}),
    "t5-untied": maker("T5Config", "T5ForConditionalGeneration", T5 | {"tie_word_embeddings": False, "num_layers": 2}),
    "dinov2-swiglu": maker(
        "Dinov2Config", "Dinov2ForImageClassification", IMAGES | {"mlp_ratio": 2, "use_swiglu_ffn": True}
    ),
    "gpt2-classifier": maker("GPT2Config", "GPT2ForSequenceClassification", GPT2 | {"num_labels": 2}),
}
"""Other heads and settings of the same families."""

ALL = MODELS | VARIANTS

LAYOUTS = ["bert", "mpnet", "modernbert", "vit", "llama-gqa", "olmo2", "phi3", "gpt2", "gpt_neox", "falcon", "opt"]
LAYOUTS += ["t5"]
"""One family of each kind of structure, for tests to which the rest would add nothing but time."""
IN_MAKE_TEST = {*LAYOUTS, "mixtral", "deepseek_v3"}
"""Those that `make test` takes of all families, with two mixtures of experts; `make test-all` takes all of them."""


def every_family(names: Iterable[str] = ALL, argument: str = "name") -> pytest.MarkDecorator:
    """Runs a test with the models of these names, of which `make test` takes one of each layout."""
    return telling(argument, names, IN_MAKE_TEST)


LATENT_HEADS = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
"""Those whose heads make keys and values of their own from one latent."""

GROUPED = [name for name in DECODERS if name not in ("llama-mha", "gpt2", "gpt_neox", "opt", *LATENT_HEADS)]
GROUPED += [name for name in VARIANTS if name.startswith("llama") or name == "falcon-mqa"]
"""Those with fewer KV heads than query heads, where the two head units differ."""

GENERATORS = [name for name in ALL if name not in ENCODERS and "classifier" not in name and "dinov2" not in name]
"""Those that generate tokens."""

USUAL: dict[str, Any] = {"heads": 0.5, "modules": 0.3}
DROPPED: dict[str, Any] = {
    "heads": 0.6,
    "scope": "global",
    "min_heads": 0,
    "neurons": 0.7,
    "min_neurons": 0,
    "modules": 0.3,
}
"""With `weak_sublayers`: the first layer loses its attention, the second its FFN."""


def crossed(names: Iterable[str], budgets: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    """Runs a test with every model under `DROPPED`, and with one of each layout under the other budgets.

    `DROPPED` cuts whole sub-layers and parts of them. What another budget asks of a layout it asks of all families that
    have it, so more would repeat and not test. `make test` takes one of each layout.
    """
    cases = [
        pytest.param(name, budget, id=f"{name}-{key}", marks=() if name in IN_MAKE_TEST else thorough)
        for key, budget in budgets.items()
        for name in names
        if budget is DROPPED or name in LAYOUTS
    ]
    return pytest.mark.parametrize(("name", "budget"), cases)


def make(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The tiny model `name` with random weights; biases, norms and corrections of routers included."""
    torch.manual_seed(seed)
    model = ALL[name](**changes)
    spread = 0.2 if name.startswith(("t5", "mt5")) else 0.3  # T5 does not scale its scores down
    corrections = [value for name, value in model.named_buffers() if name.endswith("correction_bias")]
    with torch.no_grad():
        for weight in (*model.parameters(), *corrections):
            weight.normal_(0.0, spread) if weight.dim() > 1 else weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def with_lora(model: PreTrainedModel, seed: int = 0, trained: bool = True, **changes: Any) -> PeftModel:
    """LoRA on all projections on which it can be; `trained` gives B values other than zero."""
    names, taken = projections(block_specs(model)), names_of_experts(model.config.model_type)
    targets = [name for name in names if name.rpartition(".")[2] not in taken]
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets, **changes}
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(task_type=task_type(model), **settings))
    if trained:
        for site in find_sites(peft_model, block_specs(model)):
            nn.init.normal_(site.up, std=0.1)
    return peft_model.eval()


def task_type(model: PreTrainedModel) -> str | None:
    """PEFT's task type of a model; None where PEFT has none that passes the model's own inputs on."""
    kinds = {"SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM", "LMHead": "CAUSAL_LM"}
    if model.main_input_name == "input_ids":
        kinds["ConditionalGeneration"] = "SEQ_2_SEQ_LM"
    return next((task for kind, task in kinds.items() if kind in type(model).__name__), None)


def batch(
    rows: int = 3, length: int = 9, padding: str = "right", seed: int = 1, labels: bool = False
) -> dict[str, Tensor]:
    """Random token ids with padding on one side, or none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        for row in range(1, rows):
            cut = slice(length - 2 * row, None) if padding == "right" else slice(0, 2 * row)
            mask[row, cut] = 0
    ids[mask == 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if labels:
        inputs["labels"] = torch.randint(0, 2, (rows,), generator=generator)
    return inputs


def inputs_for(
    model: nn.Module, padding: str = "right", generate: bool = False, labels: bool = False, seed: int = 1, **shape: int
) -> dict[str, Tensor]:
    """A batch that the model takes: token ids, images or sound; with decoder inputs unless it is for `generate`."""
    inner = transformers_model(model)
    inputs = batch(padding=padding, seed=seed, **shape)
    rows = len(inputs["input_ids"])
    generator = torch.Generator().manual_seed(seed + 1)
    if inner.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    if inner.main_input_name == "input_features":
        inputs = {"input_features": torch.randn(rows, 8, 18, generator=generator)}
    targets = torch.randint(3, VOCABULARY, (rows, 7), generator=generator)
    if inner.config.is_encoder_decoder and not generate and not labels:
        inputs["decoder_input_ids"] = targets
    if labels and "Classification" in type(inner).__name__:
        inputs["labels"] = torch.randint(0, 2, (rows,), generator=generator)
    elif labels and inner.config.is_encoder_decoder:
        inputs["labels"] = targets.masked_fill(torch.rand(targets.shape, generator=generator) < 0.2, -100)
    elif labels:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs


def without_dropout(model: nn.Module) -> Any:
    """Switch every dropout off, whether it is a module or a number that a module hands to a function."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "drop_prob" in vars(module):
            module.drop_prob = 0.0
    return model


def random_record(model: PeftModel, seed: int = 0, ties: bool = False, depth: float = 0.0) -> EstimationRecord:
    """A record of the model's structure with random scores under every criterion; `depth` is cut first."""
    estimator = Estimator(model, light_of(length=2, depth=depth))
    estimator.start(total_steps=None)
    estimator.stop()
    estimator.steps = 2
    record = estimator.record()
    generator = torch.Generator().manual_seed(seed)
    for key, value in record.scores.items():
        scores = torch.rand(value.shape, generator=generator)
        record.scores[key] = (scores * 3).floor() if ties else scores
    return record


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def weak_sublayers(record: EstimationRecord) -> EstimationRecord:
    """The record with scores of zero for the heads of the first layer and the neurons of the second."""
    weak = ("heads/mask/0", "neurons/mask/1")
    scores = {key: torch.zeros_like(value) if key in weak else value for key, value in record.scores.items()}
    return EstimationRecord(record.blocks, record.sites, scores, record.base_parameters, record.fingerprint)


def plan_for(model: PeftModel, seed: int = 3, **budget: Any) -> PrunePlan:
    """A plan from random scores; with the `DROPPED` budget, one that drops whole sub-layers. Cuts a depth at once."""
    record = random_record(model, seed, depth=budget.get("depth", 0.0))
    if "min_heads" in budget:
        record = weak_sublayers(record)
    return plan_of(record, **{**USUAL, **budget})


def plan_of(
    record: EstimationRecord, order: Order | None = None, min_heads: int = 1, min_neurons: int = 1, **light: Any
) -> PrunePlan:
    """A plan; a floor of 0 lets a layer lose the sub-layer, as plans may say that are made by hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "LEAST_HEADS", min_heads)
        patch.setattr(planning, "LEAST_NEURONS", min_neurons)
        return make_plan(record, light_of(**light), order)


def masked(model: PeftModel, plan: PrunePlan) -> PeftModel:
    """A dense copy that computes what the plan's pruned model must compute: masks of 0 and 1, pruned ranks zeroed."""
    reference = copy.deepcopy(model)
    zero_pruned_ranks(reference, plan)
    masks = UnitMasks(plan.specs, device_of(model))
    masks.set_plan(plan)
    masks.attach(reference)
    return reference


def zero_pruned_ranks(model: PeftModel, plan: PrunePlan) -> None:
    """Zero the columns of B of the ranks and modules that the plan removes."""
    with torch.no_grad():
        for site in find_sites(model, plan.specs):
            gone = sorted(set(range(site.spec.rank)) - set(plan.sites.get(site.spec.name, ())))
            site.up.view(len(site.up), site.spec.rank, -1)[:, gone] = 0.0  # of all experts, where it is on these
            if site.spec.name not in plan.sites and isinstance(site, BottleneckSite):
                site.branch.up.bias.zero_()


def kept_channels(spec: BlockSpec, kept: BlockPlan, slot: str) -> tuple[list[int] | None, list[int] | None]:
    """Output and input channels of a projection that stay (None: all), written out unit by unit."""

    def expand(heads: tuple[int, ...], slot: str) -> list[int]:
        size = spec.head_sizes.get(slot, spec.head_dim)
        return [head * size + channel for head in heads for channel in range(size)]

    outputs = {"q": expand(kept.heads, "q")} | {slot: expand(kept.kv_heads, slot) for slot in ("k", "v", "kv")}
    outputs |= {"ffn_in": list(kept.neurons), "ffn_gate": list(kept.neurons)}
    inputs = {"o": expand(kept.heads, "o"), "ffn_out": list(kept.neurons)}
    if slot == "ffn_gate_in":
        return [*kept.neurons, *(spec.neurons + neuron for neuron in kept.neurons)], None
    if slot == "qkv":
        return _kept_rows_of_qkv(spec, kept), None
    if slot in spec.wide_norms:
        return None, None
    return outputs.get(slot), inputs.get(slot)


def _kept_rows_of_qkv(spec: BlockSpec, kept: BlockPlan) -> list[int]:
    """Rows of a fused projection, by reshaping their numbers as the model reshapes its outputs."""
    rows, size = torch.arange((spec.heads + 2 * spec.kv_heads) * spec.head_dim), spec.head_dim
    groups = torch.tensor(kept.kv_heads, dtype=torch.long)
    if not spec.interleaved:
        q, k, v = rows.split([spec.heads * size, spec.kv_heads * size, spec.kv_heads * size])
        parts = [q.view(-1, size)[list(kept.heads)], k.view(-1, size)[groups], v.view(-1, size)[groups]]
        return torch.cat([part.flatten() for part in parts]).tolist()
    grouped = rows.view(spec.kv_heads, spec.heads_per_kv + 2, size)
    inside = [
        [head % spec.heads_per_kv for head in kept.heads if head // spec.heads_per_kv == g] for g in kept.kv_heads
    ]
    last = [spec.heads_per_kv, spec.heads_per_kv + 1]
    return [int(r) for g, q in zip(kept.kv_heads, inside, strict=True) for r in grouped[g, [*q, *last]].flatten()]


def select(weight: Tensor, outputs: list[int] | None, inputs: list[int] | None) -> Tensor:
    """Rows and columns of a [out, in] weight (None: all)."""
    rows = weight if outputs is None else weight[outputs]
    return rows if inputs is None else rows[:, inputs]


def refusal(action: Callable[[], Any]) -> str:
    """The one line that a refused action says."""
    with pytest.raises(LightPeftError) as error:
        action()
    text = str(error.value)
    assert text and "\n" not in text
    return text
