"""What is written down between the stages: scores, plans. Versioned JSON and safetensors, never pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightpeft.errors import LightPeftError, require
from lightpeft.structure import BlockSpec, SiteSpec

SCHEMA_VERSION = 1
"""Version of every JSON file written here; files of a newer version are refused."""


@dataclass
class EstimationRecord:
    """Scores of every unit under every criterion, and how they were obtained.

    `scores` maps "heads/<criterion>/<block>" to [query heads], "neurons/<criterion>/<block>" to [neurons],
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
    """Steps, tokens, settings, seed, loss, history of `length: auto`, versions."""
    left_out: list[BlockSpec] = field(default_factory=list)
    """Blocks of the base above `blocks` that were left out whole before estimation, and have no scores."""

    def of_blocks(self, kind: str, criterion: str) -> list[Tensor]:
        """Scores of "heads" or "neurons" under a criterion, one tensor a block."""
        return [self._get(f"{kind}/{criterion}/{block.index}") for block in self.blocks]

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

    def save(self, folder: str | Path) -> None:
        """Write `estimation.json` and `scores.safetensors` into `folder`."""
        with writing_files(folder, last="estimation.json") as temporary:
            write_json(
                temporary / "estimation.json",
                {
                    "base_parameters": self.base_parameters,
                    "fingerprint": self.fingerprint,
                    "meta": self.meta,
                    "blocks": [asdict(block) for block in self.blocks],
                    "left_out": [asdict(block) for block in self.left_out],
                    "sites": [asdict(site) for site in self.sites],
                },
            )
            save_file({key: value.contiguous() for key, value in self.scores.items()}, temporary / "scores.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> EstimationRecord:
        """Read what `save` wrote.

        Raises:
            LightPeftError: a file is missing, damaged, or of a newer schema.
        """
        folder = Path(folder)
        data = read_json(folder / "estimation.json")
        try:
            scores = load_file(folder / "scores.safetensors")
        except (OSError, SafetensorError) as error:
            raise LightPeftError(f"{folder / 'scores.safetensors'} cannot be read: {error}") from error
        with understandable(folder / "estimation.json"):
            return cls(
                blocks=[BlockSpec(**block) for block in data["blocks"]],
                sites=[SiteSpec(**site) for site in data["sites"]],
                scores=scores,
                base_parameters=data["base_parameters"],
                fingerprint=data["fingerprint"],
                meta=data["meta"],
                left_out=[BlockSpec(**block) for block in data.get("left_out", [])],
            )


@dataclass(frozen=True)
class BlockPlan:
    """What stays of one block, as indices into the dense block."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]


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
    def removed_ratio(self) -> float:
        """Base parameters removed over all base parameters, embeddings included."""
        return self.removed_parameters / self.base_parameters

    @property
    def removed_of_blocks(self) -> float:
        """Base parameters removed over all that the blocks have, norms and biases included."""
        return self.removed_parameters / sum(block_parameters(spec) for spec in self.specs)

    def rows(self) -> list[dict[str, str]]:
        """One row a block: heads, KV heads, neurons and PEFT modules with their ranks, each as kept/dense."""
        return [self._row(spec, kept) for spec, kept in zip_longest(self.specs, self.blocks)]

    def _row(self, spec: BlockSpec, kept: BlockPlan | None) -> dict[str, str]:
        removed = 1.0 if kept is None else removed_in_block(spec, kept) / block_parameters(spec)
        kept = kept or BlockPlan((), (), ())
        dense = [site for site in self.dense_sites if site.block == spec.index]
        stay = [site for site in dense if site.name in self.sites]
        modules = " ".join(f"{site.slot}:{len(self.sites[site.name])}" for site in stay)
        return {
            "layer": spec.label or str(spec.index),
            "heads": f"{len(kept.heads)}/{spec.heads}",
            "kv heads": f"{len(kept.kv_heads)}/{spec.kv_heads}",
            "neurons": f"{len(kept.neurons)}/{spec.neurons}" if spec.neurons else "-",
            "removed": f"{removed:.0%}",
            "modules": f"{len(stay)}/{len(dense)}",
            "module:ranks": modules or "-",
        }

    def summary(self) -> str:
        """One line: what part of the base, of its blocks, of the PEFT modules and of their ranks goes."""
        ranks = sum(len(kept) for kept in self.sites.values())
        dense_ranks = sum(site.rank for site in self.dense_sites)
        whole = f"{len(self.left_out)} of {len(self.specs)} blocks whole; " if self.left_out else ""
        return (
            f"removes {self.removed_parameters:,} of {self.base_parameters:,} base parameters "
            f"({self.removed_ratio:.1%}; {self.removed_of_blocks:.1%} of the blocks'); {whole}"
            f"keeps {len(self.sites)} of {len(self.dense_sites)} PEFT modules and {ranks} of {dense_ranks} ranks"
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
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PrunePlan:
        """The plan that `to_dict` described.

        Raises:
            ValueError: the parts do not fit each other (see `check_fit`).
            KeyError, TypeError, AttributeError: a part is missing or of another kind.
        """
        plan = cls(
            specs=tuple(BlockSpec(**spec) for spec in data["specs"]),
            blocks=tuple(BlockPlan(**{k: from_ranges(v) for k, v in block.items()}) for block in data["blocks"]),
            sites={name: from_ranges(ranks) for name, ranks in data["sites"].items()},
            dense_sites=tuple(SiteSpec(**site) for site in data["dense_sites"]),
            base_parameters=data["base_parameters"],
            fingerprint=data["fingerprint"],
            budget=data["budget"],
        )
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
    dense = {site.name: site.rank for site in plan.dense_sites}
    for name, ranks in plan.sites.items():
        require(name in dense, f"the plan keeps a PEFT module {name} that there was not")
        _check_indices(ranks, dense[name], f"ranks of {name}")
    above = {name for spec in plan.left_out for name in spec.projections.values()} & plan.sites.keys()
    require(not above, f"the plan keeps a PEFT module in a block that it leaves out: {', '.join(sorted(above)[:1])}")


def _check_indices(kept: Sequence[int], dense: int, what: str) -> None:
    inside = list(kept) == sorted(set(kept)) and max(kept, default=-1) < dense
    require(inside, f"the {what} that the plan keeps are not ascending indices below {dense}")


def removed_in_block(spec: BlockSpec, kept: BlockPlan) -> int:
    """Parameters of a block that go when `kept` stays."""
    return (
        (spec.heads - len(kept.heads)) * spec.head_parameters
        + (spec.kv_heads - len(kept.kv_heads)) * spec.kv_parameters
        + (spec.neurons - len(kept.neurons)) * spec.neuron_parameters
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


def from_ranges(text: str) -> tuple[int, ...]:
    """The indices that `to_ranges` wrote."""
    bounds = [part.split("-") for part in text.split(",") if part]
    return tuple(index for bound in bounds for index in range(int(bound[0]), int(bound[-1]) + 1))


@contextmanager
def understandable(path: str | Path) -> Iterator[None]:
    """Turn the errors of reading unexpected content into one line about the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, LightPeftError) else repr(error)
        raise LightPeftError(f"{path} does not have the expected content ({reason}); was it edited?") from error


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Write `data` with the schema version, to a temporary name that is moved into place."""
    write_text(path, json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write text to a temporary name that is moved into place.

    Raises:
        LightPeftError: it cannot be written.
    """
    with replacing(path) as file:
        file.write(text)


