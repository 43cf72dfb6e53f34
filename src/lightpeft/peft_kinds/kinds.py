"""PEFT kinds of runs: their names, settings and placements.

A new kind is a `Site` class (`peft_kinds/sites`) and an entry here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, TaskType

from lightpeft.compat.peft import names_of_experts
from lightpeft.config import LightConfig, RunConfig
from lightpeft.config.light import WIDEST
from lightpeft.config.peft import DEFAULTS, SLOTS_KEY
from lightpeft.config.validation import Within, convert, convert_fields
from lightpeft.errors import LightPeftError, nearest, require
from lightpeft.files.foreign import parsing
from lightpeft.peft_kinds.sites.base import Site
from lightpeft.peft_kinds.sites.bottleneck import BottleneckSite
from lightpeft.peft_kinds.sites.ia3 import Ia3Site
from lightpeft.peft_kinds.sites.live_sites import check_config
from lightpeft.peft_kinds.sites.lora import LoraSite
from lightpeft.plans.structure import SLOTS, BlockSpec

PeftFields = dict[str, Any]
"""Fields of a PEFT configuration."""

_SET_BY_RUN = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "runtime_config",
)
"""Fields of PEFT's configurations that other settings of the run determine, or that PEFT fills in itself."""
_LAYER_FIELDS = ("layers_to_transform", "layers_pattern")
"""Fields that select among layers with the same name."""


@dataclass(frozen=True)
class ModulePlaces:
    """Blocks of a model that may have PEFT modules, and blocks that may not."""

    allowed: Sequence[BlockSpec]
    """Blocks that may have modules."""
    others: Sequence[BlockSpec]
    """Blocks that may not have modules."""
    model_type: str
    """Model type of the model."""
    by_habit: bool = False
    """True: modules sit on the customary projections of their kind (`Method.by_habit`); False: on all projections."""

    @classmethod
    def under(cls, light: LightConfig, blocks: Sequence[BlockSpec], model_type: str) -> ModulePlaces:
        """Select the blocks that `light.remove.depth` and `light.modules.blocks` allow to have modules."""
        end = light.blocks_left(len(blocks))
        lowest = light.first_module_block(end)
        return cls(blocks[lowest:end], [*blocks[:lowest], *blocks[end:]], model_type)


@dataclass(frozen=True)
class PeftKind:
    """One kind of PEFT, whose modules sit on projections that are listed by name."""

    site: type[Site]
    """Class of the kind's modules."""
    title: str
    """Name of the kind in messages."""
    habit: Collection[str] = ("q", "v", "kv", "qkv")
    """Customary slots of the kind; empty if it finds its places itself."""
    merges: bool = True
    """True: modules can be merged into the base's weights."""
    limits: Mapping[str, Within] = field(default_factory=dict)
    """Field of the configuration -> range of its value."""

    @property
    def name(self) -> str:
        """Name of the kind in the setting `peft`."""
        return self.site.peft_type.value.lower()

    def config(
        self,
        run: RunConfig,
        place: ModulePlaces | None = None,
        task_type: TaskType | None = None,
        new_modules: Sequence[str] = (),
    ) -> PeftConfig:
        """Make the PEFT configuration of a run.

        Args:
            place: blocks that may have modules; None: the configuration lists no places.
            task_type: PEFT's type of the model's task.
            new_modules: modules that train as a whole, beside those of the run's settings (`modules_to_save`).
        """
        cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[self.site.peft_type]
        for name in _SET_BY_RUN:
            require(name not in run.peft_settings, f"peft.{name} is set by the run; leave it out")
        given = {name: value for name, value in run.peft_settings.items() if name != SLOTS_KEY}
        slots = self._check_slots(run.peft_settings.get(SLOTS_KEY))
        settings = {**DEFAULTS.get(self.name, {}), **convert_fields(cls, given, "peft.", without=_SET_BY_RUN)}
        _check_layers(settings)
        for name, within in self.limits.items():
            if settings.get(name) is not None:
                within.check(settings[name], f"peft.{name}")
        if place is not None:
            settings |= self.placed(settings, place, slots)
        saved = list(dict.fromkeys([*(settings.pop("modules_to_save", None) or ()), *new_modules])) or None
        with parsing("peft"):
            made: PeftConfig = cls(**settings, task_type=task_type, modules_to_save=saved)
        check_config(made)
        return made

    def _check_slots(self, given: Any) -> Collection[str] | None:
        """Check and return the slots in a run's settings; None: there are none."""
        slots: list[str] | None = convert(given, list[str] | None, f"peft.{SLOTS_KEY}")
        require(slots is None or self.habit, f"peft.{SLOTS_KEY} has no effect with {self.name}; leave it out")
        unknown = set(slots or ()) - set(SLOTS)
        known = f"choose among {', '.join(SLOTS)}"
        require(not unknown, f"peft.{SLOTS_KEY} has unknown {', '.join(sorted(unknown))}; {known}")
        return slots

    def placed(self, settings: PeftFields, place: ModulePlaces, slots: Collection[str] | None = None) -> PeftFields:
        """Return the settings of the places of modules; given target modules are not changed.

        Args:
            slots: projections to put modules on; None: all, or the customary ones.
        """
        if settings.get("target_modules") is not None:
            return {}
        usual = self.habit if place.by_habit else SLOTS
        return {"target_modules": projections(place.allowed, slots or usual)}


