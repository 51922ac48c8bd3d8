"""Maps of attention: how much the image's tokens gather from chosen tokens of the text, with gradients to the latents.

Exact, and never as the whole table: attention is computed once more with other values, a 1 for each of the chosen
tokens and zeros elsewhere, so what is gathered is the share of each. Any fused kernel does that, with its gradients, in
the memory of the chosen tokens alone.

A pass with gradients keeps what goes into every block and computes the rest again on the way back, block by block. So
weights may come and go meanwhile, as in a pass without.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.attention import Backend, attention
from mmdit.common.errors import SettingsError
from mmdit.common.lent import lend
from mmdit.kernels.compiled import uncompiled
from mmdit.model import MMDiT
from mmdit.recompute import recomputed

Cost = Callable[[Tensor], Tensor]  # of one latent's maps: a number

_BY_PYTORCH = ("auto", "sdpa", "cores")  # backends that are PyTorch's own where gradients are wanted
_COLUMNS = 8  # kernels take widths that are multiples of it
_FP16 = 2.0**12  # what a cost is multiplied by on its way back in float16, where small gradients would be nothing


class Look(NamedTuple):
    """What is wanted of a latent beside its velocity."""

    tokens: tuple[int, ...]  # of the text, by number: those that are attended to
    cost: Cost | None = None  # then its gradient is wanted too


class Seen(NamedTuple):
    """What was found for a latent `(C, h, w)`."""

    maps: Tensor  # (blocks, tokens, rows, columns), float32: the shares that image tokens gather, mean of the heads
    cost: Tensor | None = None  # a number
    gradient: Tensor | None = None  # (1, C, h, w), float32: of the cost, with respect to the latent


def seen(
    model: MMDiT, latents: Tensor, looks: Sequence[Look | None], predict: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Seen | None]]:
    """The velocity that `predict` gives for latents `(R, C, h, w)`, and for each latent what its look asks for.

    predict: calls the model once, with latents in the place of these. Gradients go through the model alone, and only
    to the latents. A latent's own are those of its own cost: rows of a batch know nothing of each other.
    """
    maps: dict[int, Tensor] = {}
    steep = [look is not None and look.cost is not None for look in looks]
    with recording(model, looks, latents, maps, steep=any(steep)):
        if not any(steep):
            velocity, costs, gradients = predict(latents), [None] * len(looks), None
        else:
            with torch.enable_grad(), recomputed(model, maps):
                leaf = latents.detach().requires_grad_()
                velocity = predict(leaf)
                costs = [look.cost(_of(maps, r, look)) if look and look.cost else None for r, look in enumerate(looks)]
                scale = _FP16 if latents.dtype == torch.float16 else 1.0
                total = scale * torch.stack([cost for cost in costs if cost is not None]).sum()
                gradients = torch.autograd.grad(total, leaf)[0].float() / scale  # (R, C, h, w)
    found: list[Seen | None] = []
    for r, (look, cost) in enumerate(zip(looks, costs)):
        if look is None:
            found.append(None)
            continue
        gradient = None if cost is None or gradients is None else gradients[r : r + 1]
        found.append(Seen(_of(maps, r, look).detach(), None if cost is None else cost.detach(), gradient))
    return velocity.detach(), found


def _of(maps: dict[int, Tensor], row: int, look: Look) -> Tensor:
    """One latent's maps `(blocks, tokens, rows, columns)`."""
    return torch.stack([maps[i][row, ..., : len(look.tokens)] for i in sorted(maps)]).permute(0, 3, 1, 2)


