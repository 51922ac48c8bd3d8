"""The transformer for given texts: what all steps have in common, or is known before the first, computed once.

A third of the transformer's weights, the adaLN layers, see only the timestep and the pooled text. Given the noise
levels of a run they are applied before the loop to all at once, in one pass over these weights, which the loop then
does without; likewise the projection of the text and the positions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from mmdit.model import MMDiT, Modulation, Modulations, crop_positions


class Prepared:
    """A velocity of latents and sigma, as a sampler takes it, in the latents' dtype."""

    def __init__(self, model: MMDiT, context: Tensor, pooled: Tensor, count: int, sigmas: Iterable[float] = ()) -> None:
        """context: `(T, M, context_size)` and pooled: `(T, pooled_size)`, of T texts, on the model's device.

        count: latents for each text; the batch has those of the first text first. sigmas: the noise levels to expect;
        any other is computed when it comes.
        """
        self.model, self.pooled, self.count = model, pooled, count
        self.context = model.context_embedder(context).repeat_interleave(count, dim=0)  # (T count, M, D)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._known: dict[float, list[Modulations]] = {}
        self._learn(list(dict.fromkeys(sigmas)))

    def __call__(self, latent: Tensor, sigma: Tensor) -> Tensor:
        """latent: `(T count, C, h, w)`, or fewer, for the first texts alone.

        sigma: a scalar, best on the CPU: reading it must not wait for the GPU.
        """
        level, size = float(sigma), self.model.tokens(latent)
        if level not in self._known:
            self._learn([level])
        if size not in self._positions:
            self._positions[size] = crop_positions(self.model.pos_embed, *size).to(latent)
        told, texts = self._known[level], len(latent) // self.count
        if self.count > 1 or texts < len(self.pooled):
            told = [tuple(self._spread(part, texts) for part in parts) for parts in told]
        return self.model.flow(latent, self._positions[size], self.context[: len(latent)], told)

    def _spread(self, part: Modulation, texts: int) -> Modulation:
        """For every latent of the first texts; all shifts, scales and gates at once, since each copy costs a launch."""
        return torch.stack(part)[:, :texts].repeat_interleave(self.count, dim=1).unbind()

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
