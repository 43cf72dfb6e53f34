"""The main path works without any private name of a library; what needs one says so in a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from missing_names import SOURCE, private_names

WORKER = Path(__file__).with_name("missing_names.py")
NAMES = private_names()


def outcomes(folder: Path, *cases: tuple[list[str], bool]) -> list[str]:
    """What becomes of the main path without each group of names; where a case says so, of going on instead."""
    path = os.pathsep.join([str(WORKER.parent), str(SOURCE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    words = [sys.executable, str(WORKER), str(folder)]
    done = subprocess.run(words, input=json.dumps(cases), env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_counts_as_private() -> None:
    """Of what the source imports and reads, found and not written down: a few of each sort."""
    assert len(NAMES) > 60
    assert {"._optimizers", "._load_rng_state", "._fsdp_param_group"} <= set(NAMES), "attributes, and what is extended"
    assert {"torch._subclasses.fake_tensor:FakeTensor", "peft.tuners.tuners_utils:BaseTunerLayer"} <= set(NAMES)
    assert not [name for name in NAMES if name.startswith(("transformers:", "peft:", "torch.distributed.fsdp:"))]


def test_the_main_path_needs_none_of_them_and_going_on_needs_some(tmp_path: Path) -> None:
    """Estimate, cut, train, save and load BERT and Llama with LoRA, without all private names at once.

    Going on from a checkpoint refuses in a line that names feature, versions and what is not there.
    """
    main_path, going_on = outcomes(tmp_path, (NAMES, False), (["._load_rng_state"], True))
    assert main_path == ""
    assert going_on.startswith("LightPeftError: Resuming from a checkpoint works with transformers 5.5 to")
    assert "transformers has no Trainer._load_rng_state" in going_on and "\n" not in going_on


@pytest.mark.thorough
def test_the_main_path_needs_no_single_one(tmp_path: Path) -> None:
    """Where one is there and another one is not, too."""
    found = outcomes(tmp_path, *(([name], False) for name in NAMES))
    assert dict(zip(NAMES, found, strict=True)) == dict.fromkeys(NAMES, "")
