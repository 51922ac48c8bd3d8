"""Looking inside a transformer while it draws, and putting something else in the places of its parts.

    with capture(pipe.transformer, what=("x", "attention"), blocks=(3, 4), words=(2,)) as seen:
        pipe("a blue horse", seed=1)
    seen["words"][0, 3]                      # step 0, block 3

    with ablate(pipe.transformer, "joint_blocks.2.x_block.attn", heads=(1,)):
        pipe("a blue horse", seed=1)

All of it is hooks, and holds under every plan of the memory. A row of a batch is a picture's text: of one picture with
guidance, row 0 is the prompt's and row 1 the negative's. Steps are counted from 0, evaluations of the network in fact.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.attention import attention
from mmdit.common.errors import SettingsError
from mmdit.common.lent import lend
from mmdit.memory.plan import told
from mmdit.model import MMDiT, Tokens

Key = tuple[int, int]  # step and block

# What a module returns, by its path in a block.
OUTPUTS = {
    "attn": "x_block.attn",
    "attn2": "x_block.attn2",
    "mlp": "x_block.mlp",
    "context_attn": "context_block.attn",
    "context_mlp": "context_block.mlp",
}
WHAT = ("x", "context", "modulation", "attention", "lens", *OUTPUTS)
_LIMIT = 2 << 30  # bytes of what is captured
_SCORES = 1 << 24  # of one head's attention at a time


class Seen(dict[str, dict[Key, Tensor]]):
    """What was captured, by name, then by step and block; on the CPU, in the model's number format."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.bytes = limit, 0

    def keep(self, name: str, step: int, block: int, value: Tensor) -> None:
        self.bytes += value.numel() * value.element_size()
        if self.bytes > self.limit:
            raise SettingsError(
                f"captured tensors take more than {told(self.limit)}: expected fewer blocks, steps or kinds, "
                "or another limit"
            )
        self.setdefault(name, {})[step, block] = value.detach().to("cpu", copy=True)


@contextmanager
def capture(
    model: MMDiT,
    what: Sequence[str] = ("x",),
    blocks: Sequence[int] | None = None,
    words: Sequence[int] = (),
    patches: Sequence[int] = (),
    texts: Sequence[int] = (),
    limit: int = _LIMIT,
) -> Iterator[Seen]:
    """Meanwhile keep of every evaluation, for these blocks (default: all):

    - "x", "context": the tokens `(R, N, D)` and `(R, M, D)` after the block;
    - "attn", "attn2", "mlp", "context_attn", "context_mlp": what that part adds before its gate, `(R, N, D)`;
    - "modulation": the shifts, scales and gates of the image's stream, `(chunks, R, 1, D)`;
    - "attention": of each head, for `words`, tokens of the context by number: how much each image token gathers from
      them, `(R, H, N, words)`; for `patches`, image tokens by number: how much they gather from each token, text first,
      `(R, H, patches, M + N)`; for `texts`, tokens of the context by number: the same of them, but in the last block,
      where the text asks nothing. Exact, without the whole table; its name is "words", "patches" or "texts" in what is
      returned;
    - "lens": the velocity `(R, C, h, w)` if this block were the last.

    limit: bytes of all of it. Raises SettingsError beyond, and for a name that is none.
    """
    depth = model.config.depth
    wanted = range(depth) if blocks is None else blocks
    for name in what:
        if name not in WHAT:
            raise SettingsError(f"capture: no {name!r}: there are {', '.join(WHAT)}")
    if any(not 0 <= block < depth for block in wanted):
        raise SettingsError(f"capture: blocks {list(wanted)} are not all among the {depth} from 0")
    if "attention" in what and not (words or patches or texts):
        raise SettingsError("capture: attention of what? words, patches or texts number tokens")
    seen = Seen(limit)
    with ExitStack() as stack:
        look = Look(model, seen, stack, words, patches, texts)
        for block in wanted:
            for name in what:
                look.at(name, block)
        yield seen


