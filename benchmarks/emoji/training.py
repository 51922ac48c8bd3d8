"""A training that can be stopped: what `train` and `train_control` share, one sitting after another.

The weights are kept in float32; a copy in the machine's own number format computes. The learning rate is constant, and
the weights judged are averaged.
"""

import json
import signal
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.emoji.data import Data
from benchmarks.emoji.lean import lean_attention, lean_norms
from benchmarks.emoji.run_state import Average, number_format, save
from benchmarks.emoji.train_mmdit import optimizer_of
from mmdit.model import MMDiT

DROP_CAPTION, DROP_T5 = 0.1, 0.15
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of noise, at which what is held out is measured
HORIZON = 100  # steps averaged over
EVERY = 250  # steps between two measurements
WARMUP = 50


@dataclass(frozen=True)
class Budget:
    """How long to train: `20min`, `steps:3000` or `flops:1e15`."""

    unit: str
    amount: float

    @classmethod
    def read(cls, text: str) -> "Budget":
        """Raises ValueError."""
        name, _, amount = ("seconds", "", text.removesuffix("min")) if text.endswith("min") else text.partition(":")
        if name not in ("seconds", "steps", "flops") or not float(amount) > 0:
            raise ValueError(text)
        return cls(name, float(amount) * (60 if text.endswith("min") else 1))


class Training:
    """A module in training, with all that its checkpoint, OUT/run.pt, holds."""

    def __init__(self, model: Any, out: Path, rate: float, device: torch.device, dtype: torch.dtype | None) -> None:
        """dtype: what the copy computes in, if not what the machine multiplies fast."""
        self.out, self.path, self.rate, self.device = out, out / "run.pt", rate, device
        self.dtype = dtype or number_format(device)
        self.model = model.to(device)
        self.copy = self.computing(self.model)
        self.optimizer, self.average = optimizer_of(self.model), Average(self.model, HORIZON)
        self.step, self.spent, self.flops = 0, 0.0, 0.0  # flops: of a step, where they are counted
        self.lines: list[dict[str, Any]] = []

    def update(self) -> float:
        """One step; returns its loss."""
        raise NotImplementedError

    def measure(self, loss: float) -> None:
        """Judge the averaged weights, and `write` it. loss: the running mean of training's."""
        raise NotImplementedError

    def finish(self) -> None:
        """Leave behind what can be used."""
        raise NotImplementedError

    def computing(self, module: Any) -> Any:
        """A copy in the machine's number format; what was written for CPUs is laid on it there."""
        module = deepcopy(module).to(self.device, self.dtype)
        if self.device.type == "cpu":
            lean_norms(module)
            lean_attention(module)
        return module

    def descend(self, loss: Tensor) -> float:
        """A step of the optimizer by the loss of the copy."""
        loss.backward()
        for original, copy in zip(self.model.parameters(), self.copy.parameters()):
            original.grad = None if copy.grad is None else copy.grad.to(original.dtype)
            copy.grad = None
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.step += 1
        self.optimizer.step(self.rate * min(1.0, self.step / WARMUP))
        self.average.update()
        self.refresh()
        return float(loss.detach())

    @torch.no_grad()
    def refresh(self) -> None:
        for copy, original in zip(self.copy.parameters(), self.model.parameters()):
            copy.copy_(original)

    @torch.no_grad()
    def averaged(self) -> Any:
        """A copy that computes by the averaged weights."""
        model = deepcopy(self.copy)
        model.load_state_dict({name: tensor.to(self.dtype) for name, tensor in self.average.state().items()})
        return model

    def write(self, line: dict[str, Any]) -> None:
        """A line of the log."""
        self.lines.append({"step": self.step, "seconds": round(self.spent, 3), **line})
        (self.out / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in self.lines))
        print(json.dumps(self.lines[-1]), flush=True)

    def save(self, **more: Any) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        own = {"average": self.average.values, "averaged": self.average.steps, "spent": self.spent}
        save(self.path, {**state, **own, "lines": self.lines, **more})

    def resume(self) -> dict[str, Any] | None:
        """Go on from the checkpoint, if there is one; what it holds."""
        if not self.path.exists():
            return None
        state = torch.load(self.path, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.values, self.average.steps = state["average"], state["averaged"]
        self.step, self.spent, self.lines = state["step"], state["spent"], state["lines"]
        self.refresh()
        return state


def sample(
    scenes: Data, count: int, generator: torch.Generator, mean: float = 0.0, spread: float = 1.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows of scenes, and of these latents, noise, sigma, contexts and pooled vectors; the same on every device.

    mean, spread: of the logit of sigma.
    """
    rows = torch.randint(len(scenes), (count,), generator=generator)
    empty, without = (torch.rand(count, generator=generator) < p for p in (DROP_CAPTION, DROP_T5))
    sigma = torch.sigmoid(mean + spread * torch.randn(count, generator=generator))
    noise = torch.randn(count, *scenes.latents.shape[1:], generator=generator)
    device = scenes.latents.device
    rows, empty, without, sigma, noise = (t.to(device) for t in (rows, empty, without, sigma, noise))
    latents, context, pooled = scenes.batch(rows, empty, without)
    return rows, (latents.float(), noise, sigma, context, pooled)


def velocity_loss(
    model: MMDiT, latents: Tensor, noise: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    """Of each sample `(B,)`, in float32."""
    dtype = next(model.parameters()).dtype
    x = torch.lerp(latents, noise, sigma[:, None, None, None]).to(dtype)
    velocity = model(x, sigma, context.to(dtype), pooled.to(dtype))
    return (velocity.float() - (noise - latents)).square().flatten(1).mean(1)


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds; on a CPU those that each thread computes, so that others on the machine take nothing of a budget."""
    if device.type != "cpu":
        return time.monotonic
    return lambda: time.process_time() / torch.get_num_threads()


def train(run: Training, budget: Budget) -> bool:
    """To the end of the budget; False where SIGTERM came before: then it is saved."""
    stop, saved, running, now = [], time.monotonic(), 0.0, clock(run.device)
    before = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    try:
        while {"seconds": run.spent, "steps": run.step, "flops": run.step * run.flops}[budget.unit] < budget.amount:
            begin = now()
            loss = run.update()
            run.spent += min(now() - begin, 10.0)  # a paused process loses nothing
            running = 0.98 * running + 0.02 * loss if running else loss
            if run.step % EVERY == 0:
                run.measure(running)
            if stop or time.monotonic() - saved > 60:
                run.save()
                saved = time.monotonic()
            if stop:
                return False
    finally:
        signal.signal(signal.SIGTERM, before)
    if not run.lines or run.lines[-1]["step"] != run.step:
        run.measure(running)
    run.save()
    run.finish()
    return True
