"""Records that stages hand over, scores and plans, as versioned JSON and safetensors, never pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
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
    explain_content_errors,
    file_checksum,
    read_json,
    read_tensors,
    replacing_folder,
    write_json,
    write_tensors,
)
from lightpeft.plans.structure import MASKED, BlockSpec, SiteSpec

_SCORES = "scores.safetensors"


@dataclass
class EstimationRecord:
    """Result of the estimation stage (Gu et al. 2024): scores of every unit under every criterion, and their origin.

    `scores` maps "heads/<criterion>/<block>" to [query heads], "neurons/<criterion>/<block>" to [neurons],
    "experts/<criterion>/<block>" to [experts], "expert_neurons/<criterion>/<block>" to [experts * neurons of each],
    "modules/<criterion>" to [sites] and "ranks/<criterion>/<site index>" to [rank]; all float32 on the CPU.

    Example:
        record = EstimationRecord.load("runs/reviews/estimation")
        plan = make_plan(record, light=0.4)
    """

    blocks: list[BlockSpec]
    """Structure of the blocks that were scored."""
    sites: list[SiteSpec]
    """PEFT modules that were scored."""
    scores: dict[str, Tensor]
    """Key -> scores, as above."""
    base_parameters: int
    """Parameters of the base before pruning, without PEFT weights."""
    fingerprint: str
    """Hash of the base that the scores belong to."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Steps, numbers of examples and tokens, settings, seed, versions."""
    left_out: list[BlockSpec] = field(default_factory=list)
    """Blocks of the base above `blocks` that were dropped whole before estimation, and have no scores."""

    def check_scored(self, light: LightConfig) -> None:
        """Check that the record has scores if the settings need any.

        Raises:
            LightPeftError: estimation took no step, because its settings removed nothing, but `light` removes some.
        """
        nothing = "the estimation has no scores, since its settings removed nothing; estimate again with these settings"
        require(self.meta.get("steps") != 0 or not light.uses_scores, nothing)

    @property
    def depth(self) -> float:
        """Fraction of the blocks that was dropped whole."""
        return len(self.left_out) / (len(self.blocks) + len(self.left_out))

    def block_scores(self, kind: str, criterion: str) -> list[Tensor]:
        """Return the scores of one of the `MASKED` units under a criterion, one tensor for each block, maybe empty."""
        scores = (f"{kind}/{criterion}/{block.index}" if getattr(block, kind) else None for block in self.blocks)
        return [torch.zeros(0) if key is None else self._get(key) for key in scores]

    def module_scores(self, criterion: str) -> Tensor:
        """Return the scores of the PEFT modules under a criterion, [sites]."""
        return self._get(f"modules/{criterion}")

    def rank_scores(self, criterion: str) -> list[Tensor]:
        """Return the scores of the ranks under a criterion, one tensor [rank] for each PEFT module."""
        return [self._get(f"ranks/{criterion}/{index}") for index in range(len(self.sites))]

    def _get(self, key: str) -> Tensor:
        if key not in self.scores:
            known = sorted({"/".join(name.split("/")[:2]) for name in self.scores})
            raise LightPeftError(f'the estimation record has no scores "{key}"; choose one of {", ".join(known)}')
        return self.scores[key]

    def check(self) -> None:
        """Check that scores, blocks and PEFT modules match.

        Raises:
            LightPeftError: something does not match.
        """
        _check_specs([*self.blocks, *self.left_out], self.sites)
        numbered = [block.index for block in self.blocks] == list(range(len(self.blocks)))
        require(self.blocks and numbered, "the blocks of the estimation record are not numbered from 0")
        placed = all(site.block is None or site.block < len(self.blocks) for site in self.sites)
        require(placed, "a PEFT module of the estimation record is in a block that the record does not have")
        sizes: dict[str, int] = {}
        for block in self.blocks:
            sizes |= {f"{kind}/{block.index}": getattr(block, kind) for kind in MASKED}
        sizes |= {"modules": len(self.sites)}
        sizes |= {f"ranks/{index}": site.rank for index, site in enumerate(self.sites)}
        for key, scores in self.scores.items():
            kind, _, rest = key.partition("/")
            unit = rest.partition("/")[2]
            size = sizes.get(f"{kind}/{unit}" if unit else kind)
            wrong = f"the scores {key} of the estimation record have shape {tuple(scores.shape)} instead of ({size},)"
            require(scores.shape == (size,), wrong)

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
        """Read a record that `save` wrote.

        Raises:
            LightPeftError: a file is missing, damaged, or of a newer schema version.
        """
        folder = Path(folder)
        data = read_json(folder / "estimation.json")
        check_file(folder, _SCORES, data.get("scores"))
        scores = read_tensors(folder / _SCORES)
        with explain_content_errors(folder / "estimation.json"):
            kept = {key: value for key, value in data.items() if key not in ("schema_version", "scores")}
            record = from_dict(cls, {**kept, "scores": scores})
            record.check()
        return record


