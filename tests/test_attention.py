"""Every attention that is there against the formula in float64; the others are refused by name."""

import importlib.util
import itertools
import math
from functools import partial

import pytest
import torch
from reference import randomize
from torch import Tensor

from mmdit import cores
from mmdit.attention import BACKENDS, attention, attention_by, missing
from mmdit.config import TOY
from mmdit.model import MMDiT
from mmdit.options import ATTENTIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 2, 1, 8), (2, 37, 53, 3, 64), (1, 515, 521, 2, 64), (3, 700, 640, 1, 40)]  # B, N, M, heads, size
AUTO = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
THERE = [
    pytest.param(name, device, dtype, marks=[pytest.mark.gpu] if device == "cuda" else [])
    for name, device, dtype in itertools.product(BACKENDS, ["cpu", "cuda"], DTYPES)
    if name != "cores" and missing(name, torch.device(device), dtype) is None
]
# Where the processor does not multiply bfloat16, products of float32 stand in: all but the speed is the same.
products = pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"),
    reason="this PyTorch has no switch for oneDNN's products",
)
THERE.append(pytest.param("cores", "cpu", torch.bfloat16, marks=products))


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of two kinds of rows: those that look at all keys alike, and those that pick a few."""
    b, n, m, heads, size = shape
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(b, rows, heads, size, generator=generator) for rows in (n, m, m))
    q[:, ::2] *= 4
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(size)) v, one head at a time, in float64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        scores = q[b, :, h].cpu().double() @ k[b, :, h].cpu().double().T / q.shape[-1] ** 0.5
        weights = (scores - scores.amax(1, keepdim=True)).exp()
        out[b, :, h] = weights @ v[b, :, h].cpu().double() / weights.sum(1, keepdim=True)
    return out.flatten(2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "device", "dtype"), THERE)
def test_attention_is_the_formula(name: str, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v = draw(shape, dtype, device)
    found = attention(q, k, v, name)
    expected = written_out(q, k, v)
    assert found.dtype == dtype and found.shape == expected.shape
    most = 1e-5 if (device, dtype) == ("cuda", torch.float32) else AUTO[dtype]  # three products in TF32
    assert float((found.cpu().double() - expected).norm() / expected.norm()) <= most


@products
@pytest.mark.parametrize(("scores", "threads"), [(1 << 9, 1), (1 << 12, 3), (1 << 20, 2)])
def test_cores_with_any_number_of_rows_at_a_time(
    scores: int, threads: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Blocks that do not divide the queries, on slices of one projection; the process is left as it was."""
    monkeypatch.setattr(cores, "_SCORES", scores)
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    before = (threads, torch.backends.mkldnn.matmul.fp32_precision)
    q, k, v = torch.randn(2, 131, 3, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16().unbind(2)
    found = cores.attend(q, k, v).flatten(2).double()
    expected = written_out(q, k, v)
    assert float((found - expected).norm() / expected.norm()) <= 4e-3
    assert (torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision) == before


@products
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("largest", [0.0, 50.0, 200.0, 2000.0, 2e4])
def test_cores_with_scores_that_powers_cannot_hold(largest: float, sign: int) -> None:
    """Scores about `largest`, as powers of two, of one sign in a row, and of both signs in the first."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (0.25 * torch.randn(1, 70, 2, 64, generator=generator) for _ in range(3))
    q[..., 0], k[..., 0] = sign * largest**0.5, (8 * math.log(2) * largest**0.5)
    k[:, ::3, :, 0] *= 1 - 1e-2
    q[:, 0], k[:, 0] = -q[:, 0], -k[:, 0]
    q, k, v = (t.bfloat16() for t in (q, k, v))
    found, expected = cores.attend(q, k, v).flatten(2).double(), written_out(q, k, v)
    assert float((found - expected).norm() / expected.norm()) <= 6e-3


@products
@pytest.mark.parametrize(
    ("shape", "dtype", "gradients", "taken"),
    [
        ((1, 515, 521, 2, 64), torch.bfloat16, False, True),
        ((1, 515, 521, 2, 64), torch.bfloat16, True, False),
        ((1, 515, 521, 2, 64), torch.float32, False, False),
        ((1, 50, 50, 2, 64), torch.bfloat16, False, False),
    ],
)
def test_cores_are_the_default_where_they_are_worth_it(
    shape: tuple[int, ...], dtype: torch.dtype, gradients: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For many scores in bfloat16, without gradients, where oneDNN multiplies it."""
    attend, calls = cores.attend, []
    monkeypatch.setattr(cores, "available", lambda device, dtype: (device.type, dtype) == ("cpu", torch.bfloat16))
    monkeypatch.setattr(cores, "attend", lambda *args: calls.append(1) or attend(*args))
    q, k, v = (t.requires_grad_(gradients) for t in draw(shape, dtype, "cpu"))
    found = attention(q, k, v).detach().double()
    assert float((found - written_out(q.detach(), k.detach(), v.detach())).norm() / found.norm()) <= AUTO[dtype]
    assert bool(calls) == taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_by_the_default(dtype: torch.dtype) -> None:
    q, k, v = (t.requires_grad_() for t in draw((1, 530, 540, 2, 64), dtype, "cpu"))
    direction = torch.randn(1, 530, 128, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((attention(q, k, v).float() * direction).sum(), (q, k, v))
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    scores = torch.einsum("bnhd,bmhd->bhnm", doubles[0], doubles[1]) / 8
    exact = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), doubles[2]).flatten(2)
    expected = torch.autograd.grad((exact * direction).sum(), doubles)
    for one, other in zip(found, expected):
        assert float((one.double() - other).norm() / other.norm()) <= (1e-5 if dtype == torch.float32 else 0.02)


