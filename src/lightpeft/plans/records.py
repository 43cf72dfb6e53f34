"""What is written down between the stages: scores, plans. Versioned JSON and safetensors, never pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightpeft.config import LightConfig
from lightpeft.config.light import Train
from lightpeft.config.validation import from_dict
from lightpeft.errors import LightPeftError, require
from lightpeft.files import (
    check_file,
    file_checksum,
    read_json,
    read_tensors,
    replacing_folder,
    understandable,
    write_json,
    write_tensors,
)
from lightpeft.plans.structure import MASKED, BlockSpec, SiteSpec, role_named

_SCORES = "scores.safetensors"


@dataclass
class EstimationRecord:
    """Scores of every unit under every criterion, and how they were obtained.

    `scores` maps "heads/<criterion>/<block>" to [query heads], "neurons/<criterion>/<block>" to [neurons],
    "experts/<criterion>/<block>" to [experts], "expert_neurons/<criterion>/<block>" to [experts * neurons of each],
    "modules/<criterion>" to [sites] and "ranks/<criterion>/<site index>" to [rank]; all float32 on the CPU.
    """

    blocks: list[BlockSpec]
    sites: list[SiteSpec]
    scores: dict[str, Tensor]
    base_parameters: int
    """Parameters of the base before pruning (no PEFT weights)."""
    fingerprint: str
    """Of the base the scores belong to."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Steps, rows a step, tokens, settings, seed, loss, versions."""
    left_out: list[BlockSpec] = field(default_factory=list)
    """Blocks of the base above `blocks` that were left out whole before estimation, and have no scores."""

    def check_scored(self, light: LightConfig) -> None:
        """Refuse settings that need scores where there are none.

        Raises:
            LightPeftError: estimation took no step, since nothing was to go then, and now something is.
        """
        nothing = "these scores are of no step, since nothing was to go; estimate again with what is wanted now"
        require(self.meta.get("steps") != 0 or not light.chooses, nothing)

    @property
    def depth(self) -> float:
        """Part of the blocks that was left out."""
        return len(self.left_out) / (len(self.blocks) + len(self.left_out))

    def of_blocks(self, kind: str, criterion: str) -> list[Tensor]:
        """Scores of one of the `MASKED` units under a criterion, one tensor a block; empty where it has none."""
        scores = (f"{kind}/{criterion}/{block.index}" if getattr(block, kind) else None for block in self.blocks)
        return [torch.zeros(0) if key is None else self._get(key) for key in scores]

    def of_modules(self, criterion: str) -> Tensor:
        """Scores of the PEFT modules under a criterion, [sites]."""
        return self._get(f"modules/{criterion}")

    def of_ranks(self, criterion: str) -> list[Tensor]:
        """Scores of the ranks under a criterion, one tensor a site."""
        return [self._get(f"ranks/{criterion}/{index}") for index in range(len(self.sites))]

    def _get(self, key: str) -> Tensor:
        if key not in self.scores:
            known = sorted({"/".join(name.split("/")[:2]) for name in self.scores})
            raise LightPeftError(f'the estimation record has no scores "{key}"; it has {", ".join(known)}')
        return self.scores[key]

    def check(self) -> None:
        """Check that scores, blocks and sites fit each other.

        Raises:
            LightPeftError: they do not.
        """
        _check_specs([*self.blocks, *self.left_out], self.sites)
        numbered = [block.index for block in self.blocks] == list(range(len(self.blocks)))
        require(self.blocks and numbered, "the record's blocks are not numbered from 0 on")
        placed = all(site.block is None or site.block < len(self.blocks) for site in self.sites)
        require(placed, "a PEFT module of the record sits in a block that it does not have")
        sizes: dict[str, int] = {}
        for block in self.blocks:
            sizes |= {f"{kind}/{block.index}": getattr(block, kind) for kind in MASKED}
        sizes |= {"modules": len(self.sites)}
        sizes |= {f"ranks/{index}": site.rank for index, site in enumerate(self.sites)}
        for key, scores in self.scores.items():
            kind, _, rest = key.partition("/")
            unit = rest.partition("/")[2]
            size = sizes.get(f"{kind}/{unit}" if unit else kind)
            require(scores.shape == (size,), f"the record's scores {key} are {tuple(scores.shape)}, not ({size},)")

    def save(self, folder: str | Path) -> None:
        """Write `estimation.json` and `scores.safetensors` into `folder`."""
        with replacing_folder(folder, last="estimation.json") as temporary:
            write_tensors(temporary / _SCORES, self.scores)
            write_json(
                temporary / "estimation.json",
                {
                    "base_parameters": self.base_parameters,
                    "fingerprint": self.fingerprint,
                    "meta": self.meta,
                    "blocks": [asdict(block) for block in self.blocks],
                    "left_out": [asdict(block) for block in self.left_out],
                    "sites": [asdict(site) for site in self.sites],
                    "scores": file_checksum(temporary / _SCORES),
                },
            )

    @classmethod
    def load(cls, folder: str | Path) -> EstimationRecord:
        """Read what `save` wrote.

        Raises:
            LightPeftError: a file is missing, damaged, or of a newer schema.
        """
        folder = Path(folder)
        data = read_json(folder / "estimation.json")
        check_file(folder, _SCORES, data.get("scores"))
        scores = read_tensors(folder / _SCORES)
        with understandable(folder / "estimation.json"):
            kept = {key: value for key, value in data.items() if key not in ("schema_version", "scores")}
            record = from_dict(cls, {"left_out": [], **kept, "scores": scores})
            record.blocks = list(map(_with_role, record.blocks))
            record.left_out = list(map(_with_role, record.left_out))
            record.check()
        return record


