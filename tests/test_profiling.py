"""Counts against hand counts; measurements for what they do to the model, never for how fast they are."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lightpeft import profiling
from lightpeft.compat.transformers import attention_of
from lightpeft.errors import LightPeftError
from lightpeft.models.families.family_table import block_specs
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling import other_work
from lightpeft.profiling.comparing import Spread, alternate, ratio, summarize
from lightpeft.profiling.flops import Flops, count_flops, kv_cache_bytes
from lightpeft.profiling.memory import PeakMemory
from lightpeft.profiling.other_work import OtherWork
from lightpeft.profiling.sizes import count_parameters
from lightpeft.profiling.speed import measure_inference, measure_training, time_steps
from lightpeft.prune.surgery import apply_plan

HIDDEN, FFN, LAYERS, VOCABULARY, LABELS = 16, 32, 2, 50, 3
BATCH, LENGTH, RANK = 2, 8, 4
CLASSIFIER = HIDDEN * LABELS + LABELS


def bert(**changes: object) -> BertForSequenceClassification:
    settings = dict(hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=4)
    settings |= dict(vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=LABELS)
    return BertForSequenceClassification(BertConfig(**{**settings, **changes}))


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    settings = dict(hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=4)
    settings |= dict(num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=tied)
    return LlamaForCausalLM(LlamaConfig(**settings))


def with_lora(model: nn.Module, task: TaskType, targets: list[str]) -> PeftModel:
    config = LoraConfig(task_type=task, r=RANK, lora_dropout=0.1, target_modules=targets)
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def bert_lora() -> PeftModel:
    return with_lora(bert(), TaskType.SEQ_CLS, ["query", "value"])


def bert_batch() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(BATCH, dtype=torch.long)}


def llama_batch() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Regression(nn.Module):
    """Any stack with a loss, in the form of a transformers model's output."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        y = self.layers(x)
        return SimpleNamespace(logits=y, loss=None if labels is None else ((y - labels) ** 2).mean())


# Parameters


def bert_by_hand() -> int:
    linear = 4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN * FFN + FFN + HIDDEN
    layer = linear + 2 * 2 * HIDDEN
    embeddings = (VOCABULARY + 32 + 2) * HIDDEN + 2 * HIDDEN
    pooler = HIDDEN * HIDDEN + HIDDEN
    return embeddings + LAYERS * layer + pooler + CLASSIFIER


def test_bare_model_is_all_base() -> None:
    count = count_parameters(bert())
    assert (count.base, count.peft, count.head) == (bert_by_hand(), 0, 0)
    assert count.total == count.trainable == count.base


def test_lora_and_head_beside_the_base() -> None:
    count = count_parameters(bert_lora())
    lora = LAYERS * 2 * (HIDDEN * RANK + RANK * HIDDEN)
    assert count.base == bert_by_hand(), "the head is in the base once, not again as PEFT's copy"
    assert (count.peft, count.head, count.trainable) == (lora, CLASSIFIER, lora + CLASSIFIER)
    assert count.total == bert_by_hand() + lora


def test_tied_weights_count_once() -> None:
    untied, tied = count_parameters(llama()), count_parameters(llama(tied=True))
    assert untied.base - tied.base == VOCABULARY * HIDDEN
    peft_model = with_lora(llama(tied=True), TaskType.CAUSAL_LM, ["q_proj", "down_proj"])
    assert count_parameters(peft_model).base == tied.base


def test_sliced_layer_and_smaller_rank_are_seen() -> None:
    model = bert_lora()
    before = count_parameters(model)
    layer = model.get_base_model().bert.encoder.layer[0]
    layer.intermediate.dense, layer.output.dense = nn.Linear(HIDDEN, FFN - 5), nn.Linear(FFN - 5, HIDDEN)
    query = layer.attention.self.query
    query.lora_A["default"], query.lora_B["default"] = nn.Linear(HIDDEN, 1, False), nn.Linear(1, HIDDEN, False)
    layer.attention.self.value = layer.attention.self.value.get_base_layer()
    after = count_parameters(model)
    assert before.base - after.base == 5 * (2 * HIDDEN + 1)
    assert before.peft - after.peft == 2 * HIDDEN * (RANK - 1) + 2 * HIDDEN * RANK


# FLOPs


def test_one_linear_by_hand() -> None:
    product = 2 * 5 * 3 * 7
    batch = {"x": torch.randn(5, 3), "labels": torch.randn(5, 7)}
    # Backward needs the gradient of the weight; that of the input is nobody's.
    assert count_flops(Regression(nn.Linear(3, 7)), batch) == Flops(forward=product, training=2 * product)


