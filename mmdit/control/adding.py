"""ControlNets at work: their residuals into a transformer's blocks, by hooks, while it predicts.

Two ways to spread the n residuals of a ControlNet over the transformer's blocks are in use; each net has that of the
program that it was made for:

- diffusers' (models/transformers/transformer_sd3.py): block i of d is given residual i n / d, rounded down; the last
  block none. With 23 residuals for 24 blocks the first is used twice.
- Stability AI's (sd3.5, mmditx.py; ComfyUI, cldm/dit_embedder.py), for SD3.5-Large: each residual for d / n blocks,
  rounded up, one after another; the last block too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdit.model import MMDiT


def residual_of(blocks: int, residuals: int, way: str) -> list[int | None]:
    """Which residual each of the transformer's blocks is given, by number. way: "diffusers" or "stability"."""
    if way == "diffusers":
        return [*(int(i / (blocks / residuals)) for i in range(blocks - 1)), None]
    each = -(-blocks // residuals)
    return [i // each for i in range(blocks)]


class Added(NamedTuple):
    """What one ControlNet adds to some rows of a batch."""

    residuals: Sequence[Tensor]  # (rows, N, D) each
    rows: Sequence[int] | None = None  # of the batch; None: all, in order
    scale: float = 1.0
    way: str = "diffusers"


@contextmanager
def adding(model: MMDiT, parts: Sequence[Added]) -> Iterator[None]:
    """Meanwhile the image tokens behind each block have these added, one after another."""
    depth = len(model.joint_blocks)
    terms: list[list[Term]] = [[] for _ in range(depth)]
    for residuals, rows, scale, way in parts:
        index = None if rows is None else torch.tensor(rows, device=residuals[0].device)
        for own, number in zip(terms, residual_of(depth, len(residuals), way)):
            if number is not None:
                own.append(Term(residuals[number], index, scale))
    with ExitStack() as stack:
        for block, own in zip(model.joint_blocks, terms):
            if own:
                stack.callback(block.register_forward_hook(_adder(own)).remove)
        yield


class Term(NamedTuple):
    """What is added behind one block."""

    residual: Tensor
    rows: Tensor | None
    scale: float


def _adder(terms: Sequence[Term]) -> Callable[..., tuple[Tensor, Tensor]]:
    def hook(_: nn.Module, __: object, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, context = out
        for residual, rows, scale in terms:
            if rows is None:
                x = torch.add(x, residual, alpha=scale)
            else:
                x = x.index_add(0, rows, residual, alpha=scale)
        return x, context

    return hook