@dataclass(frozen=True)
class BlockPlan:
    """What stays of one block, as indices into the dense block."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]
    experts: tuple[int, ...] = ()
    expert_neurons: tuple[int, ...] = ()
    """Equally many of every expert that stays."""

    @property
    def expert_width(self) -> int:
        """Intermediate channels of each expert that stays."""
        return len(self.expert_neurons) // len(self.experts) if self.experts else 0


@dataclass(frozen=True)
class PrunePlan:
    """Which units stay. Plain data: it can be read, compared, saved, and applied to any copy of the same base."""

    specs: tuple[BlockSpec, ...]
    """The dense structure that the indices refer to."""
    blocks: tuple[BlockPlan, ...]
    """What stays, one entry a block; blocks of `specs` beyond the last entry are left out whole."""
    sites: dict[str, tuple[int, ...]]
    """PEFT modules that stay -> the ranks of theirs that stay."""
    dense_sites: tuple[SiteSpec, ...]
    """All PEFT modules there were."""
    base_parameters: int
    """Parameters of the base before pruning."""
    fingerprint: str
    """Of the base the plan belongs to."""
    budget: dict[str, Any] = field(default_factory=dict)
    """The budget that the plan was made from."""
    train: Train = "peft"
    """Which weights train behind the cut: PEFT modules that stay, or all, into which they are merged."""

    @property
    def parts(self) -> list[tuple[BlockSpec, BlockPlan]]:
        """The blocks that stay, each with what stays of it."""
        return list(zip(self.specs, self.blocks, strict=False))

    @property
    def left_out(self) -> tuple[BlockSpec, ...]:
        """The blocks that go whole: the topmost ones."""
        return self.specs[len(self.blocks) :]

    @property
    def removed_parameters(self) -> int:
        """Base parameters that the plan removes."""
        return removed_parameters(self.parts, self.left_out)

    @property
    def cuts_blocks(self) -> bool:
        """Whether anything of the base's blocks goes."""
        return self.removed_parameters > 0

    @property
    def cuts_modules(self) -> bool:
        """Whether PEFT modules go, or ranks of them."""
        return self._ranks < self._dense_ranks

    @property
    def _ranks(self) -> int:
        return sum(map(len, self.sites.values()))

    @property
    def _dense_ranks(self) -> int:
        return sum(site.rank for site in self.dense_sites)

    @property
    def removed_ratio(self) -> float:
        """Base parameters removed over all base parameters, embeddings included."""
        return self.removed_parameters / self.base_parameters

    @property
    def removed_of_blocks(self) -> float:
        """Base parameters removed over all that the blocks have, norms and biases included."""
        return self.removed_parameters / sum(block_parameters(spec) for spec in self.specs)

    def rows(self) -> list[dict[str, str]]:
        """One row a block: heads, KV heads, neurons, experts if there are any, and PEFT modules with their ranks, each
        as kept/dense."""
        return [self._row(spec, kept) for spec, kept in zip_longest(self.specs, self.blocks)]

    def _row(self, spec: BlockSpec, kept: BlockPlan | None) -> dict[str, str]:
        removed = 1.0 if kept is None else removed_in_block(spec, kept) / block_parameters(spec)
        kept = kept or BlockPlan((), (), ())
        ranks = self.module_ranks(spec)
        stay = [f"{slot}:{count}" for slot, count in ranks.items() if count]
        return {
            "layer": spec.label or str(spec.index),
            "heads": f"{len(kept.heads)}/{spec.heads}",
            "kv heads": f"{len(kept.kv_heads)}/{spec.kv_heads}",
            "neurons": f"{len(kept.neurons)}/{spec.neurons}" if spec.neurons else "-",
            **(self._experts_in_row(spec, kept) if any(spec.experts for spec in self.specs) else {}),
            "removed": f"{removed:.0%}",
            "modules": f"{len(stay)}/{len(ranks)}",
            "module:ranks": " ".join(stay) or "-",
        }

    @staticmethod
    def _experts_in_row(spec: BlockSpec, kept: BlockPlan) -> dict[str, str]:
        return {
            "experts": f"{len(kept.experts)}/{spec.experts}" if spec.experts else "-",
            "neurons of each": f"{kept.expert_width}/{spec.expert_width}" if spec.experts else "-",
        }

    def module_ranks(self, spec: BlockSpec) -> dict[str, int]:
        """Slots of a block that had a PEFT module -> how many of its ranks stay; 0: the module goes."""
        dense = [site for site in self.dense_sites if site.block == spec.index]
        return {str(site.slot): len(self.sites.get(site.name, ())) for site in dense}

    def summary(self) -> str:
        """One line: what part of the base, of its blocks, of the PEFT modules and of their ranks goes."""
        modules = f"{len(self.sites)} of {len(self.dense_sites)} PEFT modules"
        kept = f"keeps {modules} and {self._ranks} of {self._dense_ranks} ranks"
        if self.train == "all":
            kept = "merges PEFT, and trains all weights that are left"
        if not self.cuts_blocks:
            changes = self.cuts_modules or self.train == "all"
            return f"removes nothing of the blocks; {kept}" if changes else "removes nothing"
        whole = f"{len(self.left_out)} of {len(self.specs)} blocks whole; " if self.left_out else ""
        return (
            f"removes {self.removed_parameters:,} of {self.base_parameters:,} base parameters "
            f"({self.removed_ratio:.1%}; {self.removed_of_blocks:.1%} of the blocks'); {whole}"
            f"{kept}"
        )

    def __str__(self) -> str:
        rows = self.rows()
        widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
        lines = ["  ".join(key.ljust(width) for key, width in widths.items())]
        lines += ["  ".join(row[key].ljust(width) for key, width in widths.items()) for row in rows]
        return "\n".join(line.rstrip() for line in [*lines, self.summary()])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; kept indices as ranges ("0-3,7")."""
        return {
            "base_parameters": self.base_parameters,
            "fingerprint": self.fingerprint,
            "budget": self.budget,
            "specs": [asdict(spec) for spec in self.specs],
            "blocks": [{name: to_ranges(kept) for name, kept in asdict(block).items()} for block in self.blocks],
            "dense_sites": [asdict(site) for site in self.dense_sites],
            "sites": {name: to_ranges(ranks) for name, ranks in self.sites.items()},
            "train": self.train,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PrunePlan:
        """The plan that `to_dict` described.

        Raises:
            LightPeftError: a part is missing or of another kind, or the parts do not fit each other (see `check_fit`).
        """
        facts = from_dict(_PlanFacts, {key: value for key, value in data.items() if key != "schema_version"}, "plan.")
        _check_specs(facts.specs, facts.dense_sites)
        require(
            sum(getattr(spec, kind) for spec in facts.specs for kind in MASKED) <= _MOST_UNITS,
            f"the plan is for a model of more than {_MOST_UNITS:,} heads and neurons",
        )
        ranks = {site.name: site.rank for site in facts.dense_sites}
        unknown = sorted(facts.sites.keys() - ranks)
        require(not unknown, f"the plan keeps a PEFT module that there was not: {', '.join(unknown[:1])}")
        plan = cls(
            specs=tuple(map(_with_role, facts.specs)),
            blocks=tuple(_block_plan(*pair) for pair in zip(facts.specs, facts.blocks, strict=False)),
            sites={name: from_ranges(kept, ranks[name]) for name, kept in facts.sites.items()},
            dense_sites=tuple(facts.dense_sites),
            base_parameters=facts.base_parameters,
            fingerprint=facts.fingerprint,
            budget=facts.budget,
            train=facts.train,
        )
        require(len(facts.blocks) <= len(facts.specs), "the plan keeps other blocks than there were")
        check_fit(plan)
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read a plan that `save` wrote.

        Raises:
            LightPeftError: the file is missing, damaged, or of a newer schema.
        """
        data = read_json(path)
        with understandable(path):
            return cls.from_dict(data)


