"""The transformer for given texts: what all steps have in common, or is known before the first, computed once.

A third of the transformer's weights, the adaLN layers, see only the timestep and the pooled text. Given the noise
levels of a run they are applied before the loop to all at once, in one pass over these weights, which the loop then
does without; likewise the projection of the text and the positions.

The model itself is called as in training. While it is, three of its methods, given just what was prepared, answer from
memory; a model whose forward gives them anything else, or does without them, computes it as it is written.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.altered import Change, altered
from mmdit.common.errors import SettingsError
from mmdit.common.lent import lend
from mmdit.control.adding import Added, adding
from mmdit.maps import Look, Seen, seen
from mmdit.model import MMDiT, Modulation, Modulations


class Row(NamedTuple):
    """What is predicted for one latent of a batch."""

    prepared: "Prepared"
    sigma: float
    text: int  # of those that were prepared
    change: Change | None = None  # of the transformer
    look: Look | None = None  # what else is wanted


class Known(NamedTuple):
    """What a model is called with for some rows beside their latents, and what its methods make of it."""

    sigma: Tensor  # (R,), float32
    context: Tensor  # (R, M, context_size)
    pooled: Tensor  # (R, pooled_size)
    text: Tensor  # (R, M, D), of context
    modulations: list[Modulations]  # of sigma and pooled, each shift, scale and gate (R, 1, D)


class Prepared:
    """Texts, ready for any latents at the noise levels given."""

    def __init__(self, model: MMDiT, context: Tensor, pooled: Tensor, sigmas: Iterable[float] = ()) -> None:
        """context: `(T, M, context_size)` and pooled: `(T, pooled_size)`, of T texts, on the model's device.

        sigmas: the noise levels to expect; any other is computed when it comes.
        """
        self.model, self._context, self._pooled = model, context, pooled
        self.positions: dict[tuple[int, int], Tensor] = {}  # of pictures of so many rows and columns
        self._text = model.embed_text(context)  # (T, M, D)
        self._texts: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._known: dict[float, list[Modulations]] = {}
        self._learn(list(dict.fromkeys(sigmas)))

    def __call__(self, latent: Tensor, sigma: Tensor | float, texts: Sequence[int]) -> Tensor:
        """The velocity of latents `(R, C, h, w)`, all at this noise level, `texts[r]` the text of latent r."""
        return predict(latent, [Row(self, float(sigma), text) for text in texts])

    @property
    def as_in_context(self) -> bool:
        """Whether the blocks see as many tokens of a text as its context has."""
        return self._text.shape[1] == self._context.shape[1]

    @property
    def length(self) -> int:
        """Tokens of each text."""
        return self._text.shape[1]

    def known(self, sigma: float, texts: tuple[int, ...]) -> Known:
        """What rows with these texts have at this noise level."""
        context, pooled, text = self._of(texts)
        level = torch.full((len(texts),), sigma, device=pooled.device)
        return Known(level, context, pooled, text, self._modulations(sigma, texts))

    def _of(self, texts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Kept for the next step: copied once for all steps with and once for those without guidance."""
        every = self._context, self._pooled, self._text
        if self._all(texts):
            return every
        if texts not in self._texts:
            while len(self._texts) > 1:
                self._texts.pop(next(iter(self._texts)))
            context, pooled, text = (tensor.index_select(0, self._index(texts)) for tensor in every)
            self._texts[texts] = context, pooled, text
        return self._texts[texts]

    def _modulations(self, sigma: float, texts: tuple[int, ...]) -> list[Modulations]:
        if sigma not in self._known:
            self._learn([sigma])
        told = self._known[sigma]
        if self._all(texts):
            return told
        index = self._index(texts)
        # All shifts, scales and gates of a stream at once, since each copy costs a launch.
        return [tuple(torch.stack(part).index_select(1, index).unbind() for part in parts) for parts in told]

    def _all(self, texts: tuple[int, ...]) -> bool:
        return texts == tuple(range(len(self._pooled)))

    def _index(self, texts: tuple[int, ...]) -> Tensor:
        if texts not in self._indices:
            self._indices[texts] = torch.tensor(texts, device=self._pooled.device)
        return self._indices[texts]

    def _learn(self, sigmas: list[float]) -> None:
        """The modulations of these noise levels, all in one batch."""
        if not sigmas:
            return
        texts = len(self._pooled)
        every = torch.tensor(sigmas, device=self._pooled.device).repeat_interleave(texts)  # (S T,)
        told = self.model.modulations(every, self._pooled.repeat(len(sigmas), 1))
        for i, sigma in enumerate(sigmas):
            rows = slice(i * texts, (i + 1) * texts)
            self._known[sigma] = [tuple(tuple(t[rows] for t in part) for part in parts) for parts in told]