class Look:
    """The hooks of one capture; they are taken off when its stack is left."""

    def __init__(self, model: MMDiT, seen: Seen, stack: ExitStack, *tokens: Sequence[int]) -> None:
        self.model, self.seen, self.stack = model, seen, stack
        self.words, self.patches, self.texts = map(list, tokens)
        self.step, self.tokens = -1, Tokens(0, 0, 0)
        self.before(model, self.started)

    def started(self, _: object) -> None:
        self.step += 1

    def noted(self, given: tuple[Any, ...]) -> None:
        self.tokens = given[2]

    def before(self, module: nn.Module, see: Callable[[tuple[Any, ...]], None]) -> None:
        """Call `see` with what a module is given; whatever it returns changes nothing."""

        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            see(given)

        self.stack.callback(module.register_forward_pre_hook(hook).remove)

    def after(self, module: nn.Module, see: Callable[[tuple[Any, ...], Any], None]) -> None:
        """Call `see` with what a module was given and returns."""

        def hook(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            see(given, out)

        self.stack.callback(module.register_forward_hook(hook).remove)

    def keep(self, name: str, i: int, value: Tensor) -> None:
        self.seen.keep(name, self.step, i, value)

    def at(self, name: str, i: int) -> None:
        """Capture this of block i."""
        block: Any = self.model.joint_blocks[i]
        if name in ("x", "context"):
            self.after(block, lambda _, out: self.keep(name, i, out[name == "context"]))
        elif name == "modulation":
            self.before(block, lambda given: self.keep(name, i, torch.stack(given[3])))
        elif name == "attention":
            self.before(block, self.noted)
            self.record(block.x_block.attn, i)
        elif name == "lens":
            self.before(block, self.noted)
            self.read(block, i)
        elif any(path == OUTPUTS[name] for path, _ in block.named_modules()):  # not every block has every part
            self.after(block.get_submodule(OUTPUTS[name]), lambda _, out: self.keep(name, i, out))

    def read(self, block: nn.Module, i: int) -> None:
        """A block's tokens through the final layer of the same evaluation."""
        final, tokens = self.model.final_layer, dict[int, Tensor]()

        def see(given: tuple[Any, ...]) -> None:
            x = type(final).forward(final, tokens.pop(i), given[1])  # (R, N, patch² C)
            self.keep("lens", i, self.model.unpatch(x, self.tokens.rows, self.tokens.columns))

        self.after(block, lambda _, out: tokens.update({i: out[0].detach()}))
        self.before(final, see)

    def record(self, attn: Any, i: int) -> None:
        """Who gathers from whom, by a backend between the attention and the one it has."""
        inner = attn.backend

        def backend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            first = q.shape[1] - self.tokens.rows * self.tokens.columns  # of the image's tokens that ask
            if self.words:
                every = torch.arange(first, q.shape[1], device=q.device)
                some = every.split(max(1, _SCORES // (k.shape[0] * k.shape[1])))
                parts = [shares(q, k, bias, rows)[..., self.words] for rows in some]
                self.keep("words", i, torch.cat(parts, dim=2))
            if self.patches:
                rows = first + torch.tensor(self.patches, device=q.device)
                self.keep("patches", i, shares(q, k, bias, rows))
            if self.texts and first:
                self.keep("texts", i, shares(q, k, bias, torch.tensor(self.texts, device=q.device)))
            return attention(q, k, v, inner, bias).unflatten(2, q.shape[2:])

        self.stack.callback(lend(attn, "backend", backend))


def shares(q: Tensor, k: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """What these of the tokens that ask gather from each that answers, `(B, H, rows, M)`, in float32."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q[:, rows].float(), k.float()) * q.shape[-1] ** -0.5
    if bias is not None:
        every = bias.expand(*bias.shape[:-2], q.shape[1], k.shape[1])[..., rows, :]
        scores = scores.masked_fill(~every, -torch.inf) if bias.dtype == torch.bool else scores + every
    return scores.softmax(dim=-1)


# ---- something else in a part's place --------------------------------------------------------------


@contextmanager
def ablate(
    model: MMDiT,
    part: str,
    heads: Sequence[int] = (),
    by: str | Callable[[int, Any], Any] = "zero",
) -> Iterator[None]:
    """Meanwhile what a part returns is something else: "zero", its "mean" over the tokens, or a function's.

    part: the path of a module, as `joint_blocks.2.x_block.mlp`; of a whole block, that it does nothing is its zero.
    heads: of an attention, by number; the rest of them stay. by: or a function of the step, counted from 0, and of
    what the part would return; of a whole block these are image tokens and text tokens, of heads what all of them
    gathered, `(R, N, H, D / H)`. Raises SettingsError for a part that is not there.
    """
    modules, step = dict(model.named_modules()), -1
    if part not in modules:
        close = [name for name in modules if name.rpartition(".")[2] == part.rpartition(".")[2]][:3]
        raise SettingsError(f"ablate: no part {part!r}{f': there are {chr(44).join(close)}, ...' if close else ''}")
    module: Any = modules[part]

    def started(*_: object) -> None:
        nonlocal step
        step += 1

    def other(value: Any) -> Any:
        if callable(by):
            return by(step, value)
        return torch.zeros_like(value) if by == "zero" else value.mean(dim=1, keepdim=True).expand_as(value)

    def some_heads(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        gathered = given[0].unflatten(2, (-1, module.head_size)).clone()  # (B, N, H, D / H)
        gathered[:, :, list(heads)] = other(gathered)[:, :, list(heads)]
        return (gathered.flatten(2), *given[1:])

    def whole(_: nn.Module, given: tuple[Any, ...], out: Any) -> Any:
        if not isinstance(out, tuple) or callable(by):
            return other(out)
        return tuple(given[: len(out)]) if by == "zero" else tuple(other(stream) for stream in out)

    if by not in ("zero", "mean") and not callable(by):
        raise SettingsError(f"ablate: by is {by!r}: expected zero, mean or a function")
    if heads and not hasattr(module, "head_size"):
        raise SettingsError(f"ablate: {part} has no heads")
    handles = [model.register_forward_pre_hook(started)]
    handles.append(module.register_forward_pre_hook(some_heads) if heads else module.register_forward_hook(whole))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def patch(
    model: MMDiT,
    seen: Mapping[str, Mapping[Key, Tensor]],
    name: str,
    blocks: Sequence[int],
    steps: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[None]:
    """Meanwhile these blocks' part is what another run had there, captured under this name, at the same step.

    name: "x" or "context", the tokens after a block, or one of "attn", "attn2", "mlp", "context_attn", "context_mlp".
    steps, rows: only in these steps, and in these rows of the batch (default: all). Raises SettingsError for what was
    not captured.
    """
    streams = ("x", "context")
    if name not in (*streams, *OUTPUTS):
        raise SettingsError(f"patch: no {name!r}: there are {', '.join((*streams, *OUTPUTS))}")
    if missing := set(blocks) - {block for _, block in seen.get(name, {})}:
        raise SettingsError(f"patch: {name} was not captured in blocks {sorted(missing)}")

    def put(step: int, block: int, value: Tensor) -> Tensor:
        if (step, block) not in seen[name]:
            raise SettingsError(f"patch: {name} of block {block} was not captured in step {step}")
        other = seen[name][step, block].to(value)
        if rows is None:
            return other
        value = value.clone()
        value[list(rows)] = other[list(rows)]
        return value

    def by(block: int) -> Callable[[int, Any], Any]:
        def replaced(step: int, value: Any) -> Any:
            if steps is not None and step not in steps:
                return value
            if name not in streams:
                return put(step, block, value)
            return tuple(put(step, block, v) if name == stream else v for stream, v in zip(streams, value))

        return replaced

    with ExitStack() as stack:
        for i in blocks:
            part = f"joint_blocks.{i}" if name in streams else f"joint_blocks.{i}.{OUTPUTS[name]}"
            stack.enter_context(ablate(model, part, by=by(i)))
        yield