@dataclass(frozen=True)
class BlockPlan:
    """Units of one block to keep, as ascending indices into the dense block."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]
    experts: tuple[int, ...] = ()
    expert_neurons: tuple[int, ...] = ()
    """Neurons of all kept experts, equally many of each, numbered over all experts of the dense block."""

    @property
    def expert_width(self) -> int:
        """Intermediate channels of each kept expert."""
        return len(self.expert_neurons) // len(self.experts) if self.experts else 0


@dataclass(frozen=True)
class PrunePlan:
    """The units to keep, as plain data that applies to any copy of the same base.

    Example:
        plan = PrunePlan.load("runs/reviews/plan.json")
        print(plan)  # one row for each block
        apply_plan(model, plan)
    """

    specs: tuple[BlockSpec, ...]
    """Structure of the dense blocks that the indices refer to."""
    blocks: tuple[BlockPlan, ...]
    """Units to keep of each block; blocks of `specs` beyond the last entry are dropped whole."""
    sites: dict[str, tuple[int, ...]]
    """Name of a PEFT module to keep -> its ranks to keep."""
    dense_sites: tuple[SiteSpec, ...]
    """All PEFT modules of the model before pruning."""
    base_parameters: int
    """Parameters of the base before pruning."""
    fingerprint: str
    """Hash of the base that the plan belongs to."""
    budget: dict[str, Any] = field(default_factory=dict)
    """Settings that the plan was made with."""
    train: Train = "peft"
    """Weights that train after pruning: those of the PEFT modules, or all, into which PEFT is merged."""

    @property
    def parts(self) -> list[tuple[BlockSpec, BlockPlan]]:
        """Blocks to keep, each with its units to keep."""
        return list(zip(self.specs, self.blocks, strict=False))

    @property
    def left_out(self) -> tuple[BlockSpec, ...]:
        """Blocks that are dropped whole: the topmost ones."""
        return self.specs[len(self.blocks) :]

    @property
    def removed_parameters(self) -> int:
        """Number of base parameters that the plan removes."""
        return removed_parameters(self.parts, self.left_out)

    @property
    def cuts_blocks(self) -> bool:
        """True if the plan removes parameters of the base's blocks."""
        return self.removed_parameters > 0

    @property
    def cuts_modules(self) -> bool:
        """True if the plan removes PEFT modules, or ranks of them."""
        return self._ranks < self._dense_ranks

    @property
    def _ranks(self) -> int:
        return sum(map(len, self.sites.values()))

    @property
    def _dense_ranks(self) -> int:
        return sum(site.rank for site in self.dense_sites)

    @property
    def removed_ratio(self) -> float:
        """Removed fraction of all base parameters, embeddings included."""
        return self.removed_parameters / self.base_parameters

    @property
    def removed_of_blocks(self) -> float:
        """Removed fraction of the blocks' parameters, norms and biases included."""
        return self.removed_parameters / sum(block_parameters(spec) for spec in self.specs)

    def rows(self) -> list[dict[str, str]]:
        """Return one table row for each block: heads, KV heads, neurons, experts if there are any, and PEFT modules,
        each as kept/dense, and the ranks of the modules."""
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
            "neurons per expert": f"{kept.expert_width}/{spec.expert_width}" if spec.experts else "-",
        }

    def module_ranks(self, spec: BlockSpec) -> dict[str, int]:
        """Return slot of a PEFT module of a block -> number of its ranks to keep; 0: the module is removed."""
        dense = [site for site in self.dense_sites if site.block == spec.index]
        return {str(site.slot): len(self.sites.get(site.name, ())) for site in dense}

    def summary(self) -> str:
        """Return one line with the removed parameters of base and blocks, and the kept PEFT modules and ranks."""
        modules = f"{len(self.sites)} of {len(self.dense_sites)} PEFT modules"
        kept = f"keeps {modules} and {self._ranks} of {self._dense_ranks} ranks"
        if self.train == "all":
            kept = "merges PEFT and trains all remaining weights"
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
        """Convert the plan to plain data for JSON, with kept indices as ranges ("0-3,7")."""
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
        """Convert plain data of `to_dict` to a plan.

        Raises:
            LightPeftError: a part is missing or has another type, or the parts do not match (see `check_fit`).
        """
        facts = from_dict(_PlanFacts, {key: value for key, value in data.items() if key != "schema_version"}, "plan.")
        _check_specs(facts.specs, facts.dense_sites)
        require(
            sum(getattr(spec, kind) for spec in facts.specs for kind in MASKED) <= _MOST_UNITS,
            f"the plan is for a model with more than {_MOST_UNITS:,} heads and neurons, the limit of this format",
        )
        ranks = {site.name: site.rank for site in facts.dense_sites}
        unknown = sorted(facts.sites.keys() - ranks)
        require(not unknown, f"the plan keeps a PEFT module that dense_sites does not list: {', '.join(unknown[:1])}")
        plan = cls(
            specs=tuple(facts.specs),
            blocks=tuple(_block_plan(*pair) for pair in zip(facts.specs, facts.blocks, strict=False)),
            sites={name: from_ranges(kept, ranks[name]) for name, kept in facts.sites.items()},
            dense_sites=tuple(facts.dense_sites),
            base_parameters=facts.base_parameters,
            fingerprint=facts.fingerprint,
            budget=facts.budget,
            train=facts.train,
        )
        require(len(facts.blocks) <= len(facts.specs), "the plan has more blocks than specs")
        check_fit(plan)
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read a plan that `save` wrote.

        Raises:
            LightPeftError: the file is missing, damaged, or of a newer schema version.
        """
        data = read_json(path)
        with explain_content_errors(path):
            return cls.from_dict(data)


def check_fit(plan: PrunePlan) -> None:
    """Check that the units to keep of a plan exist in its dense structure, and fit each other.

    Raises:
        LightPeftError: an index is out of range, or units do not fit each other.
    """
    require(0 < len(plan.blocks) <= len(plan.specs), "the plan has no blocks, or more blocks than specs")
    for spec, kept in plan.parts:
        groups = sorted({head // spec.heads_per_kv for head in kept.heads})
        fits = list(kept.kv_heads) == groups and len(kept.heads) % max(len(groups), 1) == 0
        require(fits, f"block {spec.label} of the plan keeps query heads that do not match its KV heads")
        _check_indices(kept.heads, spec.heads, f"heads of block {spec.label}")
        _check_indices(kept.neurons, spec.neurons, f"neurons of block {spec.label}")
        _check_experts(spec, kept)
    dense = {site.name: site.rank for site in plan.dense_sites}
    for name, ranks in plan.sites.items():
        require(name in dense, f"the plan keeps a PEFT module that dense_sites does not list: {name}")
        _check_indices(ranks, dense[name], f"ranks of {name}")
    gone = {spec.index for spec in plan.left_out}
    above = {site.name for site in plan.dense_sites if site.block in gone} & plan.sites.keys()
    require(not above, f"the plan keeps a PEFT module in a block that it drops: {', '.join(sorted(above)[:1])}")


def _check_indices(kept: Sequence[int], dense: int, what: str) -> None:
    inside = list(kept) == sorted(set(kept)) and max(kept, default=-1) < dense
    require(inside, f"the {what} that the plan keeps are not ascending indices below {dense}")


def _check_experts(spec: BlockSpec, kept: BlockPlan) -> None:
    """Check that a plan keeps enough experts for the router, equally many of every group, with equally many neurons."""
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
    require(even, f"block {spec.label} of the plan does not keep equally many neurons of every kept expert")


def removed_in_block(spec: BlockSpec, kept: BlockPlan) -> int:
    """Count the parameters of a block that are removed when only `kept` is kept."""
    return (
        (spec.heads - len(kept.heads)) * spec.head_parameters
        + (spec.kv_heads - len(kept.kv_heads)) * spec.kv_parameters
        + (spec.neurons - len(kept.neurons)) * spec.neuron_parameters
        + (spec.experts - len(kept.experts)) * spec.expert_parameters
        + len(kept.experts) * (spec.expert_width - kept.expert_width) * spec.expert_neuron_parameters
        + (0 if kept.heads else spec.rest_parameters)
    )


def removed_parameters(parts: Iterable[tuple[BlockSpec, BlockPlan]], left_out: Iterable[BlockSpec]) -> int:
    """Count the parameters that are removed from some blocks, and those of blocks that are dropped whole."""
    return sum(removed_in_block(*part) for part in parts) + sum(map(block_parameters, left_out))


def removable_parameters(spec: BlockSpec) -> int:
    """Count the parameters of a block that pruning can remove."""
    return removed_in_block(spec, BlockPlan((), (), ()))


def block_parameters(spec: BlockSpec) -> int:
    """Count all parameters of a dense block."""
    return removable_parameters(spec) + spec.fixed_parameters


def to_ranges(indices: Sequence[int]) -> str:
    """Format ascending indices as ranges: (0, 1, 2, 5) -> "0-2,5"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def from_ranges(text: str, below: int) -> tuple[int, ...]:
    """Parse the indices that `to_ranges` wrote, which must be ascending and below `below`.

    Raises:
        LightPeftError: the indices are not; it is raised before any range is expanded.
    """
    bounds = [part.split("-") for part in text.split(",") if part]
    ends = [(int(bound[0]), int(bound[-1])) for bound in bounds]
    before = -1
    for first, last in ends:
        require(before < first <= last < below, f"{text[:40]!r} are not ascending indices below {below}")
        before = last
    return tuple(index for first, last in ends for index in range(first, last + 1))


