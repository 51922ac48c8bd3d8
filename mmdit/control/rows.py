"""The rows of a batch and the ControlNets that control them: each row its own, any number of them, or none."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.control.adding import Added
from mmdit.model import MMDiT
from mmdit.prepared import Prepared, Row, predict


class Control(NamedTuple):
    """What controls one row."""

    prepared: Prepared  # by the ControlNet, of the texts that the transformer has, in the same order
    latent: Tensor  # (1, C', h, w), of the picture that it controls by
    scale: float
    way: str  # of `mmdit.control.adding.residual_of`


def added(
    transformer: MMDiT, latents: Tensor, rows: Sequence[Row], controls: Sequence[Sequence[Control]]
) -> list[Added]:
    """What the ControlNets of these rows add, in the order in which the rows name them.

    latents: `(R, C, h, w)`. rows: as the transformer is asked for them. controls: of each row.
    """
    found: list[Added] = []
    for net, scale, way in dict.fromkeys((c.prepared.model, c.scale, c.way) for own in controls for c in own):
        which, asked, pictures = [], list[Row](), list[Tensor]()
        for i, (row, own) in enumerate(zip(rows, controls)):
            for control in own:
                if (control.prepared.model, control.scale, control.way) == (net, scale, way):
                    which.append(i)
                    asked.append(Row(control.prepared, row.sigma, row.text))
                    pictures.append(control.latent)
        every = which == list(range(len(rows)))
        these = latents if every else latents[which]
        found.append(
            Added(residuals(transformer, these, asked, torch.cat(pictures)), None if every else which, scale, way)
        )
    return found


def residuals(transformer: MMDiT, latents: Tensor, rows: Sequence[Row], controls: Tensor) -> list[Tensor]:
    """What a ControlNet adds for latents `(R, C, h, w)`: `(R, N, D)` for each of its blocks.

    rows: prepared by it. controls: `(R, C', h, w)`.
    """
    net: Any = rows[0].prepared.model
    controls = controls.to(latents)
    if net.config.context_size:
        return predict(latents, rows, more=(controls,))
    x = transformer.x_embedder(latents)
    return predict(latents, rows, more=(controls, x + transformer.positions(*transformer.grid(latents)).to(x)))