@contextmanager
def recording(
    model: MMDiT, looks: Sequence[Look | None], latents: Tensor, maps: dict[int, Tensor], steep: bool = True
) -> Iterator[None]:
    """Meanwhile every evaluation of these latents puts into `maps`, for each block, what they look at.

    maps: filled with `(R, rows, columns, tokens)`, float32, the mean of the heads; as many tokens as the look with the
    most has. steep: whether gradients are to go through them. Raises SettingsError for a model whose attention has no
    shares.
    """
    grid, chosen = model.grid(latents), Chosen([look.tokens if look else () for look in looks])
    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        for i, block in enumerate(model.joint_blocks):
            attn: Any = getattr(block, "x_block", block)
            attn = getattr(attn, "attn", None)
            if not hasattr(attn, "backend"):
                raise SettingsError(f"maps of attention: block {i} of this variant has no attention with shares")
            stack.callback(_record(attn, i, chosen, grid, maps, steep))
        yield


def _record(
    attn: Any, i: int, chosen: "Chosen", grid: tuple[int, int], maps: dict[int, Tensor], steep: bool
) -> Callable[[], None]:
    """Put a backend between an attention and the one it has; returns what takes it away."""
    inner, image = attn.backend, grid[0] * grid[1]

    def backend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        first = q.shape[1] - image  # of the image's tokens that ask
        if steep and inner in _BY_PYTORCH:  # what goes back is most of the work: one way for both
            gathered, every = both(q, k, v, chosen, bias)
            found = every[:, first:]
        else:
            some = None if bias is None else bias.expand(*bias.shape[:-2], q.shape[1], k.shape[1])[..., first:, :]
            found = shares(q[:, first:], k, chosen, inner, some)  # (R, N, H, tokens)
            gathered = attention(q, k, v, inner, bias).unflatten(2, q.shape[2:])
        maps.setdefault(i, found.mean(dim=2).unflatten(1, grid))  # not again where it is computed again
        return gathered

    return lend(attn, "backend", backend)


class Chosen:
    """Tokens of each row of a batch, and the values that tell what is gathered from them; made once for all blocks."""

    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        self.tokens, self.most = tokens, max(map(len, tokens))
        self._made: dict[object, Tensor] = {}

    def ones(self, k: Tensor, begin: int, width: int) -> Tensor:
        """`(R, M, H, width)` for keys `(R, M, H, d)`: column j is 1 for the row's token `begin + j`, 0 for others."""
        key = k.shape[1], k.dtype, k.device, begin, width
        if key not in self._made:
            ones = torch.zeros(len(self.tokens), k.shape[1], width, dtype=k.dtype)
            for row, own in enumerate(self.tokens):
                for column, token in enumerate(own[begin : begin + width]):
                    ones[row, token, column] = 1
            self._made[key] = ones.to(k.device)
        return self._made[key][:, :, None].expand(-1, -1, k.shape[2], -1)


def shares(q: Tensor, k: Tensor, chosen: Chosen, backend: Backend = "auto", bias: Tensor | None = None) -> Tensor:
    """What tokens that ask `(R, N, H, d)` gather from chosen ones of those that answer `(R, M, H, d)`, by softmax.

    bias: as in `attention`. Returns `(R, N, H, tokens)`, float32, zeros where a row has fewer. Values as wide as a head
    are what every kernel takes.
    """
    heads, width = q.shape[2:]
    parts = []
    for begin in range(0, chosen.most, width):
        gathered = attention(q, k, chosen.ones(k, begin, width), backend, bias).unflatten(2, (heads, width))
        parts.append(gathered[..., : min(width, chosen.most - begin)].float())
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def both(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is gathered, `(R, N, H, d)`, and `shares`, by one attention whose values have more columns."""
    width, more = q.shape[-1], -(-chosen.most // _COLUMNS) * _COLUMNS
    values = torch.cat([v, chosen.ones(k, 0, more)], dim=-1)
    wide = (F.pad(q, (0, more)), F.pad(k, (0, more)), values)  # kernels want all equally wide; zeros add nothing
    found = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in wide), attn_mask=bias, scale=width**-0.5)
    gathered, extra = found.transpose(1, 2).split([width, more], dim=-1)
    return gathered, extra[..., : chosen.most].float()
