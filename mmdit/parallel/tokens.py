"""The image's tokens of an evaluation split between processes, which exchange heads for tokens inside the attention.

Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv 2309.14509, section 3): outside the attention each process has some of
the tokens with all of their heads, inside it all of the tokens with some of the heads. Nothing but attention lets
tokens meet, so everything else is the model's own code, on fewer rows.

The text's tokens are on every process, so its half of the blocks is computed by all of them; of its heads each takes
its own in the attention, and all get the others' back. Any number of image tokens will do: parts differ by one at most.

It is a function applied to a built model: hooks on the embedding and on the final layer, and something in the place of
each attention's `attend`. So whoever put something there before, a changed attention for instance, sees all tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmdit.common.lent import lend
from mmdit.kernels.stock import same_code
from mmdit.model import Block, DualBlock, JointBlock, LastContextBlock, MMDiT, SelfAttention, Tokens
from mmdit.parallel.ranks import Line

Shape = tuple[int, ...]


class Part:
    """Which of `tokens` each process of a line has: parts as equal as can be, one after another."""

    def __init__(self, tokens: int, line: Line) -> None:
        self.edges = [tokens * i // line.size for i in range(line.size + 1)]
        self.sizes = [end - begin for begin, end in pairwise(self.edges)]
        self.own = slice(*self.edges[line.place : line.place + 2])

    def of(self, tensor: Tensor) -> Tensor:
        """The own tokens of a tensor `(B, N, ...)`."""
        return tensor[:, self.own].contiguous()


class Exchanges:
    """All exchanges of one evaluation in their order, known before the first: where it fails, the rest can be answered.

    Others wait in them; what they get then is nothing but zeros, and they are told before they use it.
    """

    def __init__(self, line: Line, part: Part, like: Tensor) -> None:
        """like: a tensor on the device, in the number format of all that is exchanged."""
        self.line, self.part, self._like, self._done = line, part, like, 0
        self.shapes: list[tuple[list[Shape], list[Shape]]] = []  # what is sent and found in each

    def __call__(self, sent: Sequence[Tensor]) -> list[Tensor]:
        expected, found = self.shapes[self._done]
        assert [tuple(part.shape) for part in sent] == expected, (self._done, expected)
        given = self.line.exchange(sent, found)
        self._done += 1  # not where memory ran out on the way to it
        return given

    def answer_the_rest(self) -> None:
        """Call after a failure."""
        for sent, _ in self.shapes[self._done :]:
            self([self._like.new_zeros(shape) for shape in sent])


def lacking(model: Any) -> str | None:
    """Why a model's tokens cannot be split; None if they can."""
    stock = type(model) is MMDiT and same_code(type(model).flow, MMDiT.flow)
    for block in model.joint_blocks if stock else ():
        halves = type(getattr(block, "x_block", None)), type(getattr(block, "context_block", None))
        stock = stock and type(block) is JointBlock and halves[0] in (Block, DualBlock)
        stock = stock and halves[1] in (Block, LastContextBlock)
    return None if stock else "this variant's blocks are not the published ones"


def attentions(model: MMDiT) -> Iterator[tuple[SelfAttention, bool]]:
    """Every attention in the order in which they are called, and whether text asks there."""
    for block in model.joint_blocks:
        half: Any = block.x_block
        yield half.attn, not isinstance(block.context_block, LastContextBlock)
        if isinstance(half, DualBlock):
            yield half.attn2, False


def exchanges_of(model: MMDiT, line: Line, latents: Tensor, text: int) -> Exchanges:
    """Those of an evaluation of latents `(B, C, h, w)`, in the model's number format, with so many text tokens.

    For each attention queries, keys and values of the image, `(3, B, N, heads, head size)`, then what was gathered,
    `(B, M + N, width)`, with the text where that asks. Last what the final layer gives.
    """
    config, batch = model.config, len(latents)
    rows, columns = model.grid(latents)
    part = Part(rows * columns, line)
    plan = Exchanges(line, part, latents)
    heads, width = config.num_heads // line.size, config.hidden_size // line.size
    own, every = part.sizes[line.place], range(line.size)
    for _, asks in attentions(model):
        into: list[Shape] = [(3, batch, own, heads, config.head_size) for _ in every]
        plan.shapes.append((into, [(3, batch, size, heads, config.head_size) for size in part.sizes]))
        asked = text if asks else 0
        back: list[Shape] = [(batch, asked + size, width) for size in part.sizes]
        plan.shapes.append((back, [(batch, asked + own, width) for _ in every]))
    last: list[Shape] = [(batch, own, config.patch_channels) for _ in every]
    plan.shapes.append((last, [(batch, size, config.patch_channels) for size in part.sizes]))
    return plan


@contextmanager
def split(model: MMDiT, exchange: Exchanges) -> Iterator[None]:
    """Meanwhile the model's one evaluation, called by every process of the line alike, is shared by them.

    exchange: of this evaluation. All of the line get the whole velocity. What is added behind the blocks has to be that
    of the own tokens (`Part`). Gradients do not flow. The number of processes divides that of the heads.
    """
    line, part = exchange.line, exchange.part
    flow = model.flow

    def shared(latent: Tensor, positions: Tensor, context: Tensor, modulations: Any) -> Tensor:
        with ExitStack() as stack:
            for attn, _ in attentions(model):
                stack.callback(_exchanging(attn, exchange))
            return flow(latent, positions[:, part.own], context, modulations)

    back = lend(model, "flow", shared)
    hooks = [
        model.x_embedder.register_forward_hook(lambda *call: part.of(call[2])),
        model.final_layer.register_forward_hook(lambda *call: torch.cat(exchange([call[2]] * line.size), dim=1)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        back()


def _exchanging(attn: Any, exchange: Exchanges) -> Callable[[], None]:
    """Put the exchange around an attention; returns what takes it away."""
    line, sizes = exchange.line, exchange.part.sizes
    inner, size = attn.attend, sizes[line.place]

    def attend(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        heads = q.shape[2] // line.size
        mine, asked = slice(line.place * heads, (line.place + 1) * heads), q.shape[1] - size
        image = torch.stack([t[:, t.shape[1] - size :] for t in (q, k, v)])  # (3, B, n, H, d)
        image = torch.cat(exchange(image.split(heads, dim=3)), dim=2)  # (3, B, N, H / ranks, d)
        q, k, v = (torch.cat([t[:, : t.shape[1] - size, mine], i], dim=1) for t, i in zip((q, k, v), image))
        text, *parts = inner(q, k, v, tokens).split([asked, *sizes], dim=1)  # (B, M + N, width / ranks)
        return torch.cat(exchange([torch.cat([text, t], dim=1) for t in parts]), dim=2)  # (B, M + n, width)

    return lend(attn, "attend", attend)
