"""ControlNets at work: their residuals into a transformer's blocks, by hooks, while it predicts.

Two ways to spread the n residuals of a ControlNet over the transformer's blocks are in use; each net has that of the
program that it was made for:

- diffusers' (models/transformers/transformer_sd3.py): block i of d is given residual i n / d, rounded down; the last
  block none. With 23 residuals for 24 blocks the first is used twice.
- Stability AI's (sd3.5, mmditx.py; ComfyUI, cldm/dit_embedder.py), for SD3.5-Large: each residual for d / n blocks,
  rounded up, one after another; the last block too.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.control.network import ControlNet
from mmdit.model import MMDiT
from mmdit.prepared import Row, predict

MAPS = ("diffusers", "stability")


def residual_of(blocks: int, residuals: int, way: str) -> list[int | None]:
    """Which residual each of the transformer's blocks is given, by number. way: one of MAPS."""
    if way == "diffusers":
        return [*(int(i / (blocks / residuals)) for i in range(blocks - 1)), None]
    each = -(-blocks // residuals)
    return [i // each for i in range(blocks)]


def usual_map(net: ControlNet) -> str:
    """The way of the program that this net was made for."""
    return "diffusers" if net.config.context_size else "stability"


class Added(NamedTuple):
    """What one ControlNet adds to some rows of a batch."""

    residuals: Sequence[Tensor]  # (rows, N, D) each
    rows: Sequence[int] | None = None  # of the batch; None: all, in order
    way: str = "diffusers"


@contextmanager
def adding(model: MMDiT, parts: Sequence[Added]) -> Iterator[None]:
    """Meanwhile the image tokens behind each block have these added, one after another."""
    depth = len(model.joint_blocks)
    terms: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in range(depth)]
    for residuals, rows, way in parts:
        index = None if rows is None else torch.tensor(rows, device=residuals[0].device)
        for i, number in enumerate(residual_of(depth, len(residuals), way)):
            if number is not None:
                terms[i].append((residuals[number], index))
    with ExitStack() as stack:
        for block, own in zip(model.joint_blocks, terms):
            if own:
                stack.callback(block.register_forward_hook(_adder(own)).remove)
        yield


def _adder(terms: list[tuple[Tensor, Tensor | None]]) -> Any:
    def hook(_: nn.Module, __: object, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, context = out
        for residual, rows in terms:
            x = x + residual if rows is None else x.index_add(0, rows, residual)
        return x, context

    return hook


def residuals(latents: Tensor, rows: Sequence[Row], controls: Tensor, transformer: MMDiT) -> list[Tensor]:
    """What a ControlNet adds for latents `(R, C, h, w)`, `(R, N, D)` for each of its blocks.

    rows: prepared for it, as those of the transformer are (`mmdit.prepared`). controls: `(R, C', h, w)`.
    """
    net: Any = rows[0].prepared.model
    if net.config.context_size:
        return predict(latents, rows, controls)
    x = transformer.x_embedder(latents)
    return predict(latents, rows, controls, x + transformer.positions(*transformer.grid(latents)).to(x))
