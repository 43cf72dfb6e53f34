"""The plan, which units to keep, as versioned JSON that applies to any copy of the same base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightpeft.config.light import Train
from lightpeft.config.validation import from_dict
from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_json, write_json
from lightpeft.plans.block_plan import BlockPlan, block_parameters, removed_in_block, removed_parameters
from lightpeft.plans.ranges import from_ranges, to_ranges
from lightpeft.plans.structure import MASKED, BlockSpec, SiteSpec, check_specs

_MOST_UNITS = 2**23
"""Maximum number of heads and neurons of a plan's model; 100 layers of 53,248 neurons have 5 million."""


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
        check_specs(facts.specs, facts.dense_sites)
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
