"""The noise that PyTorch draws on a CUDA device, drawn on any: for pictures whose program drew theirs there.

Philox 4x32 with 10 rounds: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3; pairs of its
numbers to normal ones by Box & Muller 1958. Each element has a counter of its own, as in PyTorch's kernel for tensors
that are not larger than its grid.
"""

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_ADD = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


class CudaNoise:
    """A generator with a seed of 64 bits; each draw goes on where the last ended."""

    def __init__(self, seed: int) -> None:
        self._seed, self._draws = seed % 2**64, 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Normal numbers of this shape, float32, within a rounding of those that a device draws."""
        index = np.arange(int(np.prod(shape)), dtype=np.uint64)
        zero = np.zeros_like(index)
        x, y, _, _ = _philox((zero + np.uint64(self._draws), zero, index, zero), self._seed)
        self._draws += 1
        share = (x.astype(np.float64) + 0.5) / 2**32
        angle = (y.astype(np.float64) + 0.5) / 2**32 * 2 * np.pi
        return torch.from_numpy((np.sqrt(-2 * np.log(share)) * np.sin(angle)).astype(np.float32).reshape(shape))


def _philox(counter: tuple[np.ndarray, ...], seed: int) -> tuple[np.ndarray, ...]:
    """Four numbers of 32 bits for each counter of four."""
    a, b, c, d = counter
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(_ROUNDS):
        first, second = np.uint64(_MULTIPLY[0]) * a, np.uint64(_MULTIPLY[1]) * c
        a, b, c, d = (
            (second >> np.uint64(32)) ^ b ^ np.uint64(keys[0]), second & _LOW,
            (first >> np.uint64(32)) ^ d ^ np.uint64(keys[1]), first & _LOW,
        )  # fmt: skip
        keys = [(key + add) & 0xFFFFFFFF for key, add in zip(keys, _ADD)]
    return a, b, c, d
