"""Estimation does not depend on what is removed, so runs that differ in nothing else share one."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightpeft.app.folders.run_folder import RunFolder, flat, is_run
from lightpeft.app.runs.workspace import check_steps
from lightpeft.config import READ_AFTERWARDS, READ_BY_PLANS, SWITCHES, RunConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import append_line, read_json, replacing_folder, write_json
from lightpeft.machine import processes
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord

_RECORD = "estimation.json"
"""File of an estimation that has the checksum of its scores."""


def estimation_settings(config: RunConfig) -> dict[str, Any]:
    """All settings that the scores depend on, by their dotted names."""
    later = READ_AFTERWARDS | READ_BY_PLANS | {"preset"}
    if config.light.remove.depth == "auto":
        later -= {"remove.blocks"}  # which bounds what is left out before
    skipped = {"output", *(f"light.{name}" for name in later), *(f"model.{name}" for name in SWITCHES)}
    return {name: value for name, value in flat(asdict(config)).items() if name not in skipped}


def find_estimation(config: RunConfig, folder: Path) -> RunFolder:
    """The run in a folder, whose estimation another run can take.

    Args:
        config: of the run that takes it.

    Raises:
        LightPeftError: there is none, it is damaged, it was made with other settings or by steps of other rows, or it
            leaves no plan that meets the budget.
    """
    require(is_run(folder), f"{folder} is not a run folder, whose estimation could be taken")
    own = folder.resolve() == Path(config.output).resolve()
    require(not own, f"{folder} is the output; give the folder of another run")
    donor = RunFolder.at(folder)
    methods = sorted({config.method, donor.config.method})
    require(methods == ["light"], f"runs of method {' and '.join(methods)} share no estimation; both must be light")
    donor.need("estimate", "taking its estimation")
    given, there = estimation_settings(config), estimation_settings(donor.config)
    differing = sorted(name for name in given.keys() | there.keys() if given.get(name) != there.get(name))
    require(
        not differing,
        f"the estimation of {folder} was made with other settings ({', '.join(differing)}); give the same, or leave "
        "--estimation out",
    )
    record = EstimationRecord.load(donor.estimation)  # it is whole
    record.check_scored(config.light)
    check_steps(config, donor, record)
    if not config.light.is_auto:
        make_plan(record, config.light)  # and the budget can be met
    return donor


def take_estimation(run: RunFolder, donor: RunFolder) -> None:
    """Give a run the estimation of another one, unless it has this one already.

    Raises:
        LightPeftError: the run has another one, or it cannot be copied.
    """
    if not run.has("estimate"):
        copy_estimation(donor, run, str(donor.path))
        return
    same = read_json(run.estimation / _RECORD) == read_json(donor.estimation / _RECORD)
    require(same, f"{run.path} has an estimation of its own; give another output, or leave out --estimation")


def copy_estimation(donor: RunFolder, run: RunFolder, name: str) -> None:
    """Copy one that fits: whole or not at all; the log says whose it is, and its time and memory count for both.

    Args:
        name: what the other run is called in the log.

    Raises:
        LightPeftError: it cannot be copied.
    """
    stages = donor.finished_stages()
    if "estimate" not in stages:
        raise LightPeftError(f"{donor.path} has not finished its estimation; go on with it first: lightpeft estimate")
    with run.held():
        if processes().is_main_process:
            if donor.has("depth"):
                write_json(run.depth, read_json(donor.depth))
            with replacing_folder(run.estimation, last=_RECORD) as temporary:
                shutil.copytree(donor.estimation, temporary, dirs_exist_ok=True)
                for stage in [stage for stage in ("depth", "estimate") if stage in stages]:
                    append_line(run.log, {**stages[stage], "taken_from": name})
        processes().wait_for_everyone()