def test_frozen_weight_costs_no_weight_gradient() -> None:
    first, second = nn.Linear(3, 7), nn.Linear(7, 4)
    second.requires_grad_(False)
    batch = {"x": torch.randn(5, 3), "labels": torch.randn(5, 4)}
    flops = count_flops(Regression(first, second), batch)
    assert flops.forward == 2 * 5 * (3 * 7 + 7 * 4)
    assert flops.backward == flops.forward, "the weight gradient of the first layer, the input gradient of the second"


def bert_forward_by_hand() -> int:
    tokens = BATCH * LENGTH
    linear = 2 * tokens * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * FFN)
    attention = 2 * (2 * BATCH * LENGTH * LENGTH * HIDDEN)
    return LAYERS * (linear + attention) + 2 * BATCH * (HIDDEN * HIDDEN + HIDDEN * LABELS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_products_count_under_every_backend(attention: str) -> None:
    assert count_flops(bert(attn_implementation=attention), bert_batch()).forward == bert_forward_by_hand()


def test_grouped_queries_count_as_full_heads() -> None:
    tokens, kv = BATCH * LENGTH, HIDDEN // 2
    linear = 2 * tokens * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * kv + 3 * HIDDEN * FFN)
    attention = 2 * (2 * BATCH * LENGTH * LENGTH * HIDDEN)
    head = 2 * tokens * HIDDEN * VOCABULARY
    # Room for the rotary embedding, whose tiny product some releases do as a matrix product.
    expected = pytest.approx(LAYERS * (linear + attention) + head, rel=1e-3)
    assert count_flops(llama(), llama_batch()).forward == expected


def test_other_attention_backends_are_switched_and_set_back() -> None:
    model = llama()
    expected = count_flops(model, llama_batch())
    model.set_attn_implementation("flex_attention")
    assert count_flops(model, llama_batch()) == expected
    assert attention_of(model.config) == "flex_attention"


