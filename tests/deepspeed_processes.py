"""What `test_deepspeed.py` runs in two processes: a light model in transformers' own `Trainer`, under some engine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import without_dropout
from torch import nn
from training import trainer

from lightpeft import accelerated, load_light


def main(light: Path, base: Path, out: Path) -> None:
    """Fine-tune, and leave in `out` what this process holds of the model, and the adapter."""
    model = without_dropout(load_light(light, base=str(base), is_trainable=True))
    training = trainer(model, out, max_steps=20, per_device_train_batch_size=4, logging_steps=1, ddp_backend="gloo")
    with accelerated(model):
        training.train()
    losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    torch.save({"losses": losses, "held": held(model)}, out / f"rank{os.environ['RANK']}.pt")
    training.save_model(str(out / "adapter"))


def held(model: nn.Module) -> int:
    """Numbers of the model that lie in this process."""
    parameters: list[Any] = list(model.parameters())
    return sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in parameters)


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
    torch.distributed.destroy_process_group()