def test_a_choice_is_one_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention of that model, joint and second, is computed by it, and none of another's."""
    asked: list[str] = []
    for name in ("auto", "math"):
        backend = BACKENDS[name]
        monkeypatch.setitem(BACKENDS, name, lambda *qkv, n=name, b=backend: asked.append(n) or b(*qkv))
    one, other = (randomize(MMDiT(TOY), 0) for _ in range(2))
    attention_by(one, "math")
    inputs = (torch.randn(1, 16, 8, 8), torch.tensor([0.5]), torch.randn(1, 5, 256), torch.randn(1, 192))
    attentions = TOY.depth + len(TOY.dual_attention_blocks)
    expected = other(*inputs)
    assert asked == ["auto"] * attentions
    asked.clear()
    assert float((one(*inputs) - expected).norm() / expected.norm()) <= 1e-5
    assert asked == ["math"] * attentions


def test_settings_name_the_backends() -> None:
    """All that the engine has; a benchmark may have added one of its own in this process."""
    assert tuple(name for name, way in BACKENDS.items() if way.__module__ == "mmdit.attention") == ATTENTIONS


@pytest.mark.parametrize(
    ("name", "device", "dtype", "installed", "reason"),
    [
        ("flash", "cuda", torch.bfloat16, False, "the package flash_attn is not installed"),
        ("xformers", "cuda", torch.bfloat16, False, "the package xformers is not installed"),
        ("flash", "cpu", torch.bfloat16, True, "it needs a CUDA device, this is cpu"),
        ("xformers", "mps", torch.float16, True, "it needs a CUDA device, this is mps"),
        ("flash", "cuda", torch.float32, True, "it needs bf16 or fp16"),
        ("cudnn", "cpu", torch.bfloat16, True, "it needs a CUDA device, this is cpu"),
        ("cudnn", "cuda", torch.float32, True, "it needs bf16 or fp16"),
        ("cores", "cpu", torch.float32, True, "it needs bf16 on a CPU whose oneDNN multiplies it"),
        ("cores", "cuda", torch.bfloat16, True, "it needs bf16 on a CPU whose oneDNN multiplies it"),
        ("xformers", "cuda", torch.float32, True, None),
        ("sdpa", "cpu", torch.float32, False, None),
        ("math", "mps", torch.float16, False, None),
    ],
)
def test_what_is_missing_is_told(
    name: str, device: str, dtype: torch.dtype, installed: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmdit.attention.find_spec", lambda _: importlib.util.find_spec("sys") if installed else None)
    assert missing(name, torch.device(device), dtype) == reason
