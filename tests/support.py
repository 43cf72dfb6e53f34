"""What works with which family: one check a column of docs/reference/families.md, whose tables this file also writes.

python tests/support.py --write
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny import (
    DECODERS,
    DROPPED,
    ENCODERS,
    MODELS,
    USUAL,
    inputs_for,
    make,
    masked,
    plan_for,
    relative_difference,
    task_type,
    with_lora,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from lightpeft import load_light
from lightpeft.models.families.family_table import FAMILIES, REFUSED, block_specs
from lightpeft.models.families.spec import Family
from lightpeft.peft_kinds.bottleneck import BottleneckConfig
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import BlockSpec
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan

DOCUMENT = Path(__file__).parents[1] / "docs" / "reference" / "families.md"
BUDGETS = {"usual": USUAL, "dropped": DROPPED}
TOLERANCE = 1e-5
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
"""Eight tokens: twice the sliding window of the tiny models that have one."""
CACHES: dict[str, dict[str, dict[str, Any]]] = {
    "usual": {"dynamic": {}, "none": {"use_cache": False}},
    "dropped": {"dynamic": {}, "static": {"cache_implementation": "static"}},
}
"""Budget -> kinds of KV cache. What a layer without attention does to a cache is seen in the last one."""
YES, NO, NOT_APPLICABLE = "yes", "no", "-"


# Models


def with_bottleneck(model: PreTrainedModel, **changes: Any) -> PeftModel:
    """Adapters after both halves of every block, with weights as if they had been trained."""
    settings: dict[str, Any] = {"size": 4, "placement": "houlsby", "task_type": task_type(model), **changes}
    peft_model = get_peft_model(model, BottleneckConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in find_sites(peft_model, block_specs(model)):
            for parameter in site.branch.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return peft_model.eval()


KINDS: dict[str, Callable[..., PeftModel]] = {"lora": with_lora, "bottleneck": with_bottleneck}
"""PEFT kinds of the table. Adding one is one more entry."""


@functools.cache
def pair(name: str, kind: str, budget: str) -> tuple[PeftModel, PeftModel, PrunePlan]:
    """(masked reference, pruned model, plan), to be read only: both are shared by all checks."""
    model = KINDS[kind](make(name))
    plan = plan_for(model, **BUDGETS[budget])
    reference = masked(model, plan)
    apply_plan(model, plan)
    return reference, model, plan


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of real tokens [tokens, vocabulary], of rows [rows, labels], or of decoder tokens."""
    values: Tensor = model(**inputs).logits
    own = values.dim() == 3 and "attention_mask" in inputs and "decoder_input_ids" not in inputs
    return values[inputs["attention_mask"] > 0] if own else values


# Checks: what a column says, for one tiny model and one PEFT kind


def parity(name: str, kind: str) -> None:
    """Masks at 0 and 1, and surgery, give the same logits, padded on either side or not at all."""
    for budget in BUDGETS:
        reference, pruned, plan = pair(name, kind, budget)
        assert plan.removed_parameters > 0 and len(plan.sites) < len(plan.dense_sites)
        for padding in ("right", "left", "none"):
            inputs = inputs_for(pruned, padding)
            difference = relative_difference(logits(pruned, inputs), logits(reference, inputs))
            assert difference < TOLERANCE, f"{budget}, {padding}: {difference:.1e}"


def generate(name: str, kind: str) -> None:
    """The same tokens as with masks, padded on the left: greedy with each kind of cache and none, and beams."""
    for budget, caches in CACHES.items():
        reference, pruned, _ = pair(name, kind, budget)
        inputs = inputs_for(pruned, "left", generate=True)
        expected = reference.generate(**inputs, **GREEDY)
        assert expected.shape[1] >= GREEDY["max_new_tokens"]
        for cache, settings in caches.items():
            assert pruned.generate(**inputs, **GREEDY, **settings).equal(expected), f"{budget}, {cache}"
    beams = {**GREEDY, "num_beams": 2}
    assert pruned.generate(**inputs, **beams).equal(reference.generate(**inputs, **beams)), f"{budget}, beams"


