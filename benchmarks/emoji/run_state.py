"""What the training scripts share: time-based schedules, averaged weights, and checkpoints to resume from."""

import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from weights.checkpoint import open_checkpoint


class Clock:
    """Training time spent, over all sittings of one run, as a share of the time it is given.

    A step counts for ten seconds at most, so that a paused process loses none of its time.
    """

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.total, self.spent, self.last = 60.0 * minutes, spent, time.monotonic()

    def tick(self) -> float:
        """Add the time since the last call; returns the share spent, in 0..1."""
        now = time.monotonic()
        self.spent, self.last = self.spent + min(now - self.last, 10.0), now
        return min(1.0, self.spent / self.total)


def learning_rate(share: float, warmup: float = 0.01, floor: float = 0.01) -> float:
    """Factor on the peak learning rate at a share of the run: linear warm-up, then half a cosine down to `floor`."""
    if share < warmup:
        return max(share / warmup, 0.01)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * (share - warmup) / (1.0 - warmup)))


class Average:
    """Exponential moving average of a module's parameters (Polyak), with a horizon that grows with the run."""

    def __init__(self, module: nn.Module, horizon: int) -> None:
        self.module, self.horizon, self.steps = module, horizon, 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        weight = 1.0 / min(self.horizon, 1 + self.steps / 10)
        for name, parameter in self.module.named_parameters():
            self.values[name].lerp_(parameter, weight)

    def state(self) -> dict[str, Tensor]:
        """Averaged parameters with the module's buffers: a whole state dict."""
        return {**self.module.state_dict(), **self.values}


def save(path: Path, state: dict) -> None:
    """Write a checkpoint, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def exported(folder: Path, part: str) -> dict[str, Tensor]:
    """One network's tensors of an exported demo model, under native names in float32, to train on from."""
    component = open_checkpoint(folder).component(part)
    return {name: component.read(name).float() for name in component.shapes}


def number_format(device: torch.device) -> torch.dtype:
    """What this machine multiplies fast: bfloat16 on a GPU and on CPUs with AMX or AVX-512 BF16, else float32."""
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return torch.bfloat16
