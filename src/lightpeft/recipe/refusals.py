"""What cannot work with a model that is cut on the way, each in one line before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightpeft.errors import require
from lightpeft.machine import sharding_launched
from lightpeft.models.on_disk import has_weights_on_disk
from lightpeft.recipe.probes import rows_aside

if TYPE_CHECKING:
    from lightpeft.recipe.trainer import LightTraining


def check_light(training: LightTraining) -> None:
    """Refuse what cannot work with a model that is cut on the way.

    Raises:
        LightPeftError: saying what does.
    """
    trainer: Any = training
    args = trainer.args
    engines = {
        "torch.compile": args.torch_compile,
        "DataParallel in one process": args.n_gpu > 1,
        "auto_find_batch_size": args.auto_find_batch_size,
    }
    found = next((name for name, used in engines.items() if used), None)
    hint = "; start one process a GPU with accelerate launch" if found and found.startswith("DataParallel") else ""
    require(found is None, f"{found} cannot follow a model that is cut on the way; train without it{hint}")
    alone = "weights on disk are for training in one process; load the model without weights_on_disk"
    require(args.world_size == 1 or not has_weights_on_disk(trainer.model), alone)
    if training._shards:
        _check_sharded(training)
    if training.light_config.blocks == "auto" and training.light_plan is None:
        training.light_tolerance()
        rows_aside(trainer, 0)
    reference = getattr(trainer, "ref_model", trainer) is None and not getattr(args, "precompute_ref_log_probs", 0)
    require(
        not reference or not getattr(args, "beta", 0),
        f"{type(training).__name__} would take the cut model as its own reference; give the dense one as ref_model=, "
        "or set beta to 0",
    )


def _check_sharded(training: LightTraining) -> None:
    light, trainer = training.light_config, cast(Any, training)
    probes = "light.blocks: auto probes copies of the model, which cannot be made of one that FSDP shards"
    require(light.blocks != "auto" or training.light_plan is not None, f"{probes}; give light.blocks as a number")
    kept = f"light.keep: {light.keep} needs the whole base in every process, which FSDP spares"
    require(light.keep == "light", f"{kept}; set it to light")
    quantised = any(getattr(module, "is_quantized", False) for module in trainer.model.modules())
    require(not quantised, "a base in 4 or 8 bits cannot be cut where FSDP shards it; give it unquantised")


def refuse_deepspeed(setting: object) -> None:
    """Refuse to train in DeepSpeed, which the launcher or a setting asks for.

    Args:
        setting: `deepspeed` of the training arguments.

    Raises:
        LightPeftError: saying what does the same.
    """
    require(
        not setting and not sharding_launched("DEEPSPEED"),
        "DeepSpeed takes its step inside the backward pass, before masks could be scored, and holds on to the dense "
        "model's parameters behind a cut; cut first (lightpeft prune) and fine-tune the light model with transformers' "
        "Trainer (docs/trainers.md#deepspeed), or share weights by FSDP2 (configs/engines/fsdp2.yaml)",
    )
