"""The scores that estimation hands to the plan, as versioned JSON and safetensors, never pickle."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightpeft.config import LightConfig
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
from lightpeft.plans.structure import MASKED, BlockSpec, SiteSpec, check_specs

RECORD = "estimation.json"
"""File of an estimation, with the checksum of its scores."""
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
        check_specs([*self.blocks, *self.left_out], self.sites)
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
        with replacing_folder(folder, last=RECORD) as temporary:
            write_tensors(temporary / _SCORES, self.scores)
            write_json(
                temporary / RECORD,
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
        data = read_json(folder / RECORD)
        check_file(folder, _SCORES, data.get("scores"))
        scores = read_tensors(folder / _SCORES)
        with explain_content_errors(folder / RECORD):
            kept = {key: value for key, value in data.items() if key not in ("schema_version", "scores")}
            record = from_dict(cls, {**kept, "scores": scores})
            record.check()
        return record
