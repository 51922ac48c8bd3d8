"""The transformer for given texts: what all steps have in common, or is known before the first, computed once.

A third of the transformer's weights, the adaLN layers, see only the timestep and the pooled text. Given the noise
levels of a run they are applied before the loop to all at once, in one pass over these weights, which the loop then
does without; likewise the projection of the text and the positions.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.model import MMDiT, Modulation, Modulations, crop_positions


class Row(NamedTuple):
    """What is predicted for one latent of a batch."""

    prepared: "Prepared"
    sigma: float
    text: int  # of those that were prepared


class Prepared:
    """Texts, ready for any latents at the noise levels given."""

    def __init__(self, model: MMDiT, context: Tensor, pooled: Tensor, sigmas: Iterable[float] = ()) -> None:
        """context: `(T, M, context_size)` and pooled: `(T, pooled_size)`, of T texts, on the model's device.

        sigmas: the noise levels to expect; any other is computed when it comes.
        """
        self.model, self.pooled = model, pooled
        self._context = model.context_embedder(context)  # (T, M, D)
        self._contexts: dict[tuple[int, ...], Tensor] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._known: dict[float, list[Modulations]] = {}
        self._learn(list(dict.fromkeys(sigmas)))

    def __call__(self, latent: Tensor, sigma: Tensor | float, texts: Sequence[int]) -> Tensor:
        """The velocity of latents `(R, C, h, w)`, all at this noise level, `texts[r]` the text of latent r."""
        return predict(latent, [Row(self, float(sigma), text) for text in texts])

    def positions(self, latent: Tensor) -> Tensor:
        """`(1, N, D)`, on the latent's device and in its dtype."""
        size = self.model.tokens(latent)
        if size not in self._positions:
            self._positions[size] = crop_positions(self.model.pos_embed, *size).to(latent)
        return self._positions[size]

    def context(self, texts: tuple[int, ...]) -> Tensor:
        """`(R, M, D)`, kept for the next step: copied once for all steps with and once for those without guidance."""
        if self._all(texts):
            return self._context
        if texts not in self._contexts:
            while len(self._contexts) > 1:
                self._contexts.pop(next(iter(self._contexts)))
            self._contexts[texts] = self._context.index_select(0, self._index(texts))
        return self._contexts[texts]

    def modulations(self, sigma: float, texts: tuple[int, ...]) -> list[Modulations]:
        """What every block is told at this noise level, each shift, scale and gate `(R, 1, D)`."""
        if sigma not in self._known:
            self._learn([sigma])
        told = self._known[sigma]
        if self._all(texts):
            return told
        index = self._index(texts)
        # All shifts, scales and gates of a stream at once, since each copy costs a launch.
        return [tuple(torch.stack(part).index_select(1, index).unbind() for part in parts) for parts in told]

    def _all(self, texts: tuple[int, ...]) -> bool:
        return texts == tuple(range(len(self.pooled)))

    def _index(self, texts: tuple[int, ...]) -> Tensor:
        if texts not in self._indices:
            self._indices[texts] = torch.tensor(texts, device=self.pooled.device)
        return self._indices[texts]

    def _learn(self, sigmas: list[float]) -> None:
        """The modulations of these noise levels, all in one batch."""
        if not sigmas:
            return
        texts = len(self.pooled)
        every = torch.tensor(sigmas, device=self.pooled.device).repeat_interleave(texts)  # (S T,)
        told = self.model.modulations(every, self.pooled.repeat(len(sigmas), 1))
        for i, sigma in enumerate(sigmas):
            rows = slice(i * texts, (i + 1) * texts)
            self._known[sigma] = [tuple(tuple(t[rows] for t in part) for part in parts) for parts in told]


def predict(latents: Tensor, rows: Sequence[Row]) -> Tensor:
    """The velocity of latents `(R, C, h, w)`, in their dtype, each by its own row; all contexts of one length.

    Rows that share noise level and preparation should lie side by side: they are looked up at once.
    """
    groups = [(*key, tuple(row.text for row in some)) for key, some in groupby(rows, lambda row: row[:2])]
    contexts = [prepared.context(texts) for prepared, _, texts in groups]
    told = [prepared.modulations(sigma, texts) for prepared, sigma, texts in groups]
    context = contexts[0] if len(groups) == 1 else torch.cat(contexts)  # (R, M, D)
    modulations = told[0] if len(groups) == 1 else [tuple(map(side_by_side, zip(*block))) for block in zip(*told)]
    first = rows[0].prepared
    return first.model.flow(latents, first.positions(latents), context, modulations)


def side_by_side(parts: Sequence[Modulation]) -> Modulation:
    """One stream's modulation of several groups of rows as one batch's."""
    return torch.cat([torch.stack(part) for part in parts], dim=1).unbind()