def save(name: str, kind: str) -> None:
    """Saved as a light adapter and loaded on a fresh base: bit-equal logits."""
    model = KINDS[kind](make(name))
    plan = plan_for(model, **DROPPED)
    apply_plan(model, plan)
    inputs = inputs_for(model)
    with tempfile.TemporaryDirectory() as folder:
        as_light(model, plan).save_pretrained(folder)
        loaded = load_light(folder, make(name))
    assert logits(loaded, inputs).equal(logits(model, inputs))


def compiles(name: str, kind: str, backend: str = "inductor") -> None:
    """`torch.compile` of a model with uneven layers, some without attention or FFN, gives what it gives without."""
    _, pruned, _ = pair(name, kind, "dropped")
    inputs = inputs_for(pruned)
    torch.compiler.reset()
    difference = relative_difference(logits(torch.compile(pruned, backend=backend), inputs), logits(pruned, inputs))
    torch.compiler.reset()
    assert difference < 1e-4, f"{difference:.1e}"


CHECKS: dict[str, Callable[[str, str], None]] = {
    "parity": parity,
    "generate": generate,
    "save": save,
    "compile": compiles,
}
CELLS = [(check, kind) for kind in KINDS for check in CHECKS]
"""The columns of the table."""


def applies(check: str, name: str) -> bool:
    """Whether a check says anything about a model: encoders generate nothing."""
    return check != "generate" or name not in ENCODERS


# The tables


@functools.cache
def rows() -> dict[str, list[str]]:
    """Model type -> names of its tiny models, in the order of the registry."""
    names: dict[str, list[str]] = {}
    for name in MODELS:
        names.setdefault(make(name).config.model_type, []).append(name)
    return {model_type: names[model_type] for model_type in FAMILIES if model_type in names}


def row_of(name: str) -> str:
    """The table's row of a tiny model."""
    return next(model_type for model_type, names in rows().items() if name in names)


def support_table(cells: dict[str, list[str]]) -> str:
    """The support matrix: model type -> its cells, as Markdown; neighbors with the same cells share a row."""
    titles = [f"{kind} {check}" if kind != "lora" else f"LoRA {check}" for check, kind in CELLS]
    lines = ([f"`{model_type}`", *row] for model_type, row in cells.items())
    return _markdown(["`model_type`", *titles], _grouped(lines))


def read_support() -> dict[str, list[str]]:
    """What the document says: model type -> its cells."""
    lines = section(DOCUMENT.read_text(encoding="utf-8"), "support").splitlines()[2:]
    parts = [[part.strip(" `") for part in line.strip("|").split("|")] for line in lines]
    return {model_type: cells for names, *cells in parts for model_type in names.split("`, `")}


def family_table() -> str:
    """The families, read off their entries and their tiny models; neighbors that are alike share a row."""
    kinds = dict.fromkeys(ENCODERS, "encoder") | dict.fromkeys(DECODERS, "decoder")
    lines = []
    for model_type, names in rows().items():
        specs = block_specs(make(names[-1]))
        kind = kinds.get(names[0], "encoder-decoder")
        units = "KV groups or balanced query heads" if specs[0].heads_per_kv > 1 else "query heads"
        lines.append(
            [f"`{model_type}`", kind, _attention(specs[0]), units, _ffn(FAMILIES[model_type]), _notes(model_type)]
        )
    return _markdown(["`model_type`", "kind", "attention", "head units", "FFN", "notes"], _grouped(lines))


def _grouped(lines: Iterable[list[str]]) -> Iterable[list[str]]:
    """Lines one below the other with all cells but the first alike, as one with their first cells in a list."""
    for cells, alike in itertools.groupby(lines, key=lambda line: line[1:]):
        yield [", ".join(line[0] for line in alike), *cells]


def refusal_table() -> str:
    """Families that are refused, with the reason."""
    reasons: dict[str, list[str]] = {}
    for model_type, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(f"`{model_type}`")
    return _markdown(["`model_type`", "why"], ([", ".join(names), reason] for reason, names in reasons.items()))


