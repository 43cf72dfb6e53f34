"""What a run knows of a PEFT kind: what it is called, which settings it has, and where its modules go.

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
from lightpeft.config.validation import Within, checked, checked_fields
from lightpeft.errors import LightPeftError, nearest, require
from lightpeft.files.foreign import parsing
from lightpeft.peft_kinds.sites.base import Site
from lightpeft.peft_kinds.sites.bottleneck import BottleneckSite
from lightpeft.peft_kinds.sites.ia3 import Ia3Site
from lightpeft.peft_kinds.sites.lora import LoraSite
from lightpeft.peft_kinds.sites.registry import check_config
from lightpeft.plans.structure import SLOTS, BlockSpec

Settings = dict[str, Any]
"""Fields of a PEFT configuration."""

_OF_THE_RUN = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "runtime_config",
)
"""Fields of PEFT's configurations that say what a run says elsewhere, or what PEFT notes for itself."""
_LAYERS = ("layers_to_transform", "layers_pattern")
"""Fields that choose among layers that are named alike."""


@dataclass(frozen=True)
class ModulePlaces:
    """The blocks of a model, by where a run may put modules."""

    allowed: Sequence[BlockSpec]
    others: Sequence[BlockSpec]
    model_type: str
    """Of the model that has them."""
    by_habit: bool = False
    """As the kind is used by habit (`Method.by_habit`), not wherever a module may be of use."""

    @classmethod
    def under(cls, light: LightConfig, blocks: Sequence[BlockSpec], model_type: str) -> ModulePlaces:
        """Where `light.remove.depth` and `light.modules.blocks` let modules be."""
        end = light.blocks_left(len(blocks))
        lowest = light.first_module_block(end)
        return cls(blocks[lowest:end], [*blocks[:lowest], *blocks[end:]], model_type)


@dataclass(frozen=True)
class PeftKind:
    """One kind of PEFT whose modules sit on projections that are named one by one."""

    site: type[Site]
    title: str
    """What people call it."""
    habit: Collection[str] = ("q", "v", "kv", "qkv")
    """Slots that it is used on by habit; none, where it finds its places otherwise."""
    merges: bool = True
    """Whether what it adds can become part of the base's weights."""
    limits: Mapping[str, Within] = field(default_factory=dict)
    """Which numbers its fields may be."""

    @property
    def name(self) -> str:
        """What `peft` calls it."""
        return self.site.peft_type.value.lower()

    def config(
        self,
        run: RunConfig,
        place: ModulePlaces | None = None,
        task_type: TaskType | None = None,
        new_modules: Sequence[str] = (),
    ) -> PeftConfig:
        """The PEFT configuration of a run.

        Args:
            place: where modules may be; None: it says nothing of places.
            task_type: what PEFT calls the model's task.
            new_modules: what of the model trains as a whole, beside what the run names (`modules_to_save`).

        Raises:
            LightPeftError: a setting is unknown, or has a value that cannot be used or pruned.
        """
        cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[self.site.peft_type]
        for name in _OF_THE_RUN:
            require(name not in run.peft_settings, f"peft.{name} is the run's to set; leave it out")
        given = {name: value for name, value in run.peft_settings.items() if name != SLOTS_KEY}
        slots = self._slots(run.peft_settings.get(SLOTS_KEY))
        settings = {**DEFAULTS.get(self.name, {}), **checked_fields(cls, given, "peft.", without=_OF_THE_RUN)}
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

    def _slots(self, given: Any) -> Collection[str] | None:
        """The slots that a run names, found good; None: it names none."""
        slots: list[str] | None = checked(given, list[str] | None, f"peft.{SLOTS_KEY}")
        require(slots is None or self.habit, f"peft.{SLOTS_KEY} is for modules on projections; {self.name} has none")
        unknown = set(slots or ()) - set(SLOTS)
        known = f"slots are {', '.join(SLOTS)}"
        require(not unknown, f"peft.{SLOTS_KEY} has {', '.join(sorted(unknown))}; {known}")
        return slots

    def placed(self, settings: Settings, place: ModulePlaces, slots: Collection[str] | None = None) -> Settings:
        """The settings that say where modules go; target modules that somebody named stay as they are.

        Args:
            slots: projections to put them on; None: all, or by habit.
        """
        if settings.get("target_modules") is not None:
            return {}
        usual = self.habit if place.by_habit else SLOTS
        return {"target_modules": projections(place.allowed, slots or usual)}


def _check_layers(settings: Settings) -> None:
    """Refuse to choose among layers that lightpeft names one by one, as PEFT would not look at the choice."""
    for name in _LAYERS:
        named = settings.get(name) is None or settings.get("target_modules") is not None
        require(named, f"peft.{name} chooses among target modules of one name; give peft.target_modules, too")


def projections(blocks: Sequence[BlockSpec], slots: Collection[str] = SLOTS) -> list[str]:
    """Names of the blocks' projections in those slots."""
    return [name for block in blocks for slot, name in block.projections.items() if slot in slots]


class _Lora(PeftKind):
    """LoRA with its variants."""

    def config(self, run: RunConfig, *args: Any, **options: Any) -> PeftConfig:
        start = run.peft_settings.get("init_lora_weights")
        require(start != "eva", f"peft.init_lora_weights is {start}, which is computed from rows; use true or gaussian")
        return super().config(run, *args, **options)

    def placed(self, settings: Settings, place: ModulePlaces, slots: Collection[str] | None = None) -> Settings:
        """Without layers whose names PEFT takes for those of routed experts."""
        result, taken = super().placed(settings, place, slots), names_of_experts(place.model_type)
        targets = result.get("target_modules", [])
        stay = [name for name in targets if name.rpartition(".")[2] not in taken]
        others = sorted({name.rpartition(".")[2] for name in {*targets} - {*stay}}) if slots else []
        require(
            not others,
            f"peft.{SLOTS_KEY} has {', '.join(others)}, which PEFT takes for the routed experts of {place.model_type}; "
            "leave these slots out",
        )
        return {**result, "target_modules": stay} if len(stay) < len(targets) else result


class _Ia3(PeftKind):
    """IA3, whose factors are on what a feed-forward module reads: the hidden units in front of `ffn_out`."""

    def placed(self, settings: Settings, place: ModulePlaces, slots: Collection[str] | None = None) -> Settings:
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
    """Bottleneck adapters, which find their places by the family."""

    def placed(self, settings: Settings, place: ModulePlaces, slots: Collection[str] | None = None) -> Settings:
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
    """The kind that `peft` calls so.

    Raises:
        LightPeftError: there is none, or it cannot be pruned.
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
    """The kind of a PEFT configuration.

    Raises:
        LightPeftError: it cannot be pruned.
    """
    return kind_named(str(getattr(config.peft_type, "value", config.peft_type)).lower())


def check_peft_settings(run: RunConfig) -> None:
    """Refuse a PEFT that cannot be made or pruned, before anything is read.

    Raises:
        LightPeftError: its kind or a setting is unknown, or has a value that cannot be used.
    """
    if run.way.has_peft:
        kind_named(run.peft_type).config(run)
