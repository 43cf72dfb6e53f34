"""Light adapters: a plan and PEFT weights in one small folder, over a base that is never written to."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from lightpeft.discovery import ensure_family
from lightpeft.errors import LightPeftError, require
from lightpeft.families import block_specs, family_of
from lightpeft.files import (
    check_file,
    content_checksum,
    file_checksum,
    read_json,
    replacing_folder,
    understandable,
    write_json,
    write_text,
)
from lightpeft.loading import UNREADABLE, base_names, fingerprint, keep_own_names
from lightpeft.profiling import versions
from lightpeft.quantised import prepare_quantised
from lightpeft.records import PrunePlan
from lightpeft.refit import Refit, apply_refit, refit_of_tensors, refit_tensors
from lightpeft.sites import hide_config, own_adapter, read_config, transformers_model
from lightpeft.streaming import Stream
from lightpeft.structure import BlockSpec
from lightpeft.surgery import apply_plan

DESCRIPTION = "lightpeft.json"
_REFIT_FILE = "refit.safetensors"
_FILES = ("adapter_config.json", "adapter_model.safetensors", _REFIT_FILE)
"""What is in the folder besides the description, as far as it is there."""


class LightModel(PeftModel):
    """A pruned `PeftModel`. It trains, generates and merges as one; `save_pretrained` writes a light adapter."""

    light_plan: PrunePlan
    """Which units of the dense base are here."""
    light_refit: Refit
    """Corrections of its projections that are merged into their weights; empty without a refit."""
    light_metrics: dict[str, Any]
    """What was measured of this model; saved with it."""
    light_task: dict[str, Any]
    """How inputs are read (task kind, columns, length); saved with it, empty if unknown."""

    def save_pretrained(self, save_directory: str | Path, *, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write a light adapter: PEFT's own two files, `lightpeft.json`, a model card and, after a refit, that.

        Where anything of the base is cut, PEFT's own loader refuses the folder (`sites.hide_config`). The reference that
        one of TRL's trainers has put beside the adapter is not written.

        Raises:
            LightPeftError: there are other adapters, or the folder cannot be written (for example: disk full); no file
                is half-written.
        """
        require(kwargs.get("safe_serialization", True), "a light adapter is written as safetensors, never as pickle")
        name = own_adapter(self)
        selected = kwargs.pop("selected_adapters", None)
        require(selected in (None, [name]), f"a light adapter has one adapter, {name}, and {selected} was selected")
        if not is_main_process:
            return
        with replacing_folder(save_directory) as temporary:
            super().save_pretrained(str(temporary), selected_adapters=[name], **kwargs)
            _move_up(temporary / name)
            if self.light_plan.removed_parameters or self.light_refit:
                hide_config(temporary)
            if self.light_refit:
                save_file(refit_tensors(self.light_refit), temporary / _REFIT_FILE)
            (temporary / "README.md").write_text(model_card(self, *_CARD), encoding="utf-8")
            write_json(temporary / DESCRIPTION, _description(self, temporary))
        if not self.light_refit:
            (Path(save_directory) / _REFIT_FILE).unlink(missing_ok=True)  # of what was saved here before


def _move_up(folder: Path) -> None:
    """Move the files of an adapter that is not called "default" to where PEFT writes those of one that is."""
    if folder.is_dir():
        for file in folder.iterdir():
            file.replace(folder.parent / file.name)
        folder.rmdir()


def save_metrics(model: LightModel, folder: str | Path) -> None:
    """Write what was measured of a light model into where it is saved; no weight is written again.

    Raises:
        LightPeftError: there is no light adapter, or it cannot be written.
    """
    file = Path(folder) / DESCRIPTION
    write_json(file, {**read_json(file), "metrics": model.light_metrics})
    write_text(Path(folder) / "README.md", model_card(model, *_CARD))