def _check_layers(settings: PeftFields) -> None:
    """Refuse fields that select layers without target modules, since PEFT ignores them for full module names."""
    for name in _LAYER_FIELDS:
        named = settings.get(name) is None or settings.get("target_modules") is not None
        require(named, f"peft.{name} selects among target modules with the same name; give peft.target_modules, too")


def projections(blocks: Sequence[BlockSpec], slots: Collection[str] = SLOTS) -> list[str]:
    """Return the names of the blocks' projections in some slots."""
    return [name for block in blocks for slot, name in block.projections.items() if slot in slots]


class _Lora(PeftKind):
    """LoRA with its variants."""

    def config(self, run: RunConfig, *args: Any, **options: Any) -> PeftConfig:
        start = run.peft_settings.get("init_lora_weights")
        require(start != "eva", f"peft.init_lora_weights: {start} needs data, which runs lack; use true or gaussian")
        return super().config(run, *args, **options)

    def placed(self, settings: PeftFields, place: ModulePlaces, slots: Collection[str] | None = None) -> PeftFields:
        """Return the settings of the places, without layers whose names PEFT mistakes for routed experts."""
        result, taken = super().placed(settings, place, slots), names_of_experts(place.model_type)
        targets = result.get("target_modules", [])
        stay = [name for name in targets if name.rpartition(".")[2] not in taken]
        others = sorted({name.rpartition(".")[2] for name in {*targets} - {*stay}}) if slots else []
        require(
            not others,
            f"peft.{SLOTS_KEY} has slots of {', '.join(others)}, which PEFT mistakes for the routed experts of "
            f"{place.model_type}; leave these slots out",
        )
        return {**result, "target_modules": stay} if len(stay) < len(targets) else result


class _Ia3(PeftKind):
    """IA3, whose factors in feed-forward modules scale the input: the hidden units in front of `ffn_out`."""

    def placed(self, settings: PeftFields, place: ModulePlaces, slots: Collection[str] | None = None) -> PeftFields:
        result = super().placed(settings, place, slots)
        if settings.get("feedforward_modules") is not None:
            return result
        targets = result.get("target_modules", settings.get("target_modules"))
        outputs = projections([*place.allowed, *place.others], ["ffn_out"])
        if isinstance(targets, str):  # an expression, which may stand for any of them
            return {**result, "feedforward_modules": outputs}
        ends = [name for name in targets or () if any(f".{output}".endswith(f".{name}") for output in outputs)]
        return {**result, "feedforward_modules": ends}


class _Bottleneck(PeftKind):
    """Bottleneck adapters, whose places follow from the model family."""

    def placed(self, settings: PeftFields, place: ModulePlaces, slots: Collection[str] | None = None) -> PeftFields:
        if settings.get("target_modules") is not None or settings.get("exclude_modules") is not None:
            return {}
        return {"exclude_modules": projections(place.others) or None}


_WIDTH = Within(least=1, most=WIDEST)

PEFT_KINDS: dict[str, PeftKind] = {
    kind.name: kind
    for kind in (
        _Lora(
            LoraSite,
            "LoRA",
            limits={"r": _WIDTH, "lora_alpha": Within(above=0), "lora_dropout": Within(least=0, below=1)},
        ),
        _Ia3(Ia3Site, "IA3", habit=("k", "v", "kv", "qkv", "ffn_out")),  # as in Liu et al. 2022
        _Bottleneck(
            BottleneckSite,
            "adapters",
            habit=(),
            merges=False,
            limits={"size": _WIDTH, "dropout": Within(least=0, below=1)},
        ),
    )
}
"""Name -> kind."""


def kind_named(name: str) -> PeftKind:
    """Return the PEFT kind with this name in the setting `peft`.

    Raises:
        LightPeftError: there is no such kind, or it cannot be pruned.
    """
    if name not in PEFT_KINDS:
        meant = nearest(name, PEFT_KINDS)
        raise LightPeftError(
            f'peft is "{name}", which lightpeft cannot prune; '
            + (f"did you mean {meant}? " if meant else "")
            + f"choose one of {', '.join(PEFT_KINDS)}"
        )
    return PEFT_KINDS[name]


def kind_of(config: PeftConfig) -> PeftKind:
    """Return the kind of a PEFT configuration.

    Raises:
        LightPeftError: the kind cannot be pruned.
    """
    return kind_named(str(getattr(config.peft_type, "value", config.peft_type)).lower())


def check_peft_settings(run: RunConfig) -> None:
    """Check the PEFT settings of a run before anything is read.

    Raises:
        LightPeftError: the kind or a setting is unknown, or has an invalid value.
    """
    if run.method_spec.has_peft:
        kind_named(run.peft_type).config(run)
