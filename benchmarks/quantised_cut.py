"""What it costs to cut a base that is quantised already, against cutting it first and quantising what is left.

    python benchmarks/quantised_cut.py

MiniLM (`demo/fetch.py` fetches it) loses a random half of the heads and neurons of every layer, in both orders and in
every kind of 4 and 8 bits that lightpeft cuts. Errors are relative (Frobenius norm) to the model cut in float32: of the
weights of attention-output and FFN-output projections, and of the sentence embeddings (means over tokens) of movie
reviews. Writes quantised_cut.results.json beside this file. Needs the extra `quantised`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from datasets import load_dataset
from publishing import command
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, quantize_
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from lightpeft.app.cli.command import quiet
from lightpeft.files import write_json
from lightpeft.models.families import block_specs
from lightpeft.models.linears import dense_weight, prepare_quantised
from lightpeft.models.unwrap import base_linear
from lightpeft.plans.records import BlockPlan, PrunePlan
from lightpeft.profiling import count_parameters, hardware, versions
from lightpeft.prune.fingerprint import fingerprint
from lightpeft.prune.surgery import apply_plan

CACHE = Path(__file__).parents[1] / "demo" / "cache"
REVIEWS = 128


def four_bits(linear: nn.Linear, **settings: Any) -> nn.Module:
    """A linear layer in bitsandbytes' 4 bits, computing in float32."""
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, **settings)
    layer.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, module=layer, **settings)
    layer.bias = linear.bias
    return layer.to("cpu")


def eight_bits(linear: nn.Linear) -> nn.Module:
    """A linear layer in bitsandbytes' 8 bits."""
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False)
    layer.bias = linear.bias
    return layer.to("cpu")


def torchao(granularity: Any) -> Callable[[nn.Linear], nn.Module]:
    """What makes a linear layer one of torchao's 8 bits, with a scale for so many weights."""

    def quantise(linear: nn.Linear) -> nn.Module:
        quantize_(linear, Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False))
        return linear

    return quantise


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitsandbytes NF4": lambda linear: four_bits(linear, quant_type="nf4", compress_statistics=False),
    "bitsandbytes NF4, double quantisation": lambda linear: four_bits(linear, quant_type="nf4"),
    "bitsandbytes int8": eight_bits,
    "torchao int8 by row": torchao(PerRow()),
    "torchao int8, groups of 32": torchao(PerGroup(32)),
}


def main() -> None:
    """Measure every kind in both orders, print the table, and write it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=0, help="of the units that go")
    options.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".results.json"))
    given = options.parse_args()
    quiet()
    base = AutoModel.from_pretrained(CACHE / "minilm", dtype=torch.float32).eval()
    inputs, plan = reviews(), random_plan(base, given.seed)
    cut = pruned(base, plan)
    report = {kind: compare(base, cut, plan, quantise, inputs) for kind, quantise in KINDS.items()}
    facts = {"seed": given.seed, "reviews": REVIEWS, "hardware": hardware(), "versions": versions()}
    facts |= {"command": command("quantised_cut")}
    write_json(given.output, {"relative_errors": report, **facts})
    Console().print(shown(report))


def random_plan(model: PreTrainedModel, seed: int) -> PrunePlan:
    """Half of the heads and of the neurons of every layer, at random."""
    generator = torch.Generator().manual_seed(seed)

    def half(units: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(units, generator=generator)[: units // 2].tolist()))

    specs = block_specs(model)
    blocks = [BlockPlan(heads := half(spec.heads), heads, half(spec.neurons)) for spec in specs]
    dense = count_parameters(model).base
    return PrunePlan(tuple(specs), tuple(blocks), {}, (), dense, fingerprint(model, specs))


def compare(
    base: PreTrainedModel,
    cut: PreTrainedModel,
    plan: PrunePlan,
    quantise: Callable[[nn.Linear], nn.Module],
    inputs: dict[str, Tensor],
) -> dict[str, dict[str, float]]:
    """Errors of both orders against the model that was cut in float32, and of quantising without any cut."""
    whole = quantised(base, plan, quantise)
    models = {"quantised, then cut": pruned(whole, plan), "cut, then quantised": quantised(cut, plan, quantise)}
    expected = embeddings(cut, inputs)
    errors = {
        order: {
            **{slot: weight_error(model, cut, plan, slot) for slot in ("o", "ffn_out")},
            "embeddings": error(embeddings(model, inputs), expected),
        }
        for order, model in models.items()
    }
    dense = error(embeddings(whole, inputs), embeddings(base, inputs))
    return {**errors, "quantised, not cut": {"embeddings": dense}}


def pruned(model: PreTrainedModel, plan: PrunePlan) -> PreTrainedModel:
    """A copy, cut down to the plan."""
    small = copy.deepcopy(model)
    apply_plan(small, plan)
    return small


def quantised(model: PreTrainedModel, plan: PrunePlan, quantise: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    """A copy with all projections of the blocks quantised."""
    packed = copy.deepcopy(model)
    for spec in plan.specs:
        for name in spec.projections.values():
            packed.set_submodule(name, quantise(packed.get_submodule(name)))
    prepare_quantised(packed)
    return packed


def weight_error(model: PreTrainedModel, cut: PreTrainedModel, plan: PrunePlan, slot: str) -> float:
    """Mean over layers of the relative error of a projection's weight."""
    names = [spec.projections[slot] for spec in plan.specs]
    weights = [[dense_weight(base_linear(m, name)) for m in (model, cut)] for name in names]
    return statistics.mean(error(weight, expected) for weight, expected in weights)


def error(values: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return float((values.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def embeddings(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """[reviews, width]: means over tokens."""
    states = model.eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def reviews() -> dict[str, Tensor]:
    """The first movie reviews of the test rows as one batch."""
    rows = load_dataset("csv", data_files=str(CACHE / "movie_reviews" / "test.csv"), split="train").select(
        range(REVIEWS)
    )
    tokenizer = AutoTokenizer.from_pretrained(CACHE / "minilm")
    return dict(tokenizer(rows["text"][:], padding=True, truncation=True, max_length=128, return_tensors="pt"))


def shown(report: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Errors of the weights and of the embeddings: cut after / before quantising."""
    table = Table(title="relative errors, cut after / before quantising", title_justify="left")
    for name in ("kind", "o", "ffn_out", "embeddings", "embeddings, no cut"):
        table.add_column(name)
    for kind, orders in report.items():
        after, before = orders["quantised, then cut"], orders["cut, then quantised"]
        pairs = [f"{after[name]:.3f} / {before[name]:.3f}" for name in ("o", "ffn_out", "embeddings")]
        table.add_row(kind, *pairs, f"{orders['quantised, not cut']['embeddings']:.3f}")
    return table


if __name__ == "__main__":
    main()