def _attention(spec: BlockSpec) -> str:
    if "kv" in spec.projections:
        return "q, fused kv of one latent (MLA), o"
    if "qkv" not in spec.projections:
        return "q, k, v, o"
    return "fused qkv, one KV group after the other; o" if spec.interleaved else "fused qkv; o"


def _ffn(family: Family) -> str:
    names = {
        ("ffn_in", "ffn_out"): "in, out",
        ("ffn_in", "ffn_gate", "ffn_out"): "gate, in, out",
        ("ffn_gate_in", "ffn_out"): "fused gate and in; out",
        (): "",
    }
    stack = family.stacks[0]
    tables = [tuple(slot for slot in table if slot.startswith("ffn")) for table in stack.tables]
    dense = "; or ".join(dict.fromkeys(filter(None, map(names.get, tables))))
    experts = "routed experts" if stack.experts else ""
    return f"{experts}, and {dense} of other FFNs" if experts and dense else experts or dense


LOWEST = (5, 5)
"""The first transformers that lightpeft works with."""


def _notes(model_type: str) -> str:
    family = FAMILIES[model_type]
    stack = family.stacks[0]
    notes = []
    if len(family.stacks) > 1:
        notes.append("encoder, decoder and cross-attention are separate blocks")
    if stack.wide_norms:
        notes.append("q and k have a norm over all heads: their rows stay, and heads are cut after the norm")
    if stack.position_bias:
        notes.append("one table of position biases per stack; every block selects those of its heads")
    notes += [
        f"attention takes a `{name}` with one entry per head; every block selects those of its heads"
        for name in stack.per_head_arguments
    ]
    notes += [f"needs `{key}={value}`" for key, value in family.needs.items()]
    if family.since > LOWEST:
        notes.append(f"needs transformers {'.'.join(map(str, family.since))}")
    return "; ".join(notes)


def _markdown(titles: list[str], lines: Iterable[list[str]]) -> str:
    table = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table).replace("|  |", "| |")


TABLES: dict[str, Callable[[], str]] = {"families": family_table, "refused": refusal_table}
"""Tables that need no check."""


def _split(text: str, name: str) -> tuple[str, str, str]:
    before, rest = text.split(f"<!-- {name} -->\n")
    table, after = rest.split(f"\n<!-- end of {name} -->")
    return f"{before}<!-- {name} -->\n", table, f"\n<!-- end of {name} -->{after}"


def section(text: str, name: str) -> str:
    """What stands between the two markers of a name."""
    return _split(text, name)[1]


def with_section(text: str, name: str, table: str) -> str:
    """The text with another table between the two markers of a name."""
    before, _, after = _split(text, name)
    return f"{before}{table}{after}"


def write(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


def result(check: str, kind: str, names: list[str]) -> str:
    """A cell: whether the check passes on all tiny models of a row."""
    if not all(applies(check, name) for name in names):
        return NOT_APPLICABLE
    try:
        for name in names:
            CHECKS[check](name, kind)
    except Exception:  # noqa: BLE001 (whatever it raises, the cell says no)
        sys.stderr.write(f"{names} {kind} {check}\n{traceback.format_exc()}\n")
        return NO
    return YES


def main() -> None:
    """Run all checks; with --write put the tables into the document, else print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reference/families.md")
    parser.add_argument("families", nargs="*", help="check these alone and keep what the document says of the others")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.families) - set(rows()))
    if unknown:
        parser.error(f"no tiny model of {', '.join(unknown)}; there are: {', '.join(rows())}")
    cells = read_support() if arguments.families else {}
    for model_type in arguments.families or rows():
        cells[model_type] = [result(check, kind, rows()[model_type]) for check, kind in CELLS]
        sys.stderr.write(f"{model_type}: {' '.join(cells[model_type])}\n")
    cells = {model_type: cells[model_type] for model_type in rows()}
    tables = {"support": support_table(cells)} | {name: table() for name, table in TABLES.items()}
    if not arguments.write:
        sys.stdout.write("\n\n".join(tables.values()) + "\n")
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = with_section(text, name, table)
    write(DOCUMENT, text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    main()
