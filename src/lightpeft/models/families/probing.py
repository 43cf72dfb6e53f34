"""Which part each linear layer of a transformer block plays, measured instead of read off its name.

The output of one layer is changed at one token, and what the other layers then read tells its part: a change of k or v
reaches the attention output at other tokens too, one of q at its own only; twice v gives twice the attention; what is
left over is the FFN, where twice `in` gives twice the neurons and twice the gate does not. In the same way an argument
of attention has one entry a head if another entry changes what that head gives, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lightpeft.errors import LightPeftError, require
from lightpeft.models.arguments import argument_names, change_arguments
from lightpeft.models.families.skeleton import one_line, random_inputs
from lightpeft.models.linears import features, is_linear

Change = Callable[[Tensor], Tensor]
"""From the output [tokens, width] of a linear layer to another one."""


def run(model: nn.Module, inputs: dict[str, Tensor], handles: Sequence[RemovableHandle] = ()) -> Tensor:
    """The first output of a model, without gradients; the hooks are taken off afterwards.

    Raises:
        LightPeftError: the model does not run on these inputs.
    """
    try:
        with torch.no_grad():
            return cast(Tensor, model(**inputs)[0])
    except Exception as error:  # a model class of anyone's own may raise anything
        raise LightPeftError(f"{type(model).__name__} does not run on random inputs: {one_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()


class Probe:
    """Runs a model with one linear layer's output changed, and compares what the other layers of a block read."""

    def __init__(self, model: PreTrainedModel, block: nn.Module, where: str) -> None:
        """
        Args:
            where: the block's name for messages.

        Raises:
            LightPeftError: the model does not run on random inputs, or does not use a layer.
        """
        self.model, self.block, self.where = model, block, where
        self.inputs = random_inputs(model, rows=1)  # of one sequence: rows of [..., width] are its tokens
        self.linears = {name: module for name, module in block.named_modules() if is_linear(module)}
        modules = list(block.modules())
        self.unchanged = self._reads()
        self.order = list(self.unchanged)
        same = len(modules) == len(list(block.modules())) and all(map(_is, modules, block.modules()))
        require(same, f"{where} replaces modules of its own while it runs")
        idle = [name for name in self.linears if name not in self.unchanged]
        require(not idle, f"{where}.{''.join(idle[:1])} takes no part in a forward pass")

    def effect(self, name: str, change: Change) -> dict[str, tuple[Tensor, Tensor]]:
        """What changing the output of `name` does: layer -> what it read before and after, [tokens, width] each, of the
        later layers that read something else, in the order they run."""
        changed = self._reads(self.linears[name].register_forward_hook(_Once(change)))
        later = self.order[self.order.index(name) + 1 :]
        pairs = {other: (self.unchanged[other], changed[other]) for other in later}
        return {other: pair for other, pair in pairs.items() if differing_tokens(*pair).any()}

    def doubles(self, name: str, reader: str) -> bool:
        """Whether twice the output of `name` is twice what `reader` reads."""
        before, after = self.effect(name, lambda rows: 2 * rows).get(reader, (torch.zeros(1), torch.ones(1)))
        return bool(torch.allclose(after, 2 * before, rtol=1e-3, atol=1e-4))

    def per_head_arguments(self, attention: str, output: str, heads: int) -> dict[str, int]:
        """Arguments of an attention module with one entry a query head -> the dimension that has them.

        Another first entry makes the first head, and no other, give something else to the projection `output`.
        """
        module = self.block.get_submodule(attention)
        arguments = self._arguments(module).items()
        places = [(name, dim) for name, value in arguments for dim, size in enumerate(value.shape) if size == heads > 1]
        return {name: dim for name, dim in places if self._changed_heads(module, name, dim, output, heads) == [0]}

    def _arguments(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of numbers that a module is called with, by name."""
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Callable[[Any], Any]:
            def same(value: Any) -> Any:
                if isinstance(value, Tensor) and value.is_floating_point():
                    seen[name] = value
                return value

            return same

        run(self.model, self.inputs, [change_arguments(module, {name: note(name) for name in argument_names(module)})])
        return seen

    def _changed_heads(self, module: nn.Module, argument: str, dim: int, output: str, heads: int) -> list[int]:
        """Heads that give something else when the first entry of an argument along a dimension is another one."""

        def change(value: Tensor) -> Tensor:
            noise = torch.zeros_like(value)
            noise.select(dim, 0).normal_(generator=torch.Generator().manual_seed(2))
            return value + noise

        before, after = self.unchanged[output], self._reads(change_arguments(module, {argument: change}))[output]
        by_head = (before - after).abs().unflatten(-1, (heads, -1)).amax((0, 2))
        return (by_head > 1e-5 * before.abs().max()).nonzero().flatten().tolist()

    def features(self, name: str) -> tuple[int, int]:
        """Output and input features of a layer."""
        return features(self.linears[name])

    def _reads(self, *changes: RemovableHandle) -> dict[str, Tensor]:
        """The first input [tokens, width] of every linear layer, in the order they run, under hooks that change it."""
        reads: dict[str, Tensor] = {}

        def note(other: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                reads.setdefault(other, _rows(args[0]).clone())

            return hook

        handles = [layer.register_forward_pre_hook(note(other)) for other, layer in self.linears.items()]
        run(self.model, self.inputs, [*handles, *changes])
        return reads


class _Once:
    """Forward hook that changes the first output of a layer."""

    def __init__(self, change: Change) -> None:
        self.change: Change | None = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        change, self.change = self.change, None
        return output if change is None else change(_rows(output)).view_as(output)


def block_slots(probe: Probe) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Slot -> linear layer of every attention of a block, in the order they run, and of its FFN (empty without one).

    Raises:
        LightPeftError: there is no attention, or layers whose part is not that of a slot.
    """
    readers: dict[str, str] = {}
    spreading: set[str] = set()
    for name in probe.order:
        effect = probe.effect(name, _disturb_one_token)
        if effect:
            readers[name], pair = next(iter(effect.items()))
            if (differing_tokens(*pair).nonzero().flatten() != _middle(len(pair[0]))).any():
                spreading.add(name)
    outputs = [name for name in probe.order if name in {readers[source] for source in spreading}]
    require(outputs, f"{probe.where} has no attention: no linear layer passes anything on from one token to another")
    sources = {output: [name for name in probe.order if readers.get(name) == output] for output in outputs}
    attentions = [_attention_slots(probe, sources[output], spreading, output) for output in outputs]
    used = {name for table in attentions for name in table.values()}
    rest = [name for name in probe.order if name not in used]
    return attentions, _ffn_slots(probe, rest, readers) if rest else {}


def _attention_slots(probe: Probe, sources: list[str], spreading: set[str], output: str) -> dict[str, str]:
    """q, k, v (or qkv) and o."""
    if len(sources) == 1:
        return {"qkv": sources[0], "o": output}
    wide = [name for name in sources if name in spreading]
    local = [name for name in sources if name not in spreading]
    require(
        len(local) == 1 and len(wide) == 2,
        f"{probe.where}.{output} reads attention over {', '.join(sources)}, which are not q, k and v (or qkv)",
    )
    k, v = _told_apart(probe, wide, output)
    return {"q": local[0], "k": k, "v": v, "o": output}


def _ffn_slots(probe: Probe, rest: list[str], readers: dict[str, str]) -> dict[str, str]:
    """ffn_in (and ffn_gate, or both fused) and ffn_out."""
    output = next((readers[name] for name in rest if readers.get(name) in rest), rest[-1])
    sources = [name for name in rest if name != output]
    neurons = probe.features(output)[1]
    widths = {probe.features(name)[0] for name in sources}
    clear = all(readers.get(name) == output for name in sources)
    if clear and len(sources) == 1 and widths <= {neurons, 2 * neurons}:
        return {"ffn_in" if widths == {neurons} else "ffn_gate_in": sources[0], "ffn_out": output}
    if clear and len(sources) == 2 and widths == {neurons}:
        gate, up = _told_apart(probe, sources, output)
        return {"ffn_in": up, "ffn_gate": gate, "ffn_out": output}
    raise LightPeftError(f"{probe.where} has linear layers beside attention that are not one FFN: {', '.join(rest)}")


def _told_apart(probe: Probe, names: list[str], reader: str) -> tuple[str, str]:
    """Two layers, that second in whose output the reader's input is linear; as they run where that does not decide."""
    first, second = names
    if probe.doubles(first, reader) and not probe.doubles(second, reader):
        return second, first
    return first, second


def differing_tokens(before: Tensor, after: Tensor) -> Tensor:
    """Boolean per token: whether its row of [tokens, width] is another one."""
    return (before - after).abs().amax(1) > 1e-5 * before.abs().max()


def _disturb_one_token(rows: Tensor) -> Tensor:
    noise = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(2))
    changed = rows.clone()
    changed[_middle(len(rows))] += rows.std() * noise
    return changed


def _middle(tokens: int) -> int:
    """A token that attends to others in a decoder, and that others attend to."""
    return min(4, tokens // 2)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _is(first: object, second: object) -> bool:
    return first is second
