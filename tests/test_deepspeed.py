"""Light models that are fine-tuned in DeepSpeed must become what they become in DDP.

DeepSpeed compiles on first use, and lives in an environment of its own (`make test-deepspeed`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from tiny import make, plan_for, with_lora
from torch import Tensor
from workbench import in_other_process, needs_deepspeed

from lightpeft import load_light
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan

WORKER = Path(__file__).with_name("deepspeed_processes.py")
ZERO3 = Path(__file__).with_name("zero3.yaml")


@pytest.fixture(scope="module", params=["bert", "llama-gqa"])
def light(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense base and, in `light`, an adapter that cuts it."""
    folder = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(folder / "base")
    model = with_lora(make(request.param))
    plan = plan_for(model)
    apply_plan(model, plan)
    as_light(model, plan).save_pretrained(folder / "light")
    return folder


def fine_tuned(folder: Path, name: str, *launcher: object) -> list[dict[str, Any]]:
    """What the two processes of a launcher found."""
    out = folder / name
    out.mkdir()
    done = in_other_process(*launcher, WORKER, folder / "light", folder / "base", out)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]


def opened(folder: Path, adapter: str) -> dict[str, Tensor]:
    """Weights of a light model, by name."""
    return dict(load_light(folder / adapter, base=str(folder / "base")).named_parameters())


@needs_deepspeed
def test_light_models_are_fine_tuned_in_deepspeed(light: Path) -> None:
    usual = fine_tuned(light, "ddp", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    launch = ("accelerate.commands.launch", "--config_file", ZERO3, "--zero_stage")
    found = {f"zero{stage}": fine_tuned(light, f"zero{stage}", *launch, stage) for stage in (2, 3)}
    start, expected = opened(light, "light"), opened(light, "ddp/adapter")
    assert not all(weight.equal(start[name]) for name, weight in expected.items())
    for engine, ranks in found.items():
        assert ranks[0]["losses"] == pytest.approx(usual[0]["losses"], rel=1e-5)
        for name, weight in opened(light, f"{engine}/adapter").items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=f"{engine}: {name}")
    everything = sum(weight.numel() for weight in start.values())
    assert [rank["held"] for rank in found["zero2"]] == [everything, everything]
    assert all(rank["held"] <= 0.52 * everything for rank in found["zero3"]), "weights are shared"


def test_the_engine_of_the_documentation_is_one_that_accelerate_knows() -> None:
    config: Any = load_config_from_file(str(ZERO3))
    assert config.deepspeed_config["zero_stage"] == 3 and config.num_processes == 2
    assert launch_command_parser().parse_args(["--config_file", str(ZERO3), "--zero_stage", "2", "script.py"])
