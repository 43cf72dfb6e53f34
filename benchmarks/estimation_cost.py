"""What masks and importances cost: the estimation stage beside PEFT on the same sites, in alternation.

    python benchmarks/estimation_cost.py configs/movie_reviews/minilm_default.yaml

Modules sit in every block, so that PEFT alone runs backwards through all of them too; the last subject is estimation as
the config has it. All train with the faster steps of light runs, but LoRA layers whose parts are watched are computed
by their parts, as in estimation. Prints and writes training speed and peak memory. Paths inside the config are relative
to the current folder.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import subjects

from lightpeft import pipeline
from lightpeft.bench import Build, Made, adamw
from lightpeft.config import RunConfig
from lightpeft.families import block_specs
from lightpeft.loading import add_peft
from lightpeft.pipeline import Workspace
from lightpeft.sites import find_sites, transformers_model

PLAIN, WATCHED = "PEFT in every block", "the same, its parts watched"
MASKED, AS_IT_IS = "with masks and importances", "estimation as the config has it"


def same_sites(work: Workspace) -> Made:
    """The model that estimation starts with, without masks and observers."""
    return add_peft(pipeline.dense_model(work), work.config), adamw(work)


def watched(work: Workspace) -> Made:
    """The same with the hooks of the module importance, which measure nothing."""
    model, optimizer = same_sites(work)
    for site in find_sites(model, block_specs(transformers_model(model))):
        site.observe(lambda *_: None, lambda: False)
    return model, optimizer


def subjects_of(config: RunConfig) -> subjects.Subjects:
    """What is measured."""
    everywhere = replace(config, light=replace(config.light, module_blocks=1.0))
    return {
        PLAIN: (Build(same_sites, pipeline.accelerating), everywhere),
        WATCHED: (Build(watched, pipeline.accelerating), everywhere),
        MASKED: ("estimation", everywhere),
        AS_IT_IS: ("estimation", config),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    return subjects.main("estimation_cost", __doc__ or "", subjects_of, arguments)


if __name__ == "__main__":
    sys.exit(main())
