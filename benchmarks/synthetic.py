"""Random models of known shapes, plain and light, measured in processes of their own.

Speed and memory do not depend on what weights say, so random ones serve for shapes that no checkpoint is at hand for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
    set_seed,
)

from lightpeft.app.runs.workers import Worker
from lightpeft.config import LightConfig, override_light
from lightpeft.machine import autocasting
from lightpeft.models.families.family_table import block_specs
from lightpeft.profiling.comparing import alternate, ratio, summarize
from lightpeft.profiling.flops import count_flops
from lightpeft.profiling.memory import PeakMemory, weights_bytes
from lightpeft.profiling.sizes import count_parameters
from lightpeft.profiling.speed import measure_inference, measure_training
from lightpeft.recipe.pruner import EarlyPruner
from lightpeft.training.acceleration import accelerated

SUBJECTS = ("plain", "estimation", "light")
"""LoRA on q and v of the dense model, the estimation stage, and the pruned model."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    name: str
    family: Literal["roberta", "llama"]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int


@dataclass(frozen=True)
class Case:
    """One measurement: a model and the batches that it gets."""

    shape: Shape
    batch_size: int
    length: int
    """Tokens a row, all real."""
    steps: int
    """Batches a round."""
    light: LightConfig
    """Budget of the light model."""
    device: str = "cpu"
    bf16: bool = False
    """Frozen weights and autocast in bfloat16; PEFT weights stay in float32."""

    @property
    def autocast(self) -> torch.dtype | None:
        """Data type of autocast; None: no autocast."""
        return torch.bfloat16 if self.bf16 else None


def random_model(case: Case) -> PreTrainedModel:
    """A model of the case's shape with random weights: a causal language model (Llama) or a classifier (RoBERTa)."""
    shape = case.shape
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": case.length + 2,  # RoBERTa counts from behind the padding token
    }
    set_seed(0)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    with torch.device(case.device):
        if shape.family == "llama":
            config = LlamaConfig(**sizes, num_key_value_heads=shape.kv_heads, tie_word_embeddings=True, use_cache=False)
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        return AutoModelForSequenceClassification.from_config(RobertaConfig(**sizes, num_labels=2), dtype=dtype)


def with_lora(model: PreTrainedModel, slots: Sequence[str] | None = None) -> PeftModel:
    """LoRA of rank 8 on some slots of every block, or on all."""
    names = [n for spec in block_specs(model) for slot, n in spec.projections.items() if not slots or slot in slots]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))


def random_batches(case: Case) -> list[dict[str, Tensor]]:
    """Token ids and labels; the device gets them batch by batch, as in training."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(case.steps):
        ids = torch.randint(3, case.shape.vocabulary, (case.batch_size, case.length), generator=generator)
        labels = ids if case.shape.family == "llama" else torch.randint(0, 2, (case.batch_size,), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


class Synthetic:
    """One subject's model and batches, in a process of its own."""

    def __init__(self, subject: str, case: Case) -> None:
        self.subject, self.case = subject, case
        self.batches = random_batches(case)
        dense = random_model(case)
        self.dense_parameters = count_parameters(dense).base
        self.optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = partial(torch.optim.AdamW, lr=1e-4)
        self.model: Any = with_lora(dense, ("q", "v") if subject == "plain" else None)
        if subject == "light":
            self.model = self._pruned()
        if subject == "estimation":
            self.optimizer = self._estimating()

    def _pruned(self) -> PeftModel:
        """The model after two steps of estimation: enough for a plan of the right size."""
        pruner = EarlyPruner(self.model, self.case.light)
        pruner.start()
        with autocasting(torch.device(self.case.device), self.case.autocast):
            while not pruner.finished:
                batch = {name: value.to(self.case.device) for name, value in self.batches[0].items()}
                self.model(**batch).loss.backward()
                pruner.step()
                self.model.zero_grad()
        return pruner.prune()

    def _estimating(self) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        pruner = EarlyPruner(self.model, override_light(self.case.light, {"estimate": {"length": 10**9}}))
        pruner.start()

        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            made = torch.optim.AdamW(parameters, lr=1e-4)
            made.register_step_pre_hook(lambda *_: pruner.step())
            return made

        return optimizer

    def fixed(self) -> dict[str, Any]:
        """Parameters, FLOPs of a batch, and the peak of training memory, weights included."""
        with self._training_as_a_run(), PeakMemory(self.model) as memory:
            measure_training(
                self.model, self.batches[:1], self.optimizer, steps=2, warmup=1, autocast=self.case.autocast
            )
        with autocasting(torch.device(self.case.device), self.case.autocast):
            flops = count_flops(self.model, self.batches[0])
        count = count_parameters(self.model)
        return {
            "peak_memory_bytes": memory.bytes + (0 if memory.method == "cuda" else weights_bytes(self.model)),
            "base_parameters": count.base,
            "removed_ratio": 1 - count.base / self.dense_parameters,
            "peft_parameters": count.peft,
            "flops": {"forward": flops.forward, "training": flops.training},
        }

    def training(self) -> float:
        """Seconds a training step."""
        with self._training_as_a_run():
            return statistics.mean(
                measure_training(self.model, self.batches, self.optimizer, autocast=self.case.autocast)
            )

    def _training_as_a_run(self) -> AbstractContextManager[None]:
        """Both stages of a light run have its steps; plain LoRA has those of PEFT and PyTorch."""
        return nullcontext() if self.subject == "plain" else accelerated(self.model, dropout=0.0)

    def inference(self) -> float:
        """Seconds a forward pass, with merged weights."""
        if isinstance(self.model, PeftModel):
            self.model = self.model.merge_and_unload()
        return statistics.mean(measure_inference(self.model, self.batches, autocast=self.case.autocast))


def measure(case: Case, subjects: Sequence[str], rounds: int) -> dict[str, Any]:
    """The subjects' seconds a step, in alternation, with sizes, FLOPs and memory; ratios are over plain, in rounds.

    Raises:
        LightPeftError: a measuring process failed, perhaps for lack of memory.
    """
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(Synthetic, name, case)) for name in subjects}
        fixed = {name: worker.measure("fixed") for name, worker in workers.items()}
        training = alternate({n: partial(w.measure, "training") for n, w in workers.items()}, rounds)
        inferring = {name: worker for name, worker in workers.items() if name != "estimation"}
        inference = alternate({n: partial(w.measure, "inference") for n, w in inferring.items()}, rounds)
    return {
        "case": asdict(case),
        "rounds": rounds,
        "subjects": {
            name: {
                **fixed[name],
                "training_seconds": asdict(summarize(training[name])),
                "inference_seconds": asdict(summarize(inference[name])) if name in inference else None,
                "training_speedup": asdict(ratio(training["plain"], training[name])),
                "inference_speedup": asdict(ratio(inference["plain"], inference[name])) if name in inference else None,
            }
            for name in subjects
        },
        "ideal": {
            what: fixed["plain"]["flops"][key] / fixed["light"]["flops"][key]
            for what, key in (("training", "training"), ("inference", "forward"))
        },
        "values": {"training": training, "inference": inference},
    }