def as_light(
    model: PeftModel,
    plan: PrunePlan,
    metrics: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    refit: Refit | None = None,
) -> LightModel:
    """Make a pruned `PeftModel` one that saves itself as a light adapter; same object, same weights."""
    kind = type(model)
    if not issubclass(kind, LightModel):
        # the model keeps its own class (for sequence classification, causal LM, ...) with `save_pretrained` before it
        model.__class__ = type(f"Light{kind.__name__}", (LightModel, kind), {})
    light = cast(LightModel, model)
    light.light_plan = plan
    light.light_refit = dict(refit or {})
    light.light_metrics = dict(metrics or {})
    light.light_task = dict(task or {})
    return light


def load_light(
    folder: str | Path,
    base: str | Path | PreTrainedModel | None = None,
    *,
    is_trainable: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    low_memory: bool = False,
) -> LightModel:
    """Load a light adapter over a fresh base.

    Args:
        folder: what `save_pretrained` wrote.
        base: name or folder of the base, or the dense model itself, which is then pruned in place;
            None: the base that the adapter names.
        is_trainable: go on training; else the weights are frozen and the model is in eval mode.
        dtype: of the base weights when they are loaded here; "auto": as it was when the adapter was saved.
        device: where to put the model; None: where the base is.
        attention: attention backend; None: the one the base would use.
        low_memory: read the base from disk one tensor at a time and keep only what the plan keeps, so that memory holds
            the pruned model and one tensor, never the dense model; for unquantised bases in safetensors files.

    Raises:
        LightPeftError: a file is missing, altered, or of a newer schema; or the base is another one, or not of the kind
            that `low_memory` can read. No partial load.
    """
    folder = Path(folder)
    description = read_description(folder)
    with understandable(folder / DESCRIPTION):
        plan = PrunePlan.from_dict(description["plan"])
        metrics, task, saved = (dict(description[name]) for name in ("metrics", "task", "base"))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attention is not None:
        options["attn_implementation"] = attention
    live = cast(PreTrainedModel, base) if isinstance(base, nn.Module) else None
    stream = _stream(live, saved, plan, folder, device) if low_memory else None
    dense = live if live is not None else _load_base(saved, cast(Any, base), dtype, options, stream)
    _check_base(dense, saved, plan, folder, stream)
    prepare_quantised(dense)
    _check_tensors(dense, plan, folder)
    apply_plan(dense, plan)
    if stream is not None:
        stream.fill(dense)
    refit = _read_refit(folder) if _REFIT_FILE in description["checksums"] else {}
    apply_refit(dense, refit)
    try:
        model = PeftModel.from_pretrained(dense, str(folder), is_trainable=is_trainable, config=read_config(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        raise LightPeftError(f"{folder} does not fit its base: {' '.join(str(error).split())[:300]}") from error
    if not is_trainable:
        model.eval()
    return as_light(model if device is None else model.to(device), plan, metrics, task, refit)


def read_description(folder: str | Path) -> dict[str, Any]:
    """`lightpeft.json` of a light adapter, after the checksums of all its files have been verified.

    Raises:
        LightPeftError: not a light adapter, a file is missing or altered, or a newer schema.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"light adapter folder {folder} does not exist")
    require((folder / DESCRIPTION).is_file(), f"{folder} is not a light adapter: it has no {DESCRIPTION}")
    description = read_json(folder / DESCRIPTION)
    with understandable(folder / DESCRIPTION):
        expected = dict(description["checksums"])
        if description["schema_version"] == 1:  # which had no checksum for every JSON file
            own = expected.pop(DESCRIPTION)
            require(own == _content_checksum(description), f"{folder / DESCRIPTION} was altered or damaged")
        for name, checksum in expected.items():
            check_file(folder, name, checksum)
    return description


def _read_refit(folder: Path) -> Refit:
    """The corrections of a light adapter."""
    file = folder / _REFIT_FILE
    try:
        return refit_of_tensors(load_file(file))
    except SafetensorError as error:
        raise LightPeftError(f"{file} is damaged: {error}") from error


def _description(model: LightModel, folder: Path) -> dict[str, Any]:
    checksums = {name: file_checksum(folder / name) for name in _FILES if (folder / name).is_file()}
    return {**facts_of(model), "checksums": checksums}


def facts_of(model: LightModel) -> dict[str, Any]:
    """What is written down of a light model beside its weights: base, plan, task, metrics, versions."""
    inner = transformers_model(model)
    config = inner.config
    return {
        "base": {
            "id": getattr(config, "_name_or_path", ""),
            "revision": getattr(config, "_commit_hash", None),
            "model_type": config.model_type,
            "architecture": type(inner).__name__,
            "dtype": str(inner.dtype).removeprefix("torch."),
            "fingerprint": model.light_plan.fingerprint,
            "config": _head_settings(config),
            "gguf_file": getattr(inner, "light_gguf_file", None),
            "quantisation": _quantisation(config),
        },
        "plan": model.light_plan.to_dict(),
        "per_layer_config": per_layer_config(config.model_type, model.light_plan),
        "task": model.light_task,
        "metrics": model.light_metrics,
        "versions": versions(),
    }


def per_layer_config(model_type: str, plan: PrunePlan) -> dict[str, dict[str, int]]:
    """Widths of every block in the schema of transformers' `per_layer_config`: layer -> config key -> value."""
    stacks = family_of(model_type).stacks
    if len(stacks) > 1:  # the schema counts one stack of layers only
        return {}
    return {
        str(spec.index): {
            "num_attention_heads": len(kept.heads),
            "num_key_value_heads": len(kept.kv_heads),
            stacks[0].width_key or "intermediate_size": len(kept.neurons),
        }
        for spec, kept in plan.parts
    }


def _head_settings(config: transformers.PretrainedConfig) -> dict[str, Any]:
    """Config values that the task set and the base's own config does not have."""
    settings = {"pad_token_id": config.pad_token_id} if hasattr(config, "pad_token_id") else {}
    if any("Classification" in name for name in getattr(config, "architectures", None) or ()) or config.id2label:
        settings["id2label"] = {str(index): label for index, label in config.id2label.items()}
    return settings


def _quantisation(config: transformers.PretrainedConfig) -> dict[str, Any] | None:
    """How the base was quantised, in transformers' own words."""
    settings = getattr(config, "quantization_config", None)
    return json.loads(settings.to_json_string(use_diff=False)) if settings is not None else None


def _stream(
    live: PreTrainedModel | None,
    saved: dict[str, Any],
    plan: PrunePlan,
    folder: Path,
    device: str | torch.device | None,
) -> Stream:
    """What reads the base one tensor at a time; refuses at once what cannot be read so."""
    require(
        live is None, "low_memory reads the base from disk, and base= is a model in memory: load without low_memory"
    )
    kind = "quantised" if saved.get("quantisation") else "a GGUF file" if saved.get("gguf_file") else None
    require(kind is None, f"the base of {folder} is {kind}, which low_memory cannot read: load without low_memory")
    return Stream(plan, lambda model: _check_blocks(model, saved, plan, folder), device)


def _load_base(
    saved: dict[str, Any],
    base: str | Path | None,
    dtype: str | torch.dtype,
    options: dict[str, Any],
    stream: Stream | None = None,
) -> PreTrainedModel:
    """Load the base, dense or into a stream, with the head that the adapter was trained with."""
    name = str(base) if base is not None else saved["id"]
    require(name, "the light adapter does not name its base; give one: load_light(folder, base=...)")
    settings = dict(saved["config"])
    if "id2label" in settings:
        settings["id2label"] = {int(index): label for index, label in settings["id2label"].items()}
        settings["label2id"] = {label: index for index, label in settings["id2label"].items()}
    architecture = architecture_of(saved, "load the base yourself and pass it as base=")
    if stream is not None:
        architecture = stream.loader(architecture)
    revision = saved["revision"] if base is None else None
    if saved.get("quantisation"):
        options = {**options, "quantization_config": AutoQuantizationConfig.from_dict(saved["quantisation"])}
    names = base_names(architecture)
    try:
        model = architecture.from_pretrained(
            name,
            revision=revision or "main",
            gguf_file=saved.get("gguf_file"),
            dtype=saved["dtype"] if dtype == "auto" else dtype,
            key_mapping=names,
            **settings,
            **options,
        )
    except LightPeftError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise LightPeftError(f"base {name} cannot be loaded ({reason}); give another place: base=...") from error
    keep_own_names(model, names)
    return model


def architecture_of(saved: dict[str, Any], instead: str) -> Any:
    """The class of transformers that a saved model's base is of.

    Raises:
        LightPeftError: there is none in this version; the line ends with what to do instead.
    """
    architecture = getattr(transformers, saved["architecture"], None)
    require(architecture is not None, f"transformers has no {saved['architecture']}; {instead}")
    return architecture


def _check_base(
    dense: PreTrainedModel, saved: dict[str, Any], plan: PrunePlan, folder: Path, stream: Stream | None
) -> None:
    """Refuse a base other than the one the plan was made for, before anything is cut."""
    blocks = _check_blocks(dense, saved, plan, folder)
    found = fingerprint(dense, blocks) if stream is None else stream.fingerprint(dense, blocks)
    require(found == plan.fingerprint, _another_base(folder))


def _check_blocks(dense: PreTrainedModel, saved: dict[str, Any], plan: PrunePlan, folder: Path) -> list[BlockSpec]:
    """Refuse a base of another structure, whatever its weights."""
    plain = isinstance(dense, PreTrainedModel)
    require(plain, f"base is a {type(dense).__name__}; give the dense transformers model, without PEFT around it")
    require(saved.get("model_type") == dense.config.model_type, _another_base(folder))
    ensure_family(dense)
    blocks = block_specs(dense)
    same = [block.projections for block in blocks] == [spec.projections for spec in plan.specs]
    require(same, _another_base(folder))
    return blocks


def _another_base(folder: Path) -> str:
    return (
        f"{folder} belongs to another base: the weights given are not the ones it was made for; "
        "pass the original base, in the same revision and, if it was quantised, in the same bits"
    )


def _check_tensors(dense: PreTrainedModel, plan: PrunePlan, folder: Path) -> None:
    """Compare the tensors in the file with those that the model will have, before anything is cut.

    What it will have is read off a model without storage, on the meta device.
    """
    with torch.device("meta"):
        skeleton = type(dense)(copy.deepcopy(dense.config))
    apply_plan(skeleton, plan)
    try:
        config = read_config(folder)
        config.base_model_name_or_path = None  # the base may have moved; PEFT would warn
        model = get_peft_model(skeleton, config)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise LightPeftError(f"{folder} does not fit its base: {' '.join(str(error).split())[:300]}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    _report_difference(sorted(expected.keys() - found), f"{folder} does not fit its base: it lacks tensors")
    _report_difference(sorted(found.keys() - expected), f"{folder} has tensors that fit nowhere")
    other = sorted(name for name, shape in expected.items() if found[name] != shape)
    _report_difference(other, f"{folder} does not fit its base: tensors of another shape")


def _report_difference(names: Sequence[str], what: str) -> None:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    require(not names, f"{what}: {names[0] if names else ''}{more}")


def _content_checksum(description: dict[str, Any]) -> str:
    """SHA-256 of everything in a `lightpeft.json` of version 1 but the checksums themselves."""
    return content_checksum({k: value for k, value in description.items() if k not in ("checksums", "schema_version")})


_CARD = (
    "Light adapter",
    "A task over an untouched base: PEFT weights and the plan of which attention heads and FFN neurons the task needs",
    "load_light",
)
"""Title, description and loader of a light adapter."""


def model_card(model: LightModel, title: str, what: str, loader: str) -> str:
    """The text of README.md beside saved weights.

    Args:
        what: is in the folder.
        loader: name of the function of lightpeft that reads it.
    """
    base = getattr(transformers_model(model).config, "_name_or_path", "") or "the base"
    # a local path is of no use to a reader elsewhere, and not a valid hub id
    front = "" if Path(base).exists() else f"base_model: {base}\n"
    metrics = "\n".join(f"- {name}: {value}" for name, value in model.light_metrics.items()) or "- none recorded"
    return f"""---
library_name: lightpeft
{front}tags: [lightpeft, peft, lora, pruning]
---

# {title}

{what}
(Light-PEFT, Gu et al., Findings of ACL 2024).

    from lightpeft import {loader}
    model = {loader}("this folder")

{model.light_plan.summary()}.

## Metrics

{metrics}

## Plan

```
{model.light_plan}
```
"""