@contextmanager
def replacing(path: str | Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when it is complete, and vanishes if writing fails.

    Raises:
        LightPeftError: it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise LightPeftError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        LightPeftError: the file is missing, not JSON, or of a newer schema.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LightPeftError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LightPeftError(f"{path} cannot be read: {error}") from error
    require(isinstance(data, dict), f"{path} does not hold a JSON object")
    version = data.get("schema_version")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise LightPeftError(
            f"{path} has schema version {version}, this lightpeft reads up to {SCHEMA_VERSION}; upgrade lightpeft"
        )
    return data


@contextmanager
def writing_files(folder: str | Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends well; other files there stay.

    Args:
        last: the file that moves last: it describes the others, so a reader can tell a set that is not whole.

    Raises:
        LightPeftError: the disk is full or the place cannot be written; no file of `folder` is half-written.
    """
    folder = Path(folder)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        folder.mkdir(exist_ok=True)
        _move_files(temporary, folder, last)
    except (OSError, SafetensorError) as error:
        raise LightPeftError(f"cannot write {folder}: {error}; nothing was changed") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_files(source: Path, folder: Path, last: str) -> None:
    """Move all files of `source` into `folder`, `last` at the end; when one cannot be moved, the old ones come back."""
    names = sorted((file.name for file in source.iterdir()), key=lambda name: name == last)
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        for name in reversed(names):
            if (folder / name).exists():
                (folder / name).replace(old / name)
        for name in names:
            (source / name).replace(folder / name)
    except OSError:
        for name in names:
            if not (source / name).exists():
                (folder / name).unlink(missing_ok=True)
        for file in old.iterdir():
            file.rename(folder / file.name)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
