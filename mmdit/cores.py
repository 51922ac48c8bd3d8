"""Attention for CPUs in bfloat16: every core takes a head at a time, its scores in its own cache.

PyTorch's fused kernel multiplies by a library that leaves the matrix instructions of many CPUs unused; oneDNN, behind
its plain products, uses them. The scores are float32 as in the fused kernel: a product of float32 matrices with
`fp32_precision` "bf16" rounds what goes in, which is bfloat16 already, and nothing else.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from mmdit.kernels.process import Switch

_SCORES = 1 << 20  # of one core at a time: 4 MB, and half as much in bfloat16
_LARGEST = 64.0  # score, as a power of two, up to which no sum of powers can overflow


@cache
def available(device: torch.device, dtype: torch.dtype) -> bool:
    there = hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
    return device.type == "cpu" and dtype == torch.bfloat16 and there and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `mmdit.attention.attention`, to `(B, N, heads, head size)`, without gradients."""
    with torch.inference_mode(False):  # other threads write into it, and that mode is a thread's own
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads = iter([tuple(t[b, :, h] for t in (q, k, v, out)) for b in range(q.shape[0]) for h in range(q.shape[2])])
    threads = torch.get_num_threads()
    with rounded_products:
        for done in [workers(threads).submit(work, heads, q.shape[1], k.shape[1]) for _ in range(threads)]:
            done.result()
    return out


@torch.no_grad()
def work(heads: Iterator[tuple[Tensor, ...]], n: int, m: int) -> None:
    """Take heads, of n queries and m keys, until none is left: q, k, v and, to be filled, the result."""
    blocks = -(-n // max(1, _SCORES // m))
    rows = -(-n // blocks)
    table, shares = torch.empty(rows, m), torch.empty(rows, m, dtype=torch.bfloat16)
    for q, k, v, out in heads:
        q, k, v, scale = q.float(), k.float().T, v.contiguous(), math.log2(math.e) * q.shape[1] ** -0.5
        small = scale * float(q.norm(dim=1).max() * k.norm(dim=0).max()) < _LARGEST  # by Cauchy and Schwarz
        for queries, result in zip(q.split(rows), out.split(rows)):
            scores, share = table[: len(queries)], shares[: len(queries)]
            torch.addmm(scores, queries, k, beta=0, alpha=scale, out=scores)
            if not small:
                scores -= scores.amax(dim=1, keepdim=True)
            scores.exp2_()  # several times as fast as exp, or softmax
            scores *= scores.sum(dim=1, keepdim=True).reciprocal_()
            result.copy_(share.copy_(scores) @ v)


@lru_cache(maxsize=1)
def workers(count: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch computes alone: the number of its threads is a thread's own, and set for new ones."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="head", initializer=torch.set_num_threads, initargs=(1,))
    ready = Barrier(count)
    for future in [pool.submit(ready.wait) for _ in range(count)]:
        future.result()
    torch.set_num_threads(count)
    return pool


def _products() -> Any:
    return torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]


# Float32 matrices multiplied in bfloat16, added up in float32. It is a setting of the process: whoever multiplies
# float32 matrices in another thread meanwhile gets them so too.
rounded_products = Switch(
    lambda: _products().fp32_precision, lambda value: setattr(_products(), "fp32_precision", value), "bf16"
)
