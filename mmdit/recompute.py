"""Passes with gradients that keep little: what goes into each block, which is computed again on the way back.

Chen et al. 2016 (arXiv 1604.06174). Around the call of a block, hooks and all: a block whose weights come when it is
called has them again then. The way back begins in the last block, which would be computed twice in a row, and is not.

- `recomputed`: for gradients to the latents alone, whoever else could have some; and to what blocks leave in a table.
- `checkpointed`: by PyTorch's own function, for gradients to parameters too, and to whatever one block gives another
  beside the tokens. It takes longer, and a second or more when it is first called, for PyTorch's compiler is imported
  then.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from mmdit.model import MMDiT

# Image and text tokens, and what was left in the table.
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
_KNOWN = {"mmdit", "torch"}  # packages whose modules give each other nothing beside the tokens


@contextmanager
def recomputed(model: MMDiT, table: MutableMapping[int, Tensor]) -> Iterator[None]:
    """Meanwhile the graph keeps nothing but tokens. table: in which block i may leave a tensor under its number.

    Blocks with modules of other packages, as variants have, are `checkpointed`: they may give each other more than
    tokens (value residuals do), where a gradient would be lost without a word.
    """
    if all(type(module).__module__.partition(".")[0] in _KNOWN for module in model.joint_blocks.modules()):
        replaced = _replaced(model, lambda i, block: Recomputed(block, i, table))
    else:
        replaced = checkpointed(model)
    with replaced:
        yield


@contextmanager
def checkpointed(model: MMDiT) -> Iterator[None]:
    """Meanwhile the graph keeps what goes into each block, and what is in it is computed again on the way back."""
    with _replaced(model, lambda _, block: Checkpointed(block)):
        yield


@contextmanager
def _replaced(model: MMDiT, by: Callable[[int, Any], Any]) -> Iterator[None]:
    """Meanwhile every block but the last is another."""
    blocks: Any = model.joint_blocks
    own = dict(blocks._modules)
    blocks._modules.update({name: by(int(name), block) for name, block in [*own.items()][:-1]})
    try:
        yield
    finally:
        blocks._modules.update(own)


class InPlace:
    """What is called in the place of a block, and has all that the block has."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class Recomputed(InPlace):
    def __init__(self, block: Any, number: int, table: MutableMapping[int, Tensor]) -> None:
        super().__init__(block)
        self._number, self._table = number, table

    def __call__(self, x: Tensor, context: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        def run(x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            before = self._table.pop(self._number, None)
            x, context = self._block(x, context, *given)
            left = self._table.pop(self._number, None)
            if before is not None:  # computed again: what was left at first stays
                self._table[self._number] = before
            return x, context, left

        x, context, left = _Again.apply(run, _get_current_function_mode_stack(), x, context)
        if left is not None:
            self._table[self._number] = left
        return x, context


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Run, modes: list[Any], x: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.run, ctx.modes = run, modes
        ctx.save_for_backward(x, context)
        return run(x, context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        given = [t.detach().requires_grad_(w) for t, w in zip(ctx.saved_tensors, wanted)]
        with torch.enable_grad(), entered(ctx.modes):
            made = ctx.run(*given)
        pairs = [(one, slope) for one, slope in zip(made, slopes) if one is not None and one.requires_grad]
        if not pairs:  # something else stands in the block's place, as for `inside.patch`
            return None, None, None, None
        leaves = [one for one in given if one.requires_grad]
        outputs, above = zip(*pairs)
        found = iter(torch.autograd.grad(outputs, leaves, above, allow_unused=True))
        return None, None, *(next(found) if w else None for w in wanted)


@contextmanager
def entered(modes: list[Any]) -> Iterator[None]:
    """On the way back PyTorch leaves modes of functions, as meters are, off."""
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


class Checkpointed(InPlace):
    def __call__(self, *given: Any) -> Any:
        return checkpoint(self._block, *given, use_reentrant=False, preserve_rng_state=False, context_fn=_modes)


def _modes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What to compute in at first, and again."""
    return nullcontext(), entered(_get_current_function_mode_stack())