def check_fit(plan: PrunePlan) -> None:
    """Check that what a plan keeps is part of what was there.

    Raises:
        LightPeftError: it is not.
    """
    require(0 < len(plan.blocks) <= len(plan.specs), "the plan keeps other blocks than there were")
    for spec, kept in plan.parts:
        groups = sorted({head // spec.heads_per_kv for head in kept.heads})
        fits = list(kept.kv_heads) == groups and len(kept.heads) % max(len(groups), 1) == 0
        require(fits, f"block {spec.label} of the plan keeps query heads that do not fit its KV heads")
        _check_indices(kept.heads, spec.heads, f"heads of block {spec.label}")
        _check_indices(kept.neurons, spec.neurons, f"neurons of block {spec.label}")
        _check_experts(spec, kept)
    dense = {site.name: site.rank for site in plan.dense_sites}
    for name, ranks in plan.sites.items():
        require(name in dense, f"the plan keeps a PEFT module {name} that there was not")
        _check_indices(ranks, dense[name], f"ranks of {name}")
    gone = {spec.index for spec in plan.left_out}
    above = {site.name for site in plan.dense_sites if site.block in gone} & plan.sites.keys()
    require(not above, f"the plan keeps a PEFT module in a block that it leaves out: {', '.join(sorted(above)[:1])}")


def _check_indices(kept: Sequence[int], dense: int, what: str) -> None:
    inside = list(kept) == sorted(set(kept)) and max(kept, default=-1) < dense
    require(inside, f"the {what} that the plan keeps are not ascending indices below {dense}")


def _check_experts(spec: BlockSpec, kept: BlockPlan) -> None:
    """Check that enough experts stay for every token, each with equally many neurons."""
    _check_indices(kept.experts, spec.experts, f"experts of block {spec.label}")
    _check_indices(kept.expert_neurons, spec.expert_neurons, f"neurons of experts of block {spec.label}")
    stay = len(kept.experts)
    require(
        stay >= spec.needed_experts,
        f"the plan keeps {stay} of {spec.experts} experts of block {spec.label}, and {spec.needs_experts()}",
    )
    of_groups = Counter(expert * spec.expert_groups // spec.experts for expert in kept.experts)
    even = not spec.experts or (len(of_groups) == spec.expert_groups and len(set(of_groups.values())) == 1)
    require(even, f"block {spec.label} of the plan does not keep equally many experts of every group")
    owners = Counter(neuron // spec.expert_width for neuron in kept.expert_neurons)
    even = set(owners) == set(kept.experts) and len(set(owners.values())) <= 1
    require(even, f"block {spec.label} of the plan does not keep equally many neurons of every expert that stays")


def removed_in_block(spec: BlockSpec, kept: BlockPlan) -> int:
    """Parameters of a block that go when `kept` stays."""
    return (
        (spec.heads - len(kept.heads)) * spec.head_parameters
        + (spec.kv_heads - len(kept.kv_heads)) * spec.kv_parameters
        + (spec.neurons - len(kept.neurons)) * spec.neuron_parameters
        + (spec.experts - len(kept.experts)) * spec.expert_parameters
        + len(kept.experts) * (spec.expert_width - kept.expert_width) * spec.expert_neuron_parameters
        + (0 if kept.heads else spec.rest_parameters)
    )


def removed_parameters(parts: Iterable[tuple[BlockSpec, BlockPlan]], left_out: Iterable[BlockSpec]) -> int:
    """Parameters that go when so much of some blocks stays, and others are left out whole."""
    return sum(removed_in_block(*part) for part in parts) + sum(map(block_parameters, left_out))


def removable_parameters(spec: BlockSpec) -> int:
    """Parameters of a block that pruning can reach."""
    return removed_in_block(spec, BlockPlan((), (), ()))


def block_parameters(spec: BlockSpec) -> int:
    """All parameters of a dense block."""
    return removable_parameters(spec) + spec.fixed_parameters


def to_ranges(indices: Sequence[int]) -> str:
    """Ascending indices as a compact string: (0, 1, 2, 5) -> "0-2,5"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def from_ranges(text: str, below: int) -> tuple[int, ...]:
    """The indices that `to_ranges` wrote: ascending, and below a number of units.

    Raises:
        LightPeftError: they are others; none of them is made.
    """
    bounds = [part.split("-") for part in text.split(",") if part]
    ends = [(int(bound[0]), int(bound[-1])) for bound in bounds]
    before = -1
    for first, last in ends:
        require(before < first <= last < below, f"{text[:40]!r} are not ascending indices below {below}")
        before = last
    return tuple(index for first, last in ends for index in range(first, last + 1))


_MOST_UNITS = 2**23
"""Heads and neurons that a plan may be for: with 100 layers of 53,248 neurons it would be for 5 million."""


_MOST_COUNTED = 2**40
"""More than any count of a block, parameters included."""


def _check_specs(blocks: Sequence[BlockSpec], sites: Sequence[SiteSpec]) -> None:
    """Check that what was read counts as a dense model can."""
    for part in (*blocks, *sites):
        for name, value in vars(part).items():
            possible = type(value) is not int or 0 <= value < _MOST_COUNTED
            require(possible, f"{type(part).__name__} {getattr(part, 'label', '')} has {value} {name}")
    for spec in blocks:
        grouped = spec.heads % spec.kv_heads == 0 if spec.kv_heads else not spec.heads
        require(grouped, f"block {spec.label or spec.index} has {spec.heads} heads over {spec.kv_heads} KV heads")
        even = spec.needed_experts <= spec.experts and spec.expert_neurons == spec.experts * spec.expert_width
        even = even and spec.expert_groups > 0 and spec.experts % spec.expert_groups == 0
        require(even, f"block {spec.label or spec.index} has {spec.expert_neurons} neurons over {spec.experts} experts")


def _with_role(spec: BlockSpec) -> BlockSpec:
    """The spec with its stack's role, which files of earlier versions have in the label alone."""
    return spec if spec.role else replace(spec, role=role_named(spec.label.partition(" ")[0]))


@dataclass(frozen=True)
class _PlanFacts:
    """A plan as its file has it."""

    specs: list[BlockSpec]
    blocks: list[dict[str, str]]
    sites: dict[str, str]
    dense_sites: list[SiteSpec]
    base_parameters: int
    fingerprint: str
    budget: dict[str, Any]
    train: Train = "peft"


def _block_plan(spec: BlockSpec, kept: dict[str, str]) -> BlockPlan:
    """What stays of a block, by its file's ranges."""
    dense = {name: getattr(spec, name) for name in ("kv_heads", *MASKED)}
    without = {} if spec.experts else {"experts": "", "expert_neurons": ""}  # as in files of earlier versions
    return BlockPlan(**{name: from_ranges((without | kept)[name], below) for name, below in dense.items()})
