"""Settings of `light`: short forms, what is derived, which one holds where several are given, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from lights import PLACES, nested, preset

from lightpeft.app.tasks.entries.task_entries import ENTRIES
from lightpeft.app.tasks.kinds.completions import CompletionTask
from lightpeft.app.tasks.kinds.task_kinds import TASK_KINDS
from lightpeft.config import (
    PRESETS,
    WRITTEN,
    LightConfig,
    fill_defaults,
    light_config,
    load_config,
    merge_settings,
    override_light,
    run_config_from_dict,
)
from lightpeft.config.derived import TABLE
from lightpeft.config.light import SHARES, After, Remove
from lightpeft.errors import LightPeftError


def message(error: pytest.ExceptionInfo[LightPeftError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# -- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blocks", *SHARES, "depth", "modules", "ranks"])
@pytest.mark.parametrize("value", [-0.1, 1.0, 1, 40.0, float("nan"), float("inf")])
def test_parts_to_remove_lie_in_zero_to_one(name: str, value: float) -> None:
    with pytest.raises(LightPeftError) as error:
        light_config(nested(**{name: value}))
    assert "light." in message(error) and ("[0, 1)" in message(error) or "finite" in message(error))


@pytest.mark.parametrize("value", [0, 0.0, 1 / 3, 0.999])
def test_parts_in_range(value: float) -> None:
    light = light_config(nested(heads=value, neurons=value, modules=value, ranks=value))
    assert (light.remove.heads, light.modules.remove_ranks) == (value, value)


@pytest.mark.parametrize(
    ("leaves", "says"),
    [
        ({"multiple_of": 0}, "light.remove.multiple_of is 0"),
        ({"scope": "local"}, "light.remove.scope is 'local'; it must be"),
        ({"head_unit": "pair"}, "light.remove.head_unit is 'pair'; it must be"),
        ({"module_blocks": 0.0}, "light.modules.blocks is 0.0; it must be in (0, 1]"),
        ({"module_blocks": 1.5}, "light.modules.blocks is 1.5; it must be in (0, 1]"),
        ({"criterion": "frequency"}, "light.estimate.criterion is 'frequency'; it must be"),
        ({"module_criterion": "mask"}, "ratio, taylor, random"),
        ({"length": 1}, "light.estimate.length is 1 steps; it must be at least 2"),
        ({"length": True}, "light.estimate.length is True"),
        ({"length": 1.0}, "light.estimate.length is 1; it must be in (0, 1)"),
        ({"length": "later"}, "light.estimate.length is 'later'"),
        ({"mask_learning_rate": 0.0}, "mask_learning_rate is 0.0; it must be positive"),
        ({"dropout": 1.0}, "light.rates.dropout is 1.0; it must be in [0, 1)"),
        ({"dropout": "some"}, "light.rates.dropout is 'some'"),
        ({"scale": 0.0}, "light.rates.scale is 0.0; it must be positive"),
        ({"estimation_scale": -1.0}, "light.rates.estimation_scale is -1.0; it must be"),
        ({"blocks": 0.4, "heads": 0.9}, "light.remove.blocks and light.remove.heads both set the amount to remove"),
        ({"blocks": 0.4, "experts": 0.0}, "light.remove.blocks and light.remove.experts both set the amount to remove"),
        ({"blocks": "all"}, "light.remove.blocks is 'all'"),
        ({"full_width_steps": 0.1}, "set keep to full or both"),
        ({"keep": "full", "full_width_steps": 1.0}, "full_width_steps is 1"),
        ({"keep": "both", "vocabulary": "task"}, "light.after.keep"),
        ({"tolerance": "much"}, "light.remove.tolerance is much"),
        ({"tolerance": "0 nats"}, "it must be positive"),
    ],
)
def test_what_is_refused(leaves: dict[str, Any], says: str) -> None:
    with pytest.raises(LightPeftError) as error:
        light_config(nested(**leaves))
    assert says in message(error)


@pytest.mark.parametrize(
    ("light", "says"),
    [
        (1.0, "light.remove.blocks is 1; it must be in [0, 1)"),
        (-0.5, "light.remove.blocks is -0.5"),
        (float("nan"), "light.remove.blocks is nan"),
        (True, "light is True; give a fraction of the blocks"),
        (
            "slow",
            "light is 'slow'; give a fraction of the blocks to remove such as 0.4, auto, a preset (fast, accurate",
        ),
        ([0.4], "light is [0.4]"),
        ({"preset": "slow"}, "light.preset is 'slow'"),
        ({"heads": 0.5}, "unknown key light.heads; did you mean light.remove.heads?"),
        ({"learning_rate_scale": 2.0}, "unknown key light.learning_rate_scale"),
        ({"remove": 0.4}, "light.remove must be a mapping"),
    ],
)
def test_forms_that_are_refused(light: Any, says: str) -> None:
    for make in (lambda: light_config(light), lambda: run_config_from_dict({"light": light})):
        with pytest.raises(LightPeftError) as error:
            make()
        assert says in message(error)


# -- short forms and what is derived -------------------------------------------------------------------------------


def test_a_number_is_a_budget_and_a_word_a_preset() -> None:
    assert light_config(0.4) == light_config({"remove": {"blocks": 0.4}})
    assert light_config("auto") == light_config({"remove": {"blocks": "auto"}})
    assert light_config("paper") == light_config({"preset": "paper"}) == LightConfig(preset="paper")
    assert light_config(None) == light_config({}) == LightConfig()
    given = LightConfig(preset="accurate")
    assert light_config(given) is given


def test_every_leaf_has_a_short_name_here() -> None:
    """There are 25 settings, and `PLACES` knows all of them but those without a section."""
    leaves = [
        each.name
        for section in dataclasses.fields(LightConfig)
        if section.name not in ("preset", "train")
        for each in dataclasses.fields(getattr(LightConfig(), section.name))
    ]
    assert len(leaves) == len(PLACES) == 23


def test_presets() -> None:
    paper = preset("paper")
    assert (paper.remove.heads, paper.remove.neurons, paper.remove.experts) == (1 / 3, 1 / 3, 1 / 3)
    assert (paper.modules.blocks, paper.modules.remove, paper.modules.remove_ranks) == (1.0, 3 / 4, 1 / 2)
    assert (paper.remove.scope, paper.remove.multiple_of, paper.rates.base_dropout) == (None, 1, None)
    assert (paper.estimate.length, paper.estimate.criterion, paper.estimate.mask_learning_rate) == (0.1, "mask", 3e-4)
    assert (paper.estimate.module_criterion, paper.estimate.rank_criterion) == ("ratio", "taylor")
    assert preset("paper", "bottleneck") == preset("paper", writes=True) == paper
    fast, accurate = preset("fast"), preset("accurate")
    assert fast.remove == accurate.remove and fast.is_auto
    assert (fast.modules.blocks, fast.modules.remove_ranks, fast.rates.scale) == (2 / 3, 7 / 8, 2.0)
    assert (accurate.modules.blocks, accurate.modules.remove_ranks, accurate.rates.scale) == (1.0, 0.0, 1.0)
    of_adapters = preset("fast", "bottleneck").rates
    assert (of_adapters.scale, of_adapters.estimation_scale, fast.rates.estimation_scale) == (4.0, 1.0, 2.0)
    assert set(PRESETS) == {"fast", "accurate", "paper"}


def test_what_is_derived_leaves_nothing_open_and_stays() -> None:
    for name in PRESETS:
        for peft in ("lora", "ia3", "bottleneck"):
            for writes in (False, True):
                light = fill_defaults(light_config(name), peft, writes)
                unset = {key for key, value in dataclasses.asdict(light.remove).items() if value is None}
                assert unset - {"tolerance", "scope"} == ({"blocks"} if name == "paper" else set(SHARES))
                for section in ("estimate", "modules", "rates", "after"):
                    assert None not in dataclasses.asdict(getattr(light, section)).values()
                assert fill_defaults(light, "bottleneck", not writes) == light
    assert all(rule.because for rule in TABLE)


@pytest.mark.parametrize("rule", TABLE, ids=lambda rule: rule.because)
def test_every_entry_of_the_table_names_a_page_or_a_paper_that_is_there(rule: Any) -> None:
    root = Path(__file__).parents[1]
    for word in rule.because.replace(";", " ").split():
        path, _, anchor = word.partition("#")
        if path.startswith(("docs/", "configs/")):
            assert (root / path).is_file()
            heads = [line for line in (root / path).read_text().splitlines() if line.startswith("#")]
            slugs = [
                "".join(c for c in head.strip("# ").lower() if c.isalnum() or c in "- ").replace(" ", "-")
                for head in heads
            ]
            assert not anchor or anchor in slugs


@pytest.mark.parametrize(
    ("data", "like"),
    [
        ({}, preset("fast")),
        ({"data": {"task": "sst2"}}, preset("fast")),
        ({"data": {"task": "multiple-choice", "answer": "likelihood"}}, preset("fast")),
        ({"data": {"task": "causal-lm"}}, preset("accurate", writes=True)),
        ({"data": {"task": "web_questions"}}, preset("accurate", writes=True)),
        ({"data": {"task": "own"}, "tasks": {"own": {"kind": "chat"}}}, preset("accurate", writes=True)),
        ({"data": {"task": "own"}, "tasks": {"own": {}}}, preset("fast")),
        ({"peft": "bottleneck"}, preset("fast", "bottleneck")),
        ({"peft": {"type": "lora", "use_dora": True}}, preset("fast")),
    ],
)
def test_the_task_and_the_kind_of_peft_say_what_is_unset(data: dict[str, Any], like: LightConfig) -> None:
    light = run_config_from_dict(data).light
    assert light == like
    assert run_config_from_dict({**data, "light": 0.3}).light == like.with_blocks(0.3)
    assert like.remove.blocks == (0.0 if like.preset == "accurate" else "auto")
    written = run_config_from_dict({**data, "light": "fast"}).light
    assert (written.preset, written.cuts_blocks) == ("fast", like.cuts_blocks), "no preset but paper says an amount"


def test_what_is_written() -> None:
    """The list that the defaults go by is that of the kinds and of the tasks that ship."""
    kinds = {name for name, kind in TASK_KINDS.items() if issubclass(kind, CompletionTask)}
    assert kinds | {name for name, entry in ENTRIES.items() if entry.kind in kinds} == WRITTEN


# -- one over the other --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "blocks", "shares"),
    [
        ({}, "auto", None),
        (nested(modules=0.1), "auto", None),
        (0.2, 0.2, None),
        (nested(heads=0.2), None, (0.2, 0.0, 0.0)),
        (nested(neurons=0.0), None, (0.0, 0.0, 0.0)),
        (nested(heads=0.2, neurons=0.3, experts=0.4), None, (0.2, 0.3, 0.4)),
        ({"preset": "paper", **nested(heads=0.2)}, None, (0.2, 1 / 3, 1 / 3)),
        ({"preset": "paper", **nested(blocks=0.2)}, 0.2, None),
    ],
)
def test_one_way_to_say_how_much_goes_takes_the_place_of_another(given: Any, blocks: Any, shares: Any) -> None:
    light = run_config_from_dict({"light": given}).light
    assert light.remove.blocks == blocks
    assert tuple(getattr(light.remove, name) for name in SHARES) == (shares or (None, None, None))


def test_a_higher_layer_replaces_the_amount_and_keeps_the_rest() -> None:
    file = {"light": {"preset": "accurate", **nested(heads=0.5, neurons=0.2, tolerance="2 points", dropout=0.1)}}
    for above in (0.4, {"remove": {"blocks": 0.4}}):
        light = run_config_from_dict(merge_settings(file, {"light": above})).light
        assert light == preset("accurate", blocks=0.4, tolerance="2 points", dropout=0.1)
    back = run_config_from_dict(merge_settings({"light": 0.4}, {"light": nested(neurons=0.2)})).light
    assert (back.remove.blocks, back.remove.neurons) == (None, 0.2)
    named = run_config_from_dict(merge_settings({"light": 0.4}, {"light": "accurate"})).light
    assert named == preset("accurate", blocks=0.4)
    open_again = run_config_from_dict(merge_settings({"light": nested(heads=0.5)}, {"light": "auto"})).light
    assert open_again == preset("fast")


def test_settings_over_others() -> None:
    light = preset("fast", blocks=0.4, criterion="taylor")
    assert override_light(light, None) == light
    assert override_light(light, 0.2) == preset("fast", blocks=0.2, criterion="taylor")
    assert override_light(light, LightConfig(remove=light_config(nested(heads=0.5)).remove)).remove.blocks is None
    assert light.without_pruning().uses_scores is False
    assert light.with_all_modules().uses_scores and not light.with_blocks(0.0).with_all_modules().uses_scores


def test_given_values_win_over_the_preset() -> None:
    light = run_config_from_dict({"light": {"preset": "paper", **nested(mask_learning_rate=0.1, heads=0.25)}}).light
    assert light == preset("paper", mask_learning_rate=0.1, heads=0.25)


def test_what_is_saved_is_read_again() -> None:
    for light in (None, 0.3, "paper", "accurate", nested(heads=0.3, scope="global")):
        for data in ({}, {"data": {"task": "chat"}}, {"peft": "bottleneck"}):
            config = run_config_from_dict({**data, "light": light})
            assert run_config_from_dict(dataclasses.asdict(config)) == config


def test_sections_are_given_as_mappings_in_python_as_well() -> None:
    light = LightConfig(remove={"blocks": 0.4}, after={"keep": "full"})
    assert light == LightConfig(remove=Remove(blocks=0.4), after=After(keep="full"))
    for section, said in (
        ({"remove": {"blocks": 1.4}}, "light.remove.blocks is 1.4"),
        ({"remove": {"bloks": 0.4}}, "unknown key light.remove.bloks; did you mean light.remove.blocks?"),
        ({"after": 3}, "light.after must be a mapping, not 3"),
    ):
        with pytest.raises(LightPeftError, match=re.escape(said)):
            LightConfig(**section)


def test_a_file_says_it_in_any_form(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text, light in {
        "light: 0.4": preset("fast", blocks=0.4),
        "light: auto": preset("fast"),
        "light: paper": preset("paper"),
        "light:": preset("fast"),
        "light:\n  remove:\n  estimate: {length: 0.2, mask_learning_rate: 1e-4}": preset(
            "fast", length=0.2, mask_learning_rate=1e-4
        ),
    }.items():
        path.write_text(text)
        assert load_config(path).light == light
