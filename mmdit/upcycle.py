"""Beginning a changed architecture with the weights of another: what fits is taken, and told by parameter.

    told = upcycle(model, weights)     # weights: {name: tensor}, as a state dict or a checkpoint has them
    print(summary(told))

Net2Net's idea (Chen et al. 2015, arXiv 1511.05641): where something is new, gates keep it from speaking at first, so
that a model with more blocks, or more second attentions, begins as the one that it was made from.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

_BLOCK = re.compile(r"joint_blocks\.(\d+)\.(.+)")
_GATES = (2, 5, 8)  # of the chunks of a block's adaLN: attention's, the MLP's, the second attention's
_MODULATION = re.compile(r"(.+)\.adaLN_modulation\.1\.(weight|bias)")


class Taken(NamedTuple):
    """What became of a parameter."""

    name: str
    how: str  # of HOW
    rule: str = ""  # in words


HOW = ("taken", "reshaped", "copied", "new", "dropped")


@torch.no_grad()
def upcycle(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Taken]:
    """Fill a built model, in place, with what fits of other weights; for each of its tensors and theirs what was done.

    - The same name and shape: taken.
    - The same name and as many dimensions: reshaped, the corner that both have is taken. The rest keeps the values
      that the model was given before, but rows of a modulation, which are zero.
    - A block that the weights do not have: copied from their last that has such a tensor, its gates zero.
    - A second attention that the weights do not have: copied from the same block's first; its gate is among the rows
      of a modulation that are new, and zero.
    - Else new: it keeps its values. What the model has no place for is dropped.
    """
    told, used = [], set()
    for name, own in model.state_dict().items():
        source, how, rule = _source(name, own, weights)
        used.add(name)
        if source is not None:
            corner = tuple(slice(min(n, m)) for n, m in zip(own.shape, weights[source].shape))
            if how == "reshaped" and _MODULATION.fullmatch(name):
                own.zero_()
            own[corner] = weights[source][corner].to(own)
            if how == "copied" and (found := _MODULATION.fullmatch(name)):
                _close(own, model.get_submodule(found[1]))
        told.append(Taken(name, how, rule))
    return told + [Taken(name, "dropped") for name in weights if name not in used]


def _source(name: str, own: Tensor, weights: Mapping[str, Tensor]) -> tuple[str | None, str, str]:
    """Which tensor of the weights is for this one, how it comes in, and by which rule."""
    if name in weights:
        shape, theirs = list(own.shape), list(weights[name].shape)
        if shape == theirs:
            return name, "taken", ""
        if len(shape) == len(theirs):
            return name, "reshaped", f"{theirs} to {shape}, by the corner that both have"
        return None, "new", f"{theirs} has no corner in {shape}"
    found = _BLOCK.fullmatch(name)
    if found is None:
        return None, "new", ""
    first = name.replace(".attn2.", ".attn.")
    if first != name and first in weights and weights[first].shape == own.shape:
        return first, "copied", f"from {first}"
    blocks = [int(m[1]) for key in weights if (m := _BLOCK.fullmatch(key)) and m[2] == found[2]]
    others = [f"joint_blocks.{i}.{found[2]}" for i in sorted(blocks, reverse=True) if i < int(found[1])]
    others = [other for other in others if weights[other].shape == own.shape]
    whole = any(key.startswith(f"joint_blocks.{found[1]}.") for key in weights)
    if others and not whole:
        return others[0], "copied", f"from {others[0]}"
    return None, "new", ""


def _close(modulation: Tensor, stream: nn.Module) -> None:
    """Make the gates zero of a modulation's weight or bias, `(chunks * D, ...)`, of a stream with gates."""
    chunks = getattr(stream, "chunks", 0)
    for i, part in enumerate(modulation.chunk(chunks) if chunks else ()):
        if i in _GATES:
            part.zero_()


def summary(told: list[Taken]) -> str:
    """Counts, then a line for every parameter that was not just taken."""
    counts = Counter(each.how for each in told)
    lines = [", ".join(f"{counts[how]} {how}" for how in HOW if counts[how])]
    return "\n".join(
        [*lines, *(f"{t.how}: {t.name}{f' ({t.rule})' if t.rule else ''}" for t in told if t.how != "taken")]
    )