def test_counting_leaves_the_model_as_it_was() -> None:
    model, batch = bert_lora(), bert_batch()
    model.eval()
    model.base_model.train()
    modes = [module.training for module in model.modules()]
    model(**batch).loss.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    count_flops(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient is None or torch.equal(parameter.grad, gradient)


def test_the_kv_cache_shrinks_with_its_heads() -> None:
    """Two layers, keys and values, two KV heads of four channels in float32; then one of the heads goes."""
    model = llama()
    assert kv_cache_bytes(model, llama_batch()) == 2 * 2 * 2 * 4 * 4
    specs = tuple(block_specs(model))
    whole = [BlockPlan(tuple(range(4)), (0, 1), tuple(range(FFN))) for _ in specs]
    kept = (whole[0], BlockPlan((2, 3), (1,), tuple(range(FFN))))
    apply_plan(model, PrunePlan(specs, kept, {}, (), 1000, "f", {}))
    assert kv_cache_bytes(model, llama_batch()) == 2 * (2 + 1) * 4 * 4
    assert kv_cache_bytes(bert(), bert_batch()) is None


# Memory

MEGABYTE = 2**20


def allocate_200_megabytes() -> None:
    block = torch.ones(200 * MEGABYTE // 4)
    assert block[-1] == 1


def test_peak_memory_sees_what_is_gone_again() -> None:
    with PeakMemory(nn.Linear(2, 2)) as memory:
        allocate_200_megabytes()
    assert memory.method in ("VmHWM", "sampling")
    assert 150 * MEGABYTE < memory.bytes < 400 * MEGABYTE
    assert memory.peak == memory.before + memory.bytes


def test_weights_of_mapped_files_are_there_before(tmp_path: Path) -> None:
    """As `from_pretrained` loads them, they come in when they are read: that is not what a step takes."""
    save_file({"weight": torch.ones(4096, 4096)}, tmp_path / "model.safetensors")
    linear = nn.Linear(4096, 4096, bias=False, device="meta")
    linear.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    with PeakMemory(linear) as memory:
        assert linear.weight.max() == 1
    assert memory.bytes < 16 * MEGABYTE


def test_peak_memory_samples_where_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "clear_refs"
    monkeypatch.setattr(profiling.memory, "_CLEAR_REFS", missing)
    with PeakMemory(nn.Linear(2, 2)) as memory:
        block = torch.ones(200 * MEGABYTE // 4)
    assert block.numel()
    assert memory.method == "sampling"
    assert memory.bytes > 150 * MEGABYTE
    assert not missing.exists()


# Time


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_training_steps_train_the_peft_weights_only(autocast: torch.dtype | None) -> None:
    model = bert_lora().eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    seconds = measure_training(model, [bert_batch()], torch.optim.SGD, steps=3, warmup=1, autocast=autocast)
    assert len(seconds) == 3 and min(seconds) > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]) or parameter.requires_grad, name
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model.training


def test_inference_leaves_weights_and_mode_and_skips_the_loss() -> None:
    seen: list[bool] = []
    model = bert_lora().train()
    model.register_forward_hook(
        lambda module, args, output: seen.append(module.training or torch.is_grad_enabled() or output.loss is not None)
    )
    before = [p.clone() for p in model.parameters()]
    seconds = measure_inference(model, [bert_batch(), bert_batch()], warmup=1)
    assert len(seconds) == 2 and min(seconds) > 0
    assert seen == [False] * 3
    assert model.training
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_steps_on_cuda_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the events of two steps, without the warmup; the host waits once, at the end."""
    stream: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.place = len(stream)

        def elapsed_time(self, other: Event) -> float:
            assert stream[-1] == "wait"
            return 1000.0 * sum(int(step) for step in stream[self.place : other.place])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: stream.append("wait"))
    batches = [{"seconds": torch.tensor(seconds)} for seconds in (3, 5)]
    step = lambda batch: stream.append(str(int(batch["seconds"])))  # noqa: E731
    assert time_steps(step, batches, 3, 2, torch.device("cuda")) == [3.0, 5.0, 3.0]
    assert stream == ["3", "5", "3", "5", "3", "wait"]


def test_bad_measurements_are_errors() -> None:
    model, batches = bert(), [bert_batch()]
    with pytest.raises(LightPeftError, match="no batches"):
        measure_inference(model, [])
    with pytest.raises(LightPeftError, match="steps is 0"):
        measure_inference(model, batches, steps=0)
    with pytest.raises(LightPeftError, match="warmup is -1"):
        measure_training(model, batches, warmup=-1)
    with pytest.raises(LightPeftError, match="no parameter of the model requires a gradient"):
        measure_training(bert().requires_grad_(False), batches)


# Comparison


def test_summarize() -> None:
    assert summarize([5, 1, 2, 4, 3]) == Spread(median=3, low=2, high=4, n=5)
    assert summarize([7.5]) == Spread(median=7.5, low=7.5, high=7.5, n=1)
    with pytest.raises(LightPeftError, match="no values"):
        summarize([])


def test_alternate_reverses_every_other_round() -> None:
    calls: list[str] = []

    def subject(name: str) -> Callable[[], float]:
        def measure() -> float:
            calls.append(name)
            return float(len(calls))

        return measure

    values = alternate({name: subject(name) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abccbaabc"
    assert values == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    with pytest.raises(LightPeftError, match="rounds is 0"):
        alternate({"a": subject("a")}, rounds=0)
    with pytest.raises(LightPeftError, match="no subjects"):
        alternate({}, rounds=1)


def test_ratio_pairs_rounds() -> None:
    # Every round the machine is at another speed; the ratio does not care.
    assert ratio([2, 20, 200], [1, 10, 100]) == Spread(median=2, low=2, high=2, n=3)
    with pytest.raises(LightPeftError, match="paired"):
        ratio([1, 2], [1])
    with pytest.raises(LightPeftError, match="ratio to 0"):
        ratio([1], [0])


# -- other programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("busy", "own", "others"),
    [
        (19.8, 10.0, pytest.approx(0.49)),  # one of two cores is taken
        (19.8, 19.0, None),  # all is our own work
        (15.0, 10.0, None),  # a quarter is free, so nobody waits
    ],
)
def test_other_programs_disturb_if_no_core_is_free(
    monkeypatch: pytest.MonkeyPatch, busy: float, own: float, others: Any
) -> None:
    clocks = iter([(100.0, 50.0, 5.0), (110.0, 50.0 + busy, 5.0 + own)])
    monkeypatch.setattr(other_work, "_clocks", lambda: next(clocks))
    monkeypatch.setattr(other_work.os, "cpu_count", lambda: 2)
    assert OtherWork().disturbing() == others


def test_own_work_does_not_count_as_that_of_others() -> None:
    began = other_work._clocks()
    while other_work._clocks()[2] < began[2] + 0.2:
        pass
    seconds, busy, own = (now - then for now, then in zip(other_work._clocks(), began, strict=True))
    assert seconds > 0 and 0.1 < own <= busy + 0.1


def test_work_of_started_processes_is_own_work() -> None:
    began = other_work._clocks()[2]
    spin = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        assert other_work._clocks()[2] - began >= 0.4, "a child that still runs"
        child.stdin.close()
    assert other_work._clocks()[2] - began >= 0.4, "a child that has ended"