_MOST_UNITS = 2**23
"""Maximum number of heads and neurons of a plan's model; 100 layers of 53,248 neurons have 5 million."""


_MOST_COUNTED = 2**40
"""Upper bound of every count of a block, parameters included."""


def _check_specs(blocks: Sequence[BlockSpec], sites: Sequence[SiteSpec]) -> None:
    """Check that the counts of specs that were read from a file are possible for a dense model."""
    for part in (*blocks, *sites):
        for name, value in vars(part).items():
            possible = type(value) is not int or 0 <= value < _MOST_COUNTED
            require(possible, f"{type(part).__name__} {getattr(part, 'label', '')} has an invalid {name}: {value}")
    for spec in blocks:
        grouped = spec.heads % spec.kv_heads == 0 if spec.kv_heads else not spec.heads
        place = f"block {spec.label or spec.index}"
        require(grouped, f"{place} cannot share {spec.kv_heads} KV heads among {spec.heads} heads")
        even = spec.needed_experts <= spec.experts and spec.expert_neurons == spec.experts * spec.expert_width
        even = even and spec.expert_groups > 0 and spec.experts % spec.expert_groups == 0
        require(even, f"{place} has invalid counts of experts")


@dataclass(frozen=True)
class _PlanFacts:
    """Types of the entries of a plan's file."""

    specs: list[BlockSpec]
    blocks: list[dict[str, str]]
    sites: dict[str, str]
    dense_sites: list[SiteSpec]
    base_parameters: int
    fingerprint: str
    budget: dict[str, Any]
    train: Train = "peft"


def _block_plan(spec: BlockSpec, kept: dict[str, str]) -> BlockPlan:
    """Convert the ranges of a block in a plan's file to a `BlockPlan`."""
    dense = {name: getattr(spec, name) for name in ("kv_heads", *MASKED)}
    return BlockPlan(**{name: from_ranges(kept[name], below) for name, below in dense.items()})