def predict(latents: Tensor, rows: Sequence[Row], added: Sequence[Added] = (), more: Sequence[Tensor] = ()) -> Any:
    """The velocity of latents `(R, C, h, w)`, in their dtype, each by its own row; all contexts of one length.

    added: behind the blocks, by ControlNets. more: what a ControlNet itself is called with beside; then what it adds.

    Rows that share noise level and preparation should lie side by side: they are looked up at once.
    """
    with _ready(latents, rows, added) as call:
        return call(latents, *more)


def look(
    latents: Tensor, rows: Sequence[Row], added: Sequence[Added] = ()
) -> tuple[Tensor, list[Seen | None]]:  # fmt: skip
    """The same velocity, and what each row looks at; `mmdit.maps.seen` says how. What is added is taken as it is.

    Raises SettingsError for a model whose blocks see other tokens of the text than its context has: looks number those.
    """
    if not all(row.prepared.as_in_context for row in rows):
        raise SettingsError("maps of attention: this variant has tokens of its own beside the text's")
    with _ready(latents, rows, added) as call:
        return seen(rows[0].prepared.model, latents, [row.look for row in rows], call)


@contextmanager
def _ready(latents: Tensor, rows: Sequence[Row], added: Sequence[Added]) -> Iterator[Callable[..., Any]]:
    """Meanwhile the model is as these rows need it; what calls it with latents such as these."""
    groups = [(*key, tuple(row.text for row in some)) for key, some in groupby(rows, lambda row: row[:2])]
    found = [prepared.known(sigma, texts) for prepared, sigma, texts in groups]
    known = found[0] if len(groups) == 1 else together(found)
    first, changes = rows[0].prepared, dict[Change, list[int]]()
    for i, row in enumerate(rows):
        if row.change is not None:
            changes.setdefault(row.change, []).append(i)
    # What is added comes last: a block that rows skip has it added all the same, as in diffusers.
    with answering(first, latents, known), altered(first.model, changes), adding(first.model, added):
        yield lambda x, *more: first.model(x, known.sigma, known.context, known.pooled, *more)


def together(groups: Sequence[Known]) -> Known:
    """Several groups of rows as one batch."""
    sigma, context, pooled, text = (torch.cat(tensors) for tensors in list(zip(*groups))[:4])
    told = [tuple(map(side_by_side, zip(*block))) for block in zip(*(group.modulations for group in groups))]
    return Known(sigma, context, pooled, text, told)


def side_by_side(parts: Sequence[Modulation]) -> Modulation:
    """One stream's modulation of several groups of rows as one batch's."""
    return torch.cat([torch.stack(part) for part in parts], dim=1).unbind()


@contextmanager
def answering(prepared: Prepared, latents: Tensor, known: Known) -> Iterator[None]:
    """Meanwhile the model's methods, given just what is known, answer from memory."""
    model = prepared.model
    positions, embed_text, modulations = model.positions, model.embed_text, model.modulations

    def placed(rows: int, columns: int) -> Tensor:
        if (rows, columns) not in prepared.positions:
            prepared.positions[rows, columns] = positions(rows, columns).to(latents)
        return prepared.positions[rows, columns]

    answers: dict[str, Any] = {
        "positions": placed,
        "embed_text": lambda context: known.text if context is known.context else embed_text(context),
        "modulations": lambda sigma, pooled: (
            known.modulations if sigma is known.sigma and pooled is known.pooled else modulations(sigma, pooled)
        ),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.callback(lend(model, name, answer))
        yield
