"""Reuse of what runs have computed before: an estimation by runs that differ in the budget alone, and the logits of a
teacher by runs on the same rows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.folders.stored_config import flat, is_run
from lightpeft.app.runs.workspace import check_steps
from lightpeft.config import READ_AFTERWARDS, READ_BY_PLANS, SWITCHES, RunConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import CHECKSUMS, append_line, read_json, replacing_folder, write_json
from lightpeft.machine import processes
from lightpeft.plans.estimation_record import RECORD, EstimationRecord
from lightpeft.plans.planning import make_plan


def estimation_settings(config: RunConfig) -> dict[str, Any]:
    """Return all settings that the scores depend on, by dotted name."""
    later = READ_AFTERWARDS | READ_BY_PLANS | {"preset"}
    if config.light.remove.depth == "auto":
        later -= {"remove.blocks"}  # which bounds what is left out before
    skipped = {"output", *(f"light.{name}" for name in later), *(f"model.{name}" for name in SWITCHES)}
    return {name: value for name, value in flat(asdict(config)).items() if name not in skipped}


def find_estimation(config: RunConfig, folder: Path) -> RunFolder:
    """Find the run in a folder and check that another run can reuse its estimation.

    Raises:
        LightPeftError: the estimation is missing or damaged, was made with other settings or another number of rows
            per step, or no plan from it meets the budget.
    """
    require(is_run(folder), f"--estimation {folder} is not a run folder; give the folder of a run")
    own = folder.resolve() == Path(config.output).resolve()
    require(not own, f"--estimation {folder} is the output of this run; give the folder of another run")
    donor = RunFolder.at(folder)
    methods = sorted({config.method, donor.config.method})
    require(
        methods == ["light"],
        f"--estimation: runs of method {' and '.join(methods)} share no estimation; both must be light",
    )
    donor.need("estimate", "reusing its estimation")
    given, there = estimation_settings(config), estimation_settings(donor.config)
    differing = sorted(name for name in given.keys() | there.keys() if given.get(name) != there.get(name))
    require(
        not differing,
        f"the estimation of {folder} was made with other settings ({', '.join(differing)}); set the same, or leave "
        "--estimation out",
    )
    record = EstimationRecord.load(donor.estimation)  # it is whole
    record.check_scored(config.light)
    check_steps(config, donor, record)
    if not config.light.is_auto:
        make_plan(record, config.light)  # and the budget can be met
    return donor


def take_estimation(run: RunFolder, donor: RunFolder) -> None:
    """Copy the estimation of another run into a run, unless the run has the same one already.

    Raises:
        LightPeftError: the run has another estimation, or the copy fails.
    """
    if not run.has("estimate"):
        copy_estimation(donor, run, str(donor.path))
        return
    same = read_json(run.estimation / RECORD) == read_json(donor.estimation / RECORD)
    require(same, f"{run.path} has an estimation of its own; set another output, or leave --estimation out")


def copy_estimation(donor: RunFolder, run: RunFolder, name: str) -> None:
    """Copy an estimation, whole or not at all; log its origin, and count its time and memory for both runs.

    Args:
        name: name of the donor in the log.

    Raises:
        LightPeftError: the donor's estimation is unfinished, or the copy fails.
    """
    if "estimate" not in donor.finished_stages():
        raise LightPeftError(
            f"{donor.path} has not finished its estimation; run lightpeft estimate --run {donor.path} first"
        )
    with run.held():
        if donor.has("depth") and processes().is_main_process:
            write_json(run.depth, read_json(donor.depth))
        _copy_stages(donor, run, name, donor.estimation, RECORD, ("depth", "estimate"))


def copy_teacher_logits(donor: RunFolder, run: RunFolder, name: str) -> None:
    """Copy the teacher's logits, whole or not at all; log their origin, and count their time for both runs.

    A run for which they turn out to be of another teacher or of other rows computes its own.

    Args:
        name: name of the donor in the log.

    Raises:
        LightPeftError: the copy fails.
    """
    with run.held():
        _copy_stages(donor, run, name, donor.teacher, CHECKSUMS, ("teach",))


def _copy_stages(donor: RunFolder, run: RunFolder, name: str, result: Path, last: str, stages: Sequence[str]) -> None:
    """Copy the folder that stages left, and their log entries.

    Args:
        last: the file of the folder that says that it is whole.
        stages: stages that led to it; the donor may not have had all of them.
    """
    if processes().is_main_process:
        finished = donor.finished_stages()
        with replacing_folder(run.path / result.name, last=last) as temporary:
            shutil.copytree(result, temporary, dirs_exist_ok=True)
            for stage in [stage for stage in stages if stage in finished]:
                append_line(run.log, {**finished[stage], "taken_from": name})
    processes().wait_for_everyone()
