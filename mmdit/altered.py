"""A transformer with some of its parts left out for some rows of a batch, as guidance by a worse prediction needs it.

It is put on for one evaluation, by a hook on a block or in the place of a module's `attend`. So it holds under every
plan of the memory, and rows that are changed and rows that are not run in one batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.common.lent import lend
from mmdit.model import MMDiT


class Change(NamedTuple):
    """What is left out: "skip" whole blocks, or "perturb" what image tokens gather from each other in them."""

    kind: Literal["skip", "perturb"]
    blocks: tuple[int, ...]


@contextmanager
def altered(model: MMDiT, changes: Mapping[Change, Sequence[int]]) -> Iterator[None]:
    """Meanwhile the model is changed so for these rows of every batch that it is called with.

    Raises IndexError for a block that is not there.
    """
    ways = {"skip": skip, "perturb": perturb}
    with ExitStack() as stack:
        for change, rows in changes.items():
            for i in change.blocks:
                stack.callback(ways[change.kind](model.joint_blocks[i], torch.as_tensor(rows)))
        yield


def skip(block: nn.Module, rows: Tensor) -> Callable[[], None]:
    """Let these rows pass a block as they are, both streams; returns what takes the change back.

    Skip-layer guidance: Stability AI, sd3.5, `SkipLayerCFGDenoiser`.
    """

    def hook(_: nn.Module, given: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        index = rows.to(out[0].device)
        return tuple(new.index_copy(0, index, old.index_select(0, index)) for old, new in zip(given, out))

    return block.register_forward_hook(hook).remove


def perturb(block: Any, rows: Tensor) -> Callable[[], None]:
    """Let image tokens of these rows gather from the text and themselves alone; returns what takes the change back.

    Perturbed-attention guidance, Ahn et al. 2024 (arXiv 2403.17377): the image's self-attention becomes the identity,
    here in the joint attention and in the second.
    """
    undo = [_attend(block.x_block.attn, rows)]
    if hasattr(block.x_block, "attn2"):
        undo.append(_attend(block.x_block.attn2, rows))

    def back() -> None:
        for one in undo:
            one()

    return back


def _attend(attn: Any, rows: Tensor) -> Callable[[], None]:
    attend = attn.attend

    def perturbed(q: Tensor, k: Tensor, v: Tensor, tokens: Any) -> Tensor:
        gathered = attend(q, k, v, tokens)  # (B, N, D)
        index, image = rows.to(q.device), tokens.rows * tokens.columns
        q, k, v = (t.index_select(0, index) for t in (q, k, v))
        first, text = q.shape[1] - image, k.shape[1] - image
        alone = _alone(q[:, first:], k, v, text).flatten(2).to(gathered)
        worse = torch.cat([gathered.index_select(0, index)[:, :first], alone], dim=1)
        return gathered.index_copy(0, index, worse)

    return lend(attn, "attend", perturbed)


def _alone(q: Tensor, k: Tensor, v: Tensor, text: int) -> Tensor:
    """What each image token `(B, N, H, d)` gathers from the first `text` of the tokens and from itself."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (q, k, v))
    to_text = torch.einsum("bnhd,bmhd->bnhm", q, k[:, :text])  # (B, N, H, M)
    to_self = (q * k[:, text:]).sum(dim=-1, keepdim=True)  # (B, N, H, 1)
    shares = (torch.cat([to_text, to_self], dim=-1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return torch.einsum("bnhm,bmhd->bnhd", shares[..., :text], v[:, :text]) + shares[..., text:] * v[:, text:]
