"""What is told of an operation's result is what PyTorch gives on "meta"."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmdit.config import SD35_MEDIUM, TOY
from mmdit.memory import meter, shapes
from mmdit.memory.empty import on_meta
from mmdit.model import MMDiT

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def told(result: Any) -> list[Any]:
    """All that the memory of what is given follows from; steps of dimensions with one number mean nothing."""
    found = []
    for t in meter.tensors((result,)):
        steps = [step for step, size in zip(t.stride(), t.shape) if size > 1]
        found.append((type(t), t.shape, steps, t.dtype, t.device, t.untyped_storage().nbytes()))
    return found


def any_tensor(rng: random.Random, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Contiguous or with its dimensions in another order, a part of a larger one, or one number for many."""
    kind = rng.choice(["plain"] * 4 + ["turned", "part", "spread"])
    if kind == "turned" and len(shape) > 1:
        return torch.empty(shape[::-1], dtype=dtype, device="meta").permute(*range(len(shape) - 1, -1, -1))
    if kind == "part":
        return torch.empty([*shape[:-1], shape[-1] + 3], dtype=dtype, device="meta")[..., : shape[-1]]
    if kind == "spread":
        return torch.empty([*shape[:-1], 1], dtype=dtype, device="meta").expand(shape)
    return torch.empty(shape, dtype=dtype, device="meta")


def narrowed(rng: random.Random, shape: list[int]) -> list[int]:
    """A shape that is broadcast to another."""
    return [rng.choice((1, size)) for size in shape][rng.randrange(len(shape)) :]


def cases(rng: random.Random) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """A call of each operation with arguments that it accepts."""
    shape = [rng.randint(1, 5) for _ in range(rng.randint(1, 4))]
    dtype, other = rng.choice(DTYPES), rng.choice(DTYPES)

    def some(shape: list[int], dtype: torch.dtype = dtype) -> Tensor:
        return any_tensor(rng, shape, dtype)

    one, two = rng.sample((shape, narrowed(rng, shape)), 2)
    for func in (aten.add.Tensor, aten.mul.Tensor):
        yield func, (some(one), some(two)), {}
        yield func, (some(one), some(two, other)), {}
        yield func, (some(shape), rng.choice((2, 0.5, True, 1j))), {}
        yield func, (some(shape), torch.empty((), dtype=other, device="meta")), {}
        yield func, (torch.empty(shape, dtype=torch.int64, device="meta"), some(shape)), {}
    yield aten.add.Tensor, (some(one), some(two)), {"alpha": 2}
    yield aten.addcmul.default, (some(shape), some(one), some(two)), {"value": 0.5}
    yield aten.addcmul.default, (some(one), some(shape), some(two)), {}
    yield aten.gelu.default, (some(shape),), {"approximate": rng.choice(("none", "tanh"))}
    for func in (aten.silu.default, aten.rsqrt.default):
        yield func, (some(shape),), {}
    yield aten.pow.Tensor_Scalar, (some(shape), rng.choice((2, 0.5))), {}
    dims = rng.sample(range(-len(shape), 0), rng.randint(0, len(shape)))
    yield aten.mean.dim, (some(shape), dims or rng.choice((None, []))), {}
    yield aten.mean.dim, (some(shape), dims, True), {}
    yield aten.mean.dim, (some(shape), dims), {"dtype": torch.float32}
    last = shape[rng.randrange(len(shape)) :]
    weight = torch.empty(last, dtype=dtype, device="meta")
    yield aten.native_layer_norm.default, (some(shape), last, *rng.choice(((weight, weight), (None, None))), 1e-6), {}
    rows, inner, columns = (rng.randint(1, 6) for _ in range(3))
    bias = torch.empty(rng.choice((columns, 1)), dtype=dtype, device="meta")
    yield aten.addmm.default, (bias, some([rows, inner]), some([inner, columns])), {}
    yield aten.addmm.default, (bias, some([rows, inner]), some([inner, columns])), {"beta": 0.5, "alpha": 2}


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_pytorch_gives(seed: int) -> None:
    rng, answered = random.Random(seed), set[Any]()
    for _ in range(60):
        for func, args, kwargs in cases(rng):
            found = shapes.quick(func, args, kwargs)
            if found is not None:
                assert told(found) == told(func(*args, **kwargs)), (func, [told(arg) for arg in args], kwargs)
                answered.add(func)
    assert answered == set(shapes._GIVEN)


def test_what_does_not_fit_is_left_to_pytorch() -> None:
    x = torch.empty(2, 3, 4, device="meta")
    for func, args, kwargs in (
        (aten.mul.Tensor, (x, torch.empty(2, 3, 5, device="meta")), {}),
        (aten.addmm.default, (x[0, 0], x[0], x[0]), {}),
        (aten.addmm.default, (x[0, 0], x[0], torch.empty(4, 5, device="meta")), {}),
        (aten.native_layer_norm.default, (x, [3], None, None, 1e-6), {}),
        (aten.native_layer_norm.default, (x, [4], x[0, 0, :3], None, 1e-6), {}),
        (aten.native_layer_norm.default, (x, [4], None, x[0], 1e-6), {}),
        (aten.native_layer_norm.default, (x[0, 0, 0], [], None, None, 1e-6), {}),
        *((aten.mean.dim, (x, dims), {}) for dims in ([3], [-4], [1, 1], [1, -2])),
        (aten.mean.dim, (x[0, 0, 0], [0]), {}),
        (aten.add.Tensor, (2, 3), {}),
        (aten.add.Tensor, (x, x), {"alpha": 1j}),
        (aten.mul.Tensor, (x, x.to(torch.float8_e4m3fn)), {}),
        (aten.silu.default, (torch.empty(3),), {}),
        (aten.silu.default, (torch.empty_strided((0, 2, 2), (0, 1, 2), device="meta"),), {}),
        (aten.add.Tensor, (x[:1].expand(5, 3, 4)[:1], x[0, 0].view(4, 1, 1).permute(2, 1, 0)), {}),
        (aten.sin.default, (x,), {}),
    ):
        assert shapes.quick(func, args, kwargs) is None


class Counted(TorchDispatchMode):
    """Which operations PyTorch is left with, inside of a Meter."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [SD35_MEDIUM, TOY], ids=["medium", "toy"])
def test_a_step_takes_the_same_and_little_is_left_to_pytorch(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(MMDiT, config, torch.bfloat16)

    def peak() -> tuple[int, int]:
        """The bytes, and how many of the operations in question PyTorch was left with."""
        shaped = [(2, config.in_channels, 24, 36), (2,), (2, 21, config.context_size), (2, config.pooled_size)]
        given = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shaped]
        with Counted() as counted:
            found = meter.peak_bytes(model, *given)
        return found, sum(func in shapes._GIVEN for func in counted.left)

    found, left = peak()
    monkeypatch.setattr(meter, "quick", lambda *_: None)
    expected, all_of_them = peak()
    assert found == expected
    assert left <= 0.05 * all_of_them
