"""Importance of PEFT modules and ranks, against the definitions written out."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import LAYOUTS, inputs_for, make, with_lora
from torch import Tensor
from training import inputs, student

from lightpeft.compat.torch import has_hooks
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.base import Site
from lightpeft.peft_kinds.sites.live_sites import find_sites
from lightpeft.prune.importance import ModuleObserver, RankObserver


def sites_of(model: PeftModel) -> list[Site]:
    return find_sites(model, block_specs(transformers_model(model)))


def reference_ratios(model: PeftModel, sites: list[Site], data: dict[str, Tensor], real: Tensor) -> Tensor:
    """Mean over real tokens of ||delta(x)|| / ||base(x)||, module by module on the inputs x it was given, [sites]."""
    captured: dict[str, Tensor] = {}
    handles = [
        site.layer.register_forward_hook(lambda m, args, out, name=site.spec.name: captured.update({name: args[0]}))
        for site in sites
    ]
    with torch.no_grad():
        model(**data)
        means = []
        for site in sites:
            x = captured[site.spec.name].reshape(*real.shape, -1)[real]
            delta = site.scaling * (x @ site.down.T @ site.up.T)
            means.append((delta.norm(dim=1) / site.base(x).norm(dim=1)).mean())
    for handle in handles:
        handle.remove()
    return torch.stack(means)


def observe(model: PeftModel) -> tuple[ModuleObserver, list[Site]]:
    sites = sites_of(model)
    return ModuleObserver(model, sites, block_specs(transformers_model(model)), torch.device("cpu")), sites


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("t5", "vit")])
@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_module_ratio(name: str, padding: str) -> None:
    model, data = student(name), inputs(name, rows=4, padding=padding)
    real = data["attention_mask"].bool()
    expected = reference_ratios(model, sites_of(model), data, real)
    observer, _ = observe(model)
    model(**data)
    torch.testing.assert_close(observer.sums[0] / observer.sums[1], expected, rtol=1e-4, atol=0)
    assert observer.sums[1].eq(real.sum()).all()


@pytest.mark.parametrize("given", ["labels", "mask"])
def test_each_side_of_an_encoder_decoder_counts_its_own_tokens(given: str) -> None:
    model = with_lora(make("t5")).train()
    data = inputs_for(model, labels=True)
    encoder, decoder = int(data["attention_mask"].sum()), int((data["labels"] != -100).sum())
    if given == "mask":
        data["decoder_attention_mask"] = torch.ones_like(data["labels"]).tril()
        decoder = int(data["decoder_attention_mask"].sum())
    observer, sites = observe(model)
    model(**data)
    for site, tokens in zip(sites, observer.sums[1].tolist(), strict=True):
        of_encoder = site.spec.name.startswith("encoder") or site.spec.name.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        assert tokens == (encoder if of_encoder else decoder), site.spec.name


@pytest.mark.parametrize("how", ["positional", "absent", "4d"])
def test_attention_masks_in_other_forms(how: str) -> None:
    model = student()
    data = inputs(rows=3)
    real, labels = data["attention_mask"].bool(), data["labels"]
    if how != "positional":
        real = torch.ones_like(real)
    kwargs: dict[str, Any] = {"input_ids": data["input_ids"]}
    if how == "positional":
        kwargs["attention_mask"] = data["attention_mask"]
    if how == "4d":  # which tokens are padding is not said, so all count
        kwargs["attention_mask"] = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    expected = reference_ratios(model, sites_of(model), kwargs, real)
    observer, _ = observe(model)
    if how == "positional":
        model(data["input_ids"], data["attention_mask"], labels=labels)
    else:
        model(**kwargs, labels=labels)
    torch.testing.assert_close(observer.sums[0] / observer.sums[1], expected, rtol=1e-4, atol=0)


def outputs_of(sites: list[Site]) -> list[weakref.ref[Tensor]]:
    """References to the storage of all outputs of frozen layers from now on."""
    outputs: list[weakref.ref[Tensor]] = []
    for site in sites:
        site.base.register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out.untyped_storage())))
    return outputs


def alive(outputs: list[weakref.ref[Tensor]]) -> list[Tensor]:
    gc.collect()
    return [output for reference in outputs if (output := reference()) is not None]


def test_evaluation_does_not_count() -> None:
    model = student()
    observer, sites = observe(model)
    outputs = outputs_of(sites)
    model.eval()
    model(**inputs())
    model.train()
    with torch.no_grad():
        model(**inputs())
    assert observer.sums.eq(0).all()
    assert outputs and not alive(outputs)
    model(**inputs())
    assert observer.sums[1].gt(0).all()


def test_only_passes_that_are_due_count_and_are_watched() -> None:
    model, due = student(), [True, False, True]
    sites = sites_of(model)
    blocks = block_specs(transformers_model(model))
    observer = ModuleObserver(model, sites, blocks, torch.device("cpu"), iter(due).__next__)
    watched, sums = [], []
    model.register_forward_hook(lambda *_: watched.append(has_hooks(sites[0].base)))
    for seed in range(3):
        model(**inputs(seed=seed, rows=4, padding="right"))
        sums.append(observer.sums.clone())
    assert watched == due
    assert sums[1].equal(sums[0]) and bool((sums[2] > sums[1]).all())


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "opt"])
def test_rank_taylor(name: str) -> None:
    model, data = student(name), inputs(name)
    sites = sites_of(model)
    observer = RankObserver(sites)
    for part in (slice(0, 2), slice(2, 3)):
        model(**{key: value[part] for key, value in data.items()}).loss.backward()
    terms = [half.split([site.spec.rank for site in sites]) for half in observer.take_terms().chunk(2)]
    for site, down, up in zip(sites, *terms, strict=True):
        torch.testing.assert_close(down, (site.down * site.down.grad).mean(1))
        torch.testing.assert_close(up, (site.up * site.up.grad).mean(0))
    assert max(float(t.abs().max()) for half in terms for t in half) > 0
    assert observer.take_terms().eq(0).all()
