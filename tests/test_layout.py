"""Which channels belong to which unit: against layouts reshaped as models reshape them, for random structures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import kept_channels as expected_channels
from torch import Tensor

from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.layout import cut_dim, head_channels, kept_channels, segments, squared_norms, width
from lightpeft.plans.structure import SLOTS, BlockSpec


def spec_of(
    kv_heads: int,
    heads_per_kv: int,
    head_dim: int,
    neurons: int,
    interleaved: bool = False,
) -> BlockSpec:
    return BlockSpec(
        index=0,
        attention="attention",
        projections={slot: slot for slot in SLOTS},
        heads=kv_heads * heads_per_kv,
        kv_heads=kv_heads,
        head_dim=head_dim,
        neurons=neurons,
        head_parameters=0,
        kv_parameters=0,
        neuron_parameters=0,
        interleaved=interleaved,
    )


specs = st.builds(
    spec_of, st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 12), interleaved=st.booleans()
)


@st.composite
def specs_with_plans(draw: st.DrawFn) -> tuple[BlockSpec, BlockPlan]:
    """A structure, and KV groups that stay, each with equally many of its query heads."""
    sizes = {slot: draw(st.integers(1, 5)) for slot in ("q", "k", "v", "kv", "o") if draw(st.booleans())}
    spec = replace(draw(specs), head_sizes=sizes)
    groups = draw(st.sets(st.integers(0, spec.kv_heads - 1), min_size=1))
    each = draw(st.integers(1, spec.heads_per_kv))
    heads: list[int] = []
    for group in sorted(groups):
        inside = draw(st.permutations(range(spec.heads_per_kv)))[:each]
        heads += sorted(group * spec.heads_per_kv + head for head in inside)
    neurons = draw(st.sets(st.integers(0, spec.neurons - 1)))
    return spec, BlockPlan(tuple(heads), tuple(sorted(groups)), tuple(sorted(neurons)))


@given(specs_with_plans())
def test_kept_channels(case: tuple[BlockSpec, BlockPlan]) -> None:
    spec, kept = case
    for slot in SLOTS:
        outputs, inputs = expected_channels(spec, kept, slot)
        expected = outputs if cut_dim(slot) == 0 else inputs
        found = kept_channels(spec, kept, slot)
        assert head_channels(spec, kept, slot).tolist() == expected, slot
        if found is None:
            assert expected == list(range(width(spec, slot))), slot
        else:
            assert found.tolist() == expected and len(expected) < width(spec, slot), slot


@given(specs)
def test_every_unit_has_its_channels(spec: BlockSpec) -> None:
    for slot in SLOTS:
        units = segments(spec, slot)
        counts = {unit: units.count(unit) for unit in set(units)}
        twice = {"qkv": "kv_heads", "ffn_gate_in": "neurons"}.get(slot)
        assert all(count == (2 if kind == twice else 1) for (kind, _), count in counts.items())


@given(specs, st.integers(0, 2**31))
def test_fused_and_separate_projections_have_the_same_norms(spec: BlockSpec, seed: int) -> None:
    weights = {slot: random_weight(spec, slot, seed) for slot in ("q", "k", "v", "ffn_in", "ffn_gate")}
    size = spec.head_dim
    if spec.interleaved:
        parts = [
            part
            for group in range(spec.kv_heads)
            for part in (
                weights["q"].view(spec.kv_heads, -1, 3)[group],
                weights["k"].view(spec.kv_heads, size, 3)[group],
                weights["v"].view(spec.kv_heads, size, 3)[group],
            )
        ]
    else:
        parts = [weights["q"], weights["k"], weights["v"]]
    heads, _ = squared_norms(spec, "qkv", torch.cat(parts))
    torch.testing.assert_close(heads, sum(squared_norms(spec, slot, weights[slot])[0] for slot in "qkv"))
    _, neurons = squared_norms(spec, "ffn_gate_in", torch.cat([weights["ffn_gate"], weights["ffn_in"]]))
    separate = sum(squared_norms(spec, slot, weights[slot])[1] for slot in ("ffn_gate", "ffn_in"))
    torch.testing.assert_close(neurons, separate)


def random_weight(spec: BlockSpec, slot: str, seed: int) -> Tensor:
    return torch.randn(width(spec, slot), 3, generator=torch.Generator().manual_seed(seed + len(slot)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_norms_by_hand(interleaved: bool) -> None:
    """Two query heads over one KV head of one channel: rows are q0, q1, k, v either way."""
    spec = spec_of(kv_heads=1, heads_per_kv=2, head_dim=1, neurons=1, interleaved=interleaved)
    heads, neurons = squared_norms(spec, "qkv", torch.tensor([[1.0], [2.0], [3.0], [4.0]]).bfloat16())
    assert heads.tolist() == [1.0 + 9 + 16, 4.0 + 9 + 16] and neurons.tolist() == [0.0]
    assert heads.dtype == torch.float32


def test_norms_of_heads_of_other_sizes() -> None:
    """Two heads: three rows of q and two of kv each, and one column of o."""
    spec = replace(spec_of(kv_heads=2, heads_per_kv=1, head_dim=1, neurons=0), head_sizes={"q": 3, "kv": 2})
    assert [width(spec, slot) for slot in ("q", "kv", "o")] == [6, 4, 2]
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    assert squared_norms(spec, "q", rows)[0].tolist() == [1.0 + 4 + 9, 16.0 + 25 + 36]
    assert squared_norms(spec, "kv", rows[:4])[0].tolist() == [1.0 + 4, 9.0 + 16]
    assert squared_norms(spec, "o", rows[:2].T)[0].tolist() == [1.0, 4.0]


def test_rows_before_a_norm_over_all_heads_stay() -> None:
    spec = spec_of(kv_heads=2, heads_per_kv=1, head_dim=2, neurons=1)
    object.__setattr__(spec, "wide_norms", {"q": "norm"})
    kept = BlockPlan((1,), (1,), (0,))
    assert kept_channels(spec, kept, "q") is None and head_channels(spec, kept, "q").tolist() == [2, 3]
    assert kept_channels(spec, kept, "k").tolist() == [2, 3] and "q" not in spec.cut_slots()
