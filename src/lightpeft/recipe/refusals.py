"""Checks before training: each setting that cannot work with a model that is cut ends in one line."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftConfig
from torch import nn

from lightpeft.errors import require
from lightpeft.models.on_disk import has_weights_on_disk
from lightpeft.models.sharding import is_sharded
from lightpeft.prune.fingerprint import check_stored
from lightpeft.prune.length import StageLength, fit_stage
from lightpeft.recipe.host import LightHost
from lightpeft.training.prefix import PrefixCache
from lightpeft.training.schedule import name_of_length, pace_of_steps, steps_of


def check_light(trainer: LightHost, *, sharded: bool) -> None:
    """Refuse settings that cannot work with a model that is cut during training.

    Args:
        sharded: True if FSDP shards the model.

    Raises:
        LightPeftError: naming the setting and its replacement.
    """
    args = trainer.args
    engines = {
        "torch.compile": args.torch_compile,
        "DataParallel in one process": args.n_gpu > 1,
        "auto_find_batch_size": args.auto_find_batch_size,
    }
    found = next((name for name, used in engines.items() if used), None)
    hint = "; start one process a GPU with accelerate launch" if found and found.startswith("DataParallel") else ""
    require(found is None, f"{found} does not work with a model that is cut during training; turn it off{hint}")
    alone = "weights_on_disk works in one process only; load the model without it, or start one process"
    require(args.world_size == 1 or not has_weights_on_disk(trainer.model), alone)
    if sharded:
        _check_sharded(trainer)
    if trainer.light_config.is_auto and trainer.light_plan is None:
        trainer.light_tolerance()
    reference = getattr(trainer, "ref_model", trainer) is None and not getattr(args, "precompute_ref_log_probs", 0)
    require(
        not reference or not getattr(args, "beta", 0),
        f"{type(trainer).__name__} would use the cut model as its reference model; pass the dense model as ref_model=, "
        "or set beta to 0",
    )


def check_arguments(rows: object, peft_config: object, fast_steps: object, prefix_cache: object) -> None:
    """Refuse arguments of a type that fails late, inside a library.

    Args:
        rows: training rows.
        peft_config: PEFT modules for a dense model.
        fast_steps: whether steps are made faster.
        prefix_cache: cache for the outputs of frozen blocks.

    Raises:
        LightPeftError: naming the argument and its type.
    """
    splits = f"; pass one of its splits: {', '.join(map(str, rows))}" if isinstance(rows, Mapping) else ""
    require(not isinstance(rows, str | Mapping), f"train_dataset is a {type(rows).__name__}, not rows{splits}")
    config = isinstance(peft_config, PeftConfig | None)
    require(config, f"peft_config is a {type(peft_config).__name__}; give a PEFT configuration such as LoraConfig(r=8)")
    require(isinstance(fast_steps, bool), f"fast_steps is {fast_steps!r}; give True or False")
    cache = isinstance(prefix_cache, PrefixCache | None)
    require(cache, f"prefix_cache is {prefix_cache!r}; give a PrefixCache, or None for no cache")


def check_length(trainer: LightHost) -> None:
    """Refuse a run that is too short for its estimation; skipped if the number of steps is not known yet.

    Raises:
        LightPeftError: naming the setting to raise.
    """
    steps = steps_of(trainer)
    if trainer.light_plan is None and steps is not None:
        stage_of_trainer(trainer, steps)


def stage_of_trainer(trainer: LightHost, steps: int) -> StageLength:
    """Compute the length of a trainer's estimation in a run of `steps` steps.

    Raises:
        LightPeftError: the run is too short, naming the setting to raise.
    """
    longer = name_of_length(trainer.args, trainer.light_longer)
    return fit_stage(trainer.light_config, pace_of_steps(trainer), steps, longer=longer)


def refuse_parts(model: object) -> None:
    """Refuse a model that is already sharded, or that has no weights (meta device).

    Raises:
        LightPeftError: saying how to load it.
    """
    if isinstance(model, nn.Module):
        check_stored(model)
    require(
        not isinstance(model, nn.Module) or not is_sharded(model),
        "the model is already sharded, and lightpeft needs whole layers; pass it as from_pretrained returned it",
    )


def _check_sharded(trainer: LightHost) -> None:
    everything = "light.train: all does not work with FSDP, which shards the base; use DDP, or set light.train to peft"
    require(trainer.light_config.train != "all", everything)
    keep = trainer.light_config.after.keep
    kept = f"light.after.keep: {keep} needs the whole base in every process, and FSDP shards it"
    require(keep == "light", f"{kept}; set it to light")
    quantized = any(getattr(module, "is_quantized", False) for module in trainer.model.modules())
    require(not quantized, "a quantized base (4 or 8 bits) cannot be cut under FSDP; load the base unquantized")
