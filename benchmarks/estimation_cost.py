"""What masks and importances cost: the estimation stage beside PEFT on the same sites, in alternation.

    python benchmarks/estimation_cost.py configs/movie_reviews/minilm_default.yaml

Modules sit in every block, so that PEFT alone runs backwards through all of them too; the last subject but one is
estimation as the config has it. All but the last train with the faster steps of light runs, and modules whose ratios
are being measured are computed by their parts; the last is PEFT as it trains by itself, with the base's dropout. Prints
and writes training speed and peak memory. Paths inside the config are relative to the current folder.
"""

from __future__ import annotations

import sys

import subjects

from lightpeft.app.runs.bench import Build, Made, accelerating, adamw
from lightpeft.app.runs.pipeline import Workspace
from lightpeft.config import RunConfig
from lightpeft.peft_kinds.placing import add_peft

PLAIN, EVERY_STEP = "PEFT in every block", "with masks and importances, ratios in every step"
SAMPLED, AS_IT_IS = "with masks and importances", "estimation as the config has it"
BY_HABIT = "PEFT in every block, without the faster steps"


def same_sites(work: Workspace) -> Made:
    """The model that estimation starts with, without masks and observers."""
    return add_peft(work.dense_model(), work.config), adamw(work)


def subjects_of(config: RunConfig) -> subjects.Subjects:
    """What is measured."""
    everywhere = subjects.with_settings(config, {"light.module_blocks": 1.0})
    return {
        PLAIN: (Build(same_sites, accelerating), everywhere),
        EVERY_STEP: ("estimation", subjects.with_settings(everywhere, {"light.ratio_every": 1})),
        SAMPLED: ("estimation", everywhere),
        AS_IT_IS: ("estimation", config),
        BY_HABIT: (Build(same_sites), everywhere),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    return subjects.main("estimation_cost", __doc__ or "", subjects_of, arguments)


if __name__ == "__main__":
    sys.exit(main())
