"""Train a variant of the transformer, small: `python -m benchmarks.emoji.train --variant FILE --budget 7min --seed 1`.

It learns the demo's scenes from the demo's own latents and text encodings, which are made once (`data`). Rectified flow
as in `train_mmdit`: x = (1 - sigma) latent + sigma noise, the target is noise - latent, sigma is logit-normal.

Two variants with one seed are a pair: parameters of one name and shape begin alike, and data, noise and what is left
out depend on seed and step alone. The learning rate is constant and the weights judged are averaged, so that every
point of a run may be compared with any of another. A run that was stopped and resumed is one that was never stopped.

OUT/log.jsonl: a line for every measurement, with the held-out loss by noise level; OUT/heldout.npz: of every held-out
scene. At the end OUT is a model's folder too, the averaged weights beside the demo's other networks:
`python -m mmdit.run "a horse" --model OUT`.
"""

import argparse
import json
import signal
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.check_variant import save_model
from benchmarks.emoji import data
from benchmarks.emoji.beginning import config_of, generator_of, initialise, weights_of
from benchmarks.emoji.lean import lean_attention, lean_norms
from benchmarks.emoji.optimizer import Both
from benchmarks.emoji.run_state import Average, number_format, save
from benchmarks.emoji.train_mmdit import optimizer_of
from mmdit import variants
from mmdit.common.errors import SettingsError
from mmdit.model import MMDiT
from mmdit.upcycle import summary, upcycle
from mmdit.variants import PLAIN, Variant
from weights import CheckpointError

DROP_CAPTION, DROP_T5 = 0.1, 0.15
NOISE_MEAN, NOISE_SPREAD = 0.0, 1.0  # of the logit of sigma
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


class Run:
    """A variant in training, with all that its checkpoint holds."""

    def __init__(self, variant: Variant, args: argparse.Namespace) -> None:
        self.args, self.variant, self.path = args, variant, args.out / "run.pt"
        self.device = torch.device(args.device)
        self.dtype = number_format(self.device) if args.dtype == "auto" else getattr(torch, args.dtype)
        path = data.provide(args.data, args.size, self.device, args.scenes)
        self.train, self.held = (part.read_by(variant.encoders) for part in data.load(path, self.device))
        self.model = variant.build(config_of(variant, args.width, args.depth))
        initialise(self.model, args.seed)
        if args.init and not self.path.exists():
            print(summary(upcycle(self.model, weights_of(args.init))), flush=True)
        self.model.to(self.device)
        self.optimizer: Both = optimizer_of(self.model)
        self.average = Average(self.model, HORIZON)
        self.step, self.spent, self.lines = 0, 0.0, []
        self.losses: dict[int, np.ndarray] = {}  # of the held-out scenes (scenes, levels), by step
        self.copy = self.compute_copy()
        self.flops = self.count()
        if self.path.exists():
            self.load(torch.load(self.path, weights_only=True, map_location=self.device))

    def compute_copy(self) -> MMDiT:
        """The model that computes, in the machine's number format; what was written for CPUs is laid on it there."""
        model = deepcopy(self.model).to(self.dtype)
        if self.device.type == "cpu":
            lean_norms(model)
            lean_attention(model)
        return model

    @torch.no_grad()
    def refresh(self) -> None:
        for copy, original in zip(self.copy.parameters(), self.model.parameters()):
            copy.copy_(original)

    def count(self) -> float:
        """Floating-point operations of a step, by torch's own counter, on the plain model."""
        model = deepcopy(self.model)
        few = self.sample(0, 2)
        with FlopCounterMode(display=False) as counter:
            velocity_loss(model, *few).mean().backward()
        return counter.get_total_flops() / 2 * self.args.batch

    def sample(self, step: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Latents, noise, sigma, contexts and pooled vectors of a step, by seed and step alone."""
        generator = generator_of(self.args.seed, step)
        rows = torch.randint(len(self.train), (count,), generator=generator)
        empty, without = (torch.rand(count, generator=generator) < p for p in (DROP_CAPTION, DROP_T5))
        sigma = torch.sigmoid(NOISE_MEAN + NOISE_SPREAD * torch.randn(count, generator=generator))
        noise = torch.randn(count, *self.train.latents.shape[1:], generator=generator)
        rows, empty, without, sigma, noise = (t.to(self.device) for t in (rows, empty, without, sigma, noise))
        latents, context, pooled = self.train.batch(rows, empty, without)
        return latents.float(), noise, sigma, context, pooled

    def update(self) -> float:
        loss = velocity_loss(self.copy, *self.sample(self.step, self.args.batch)).mean()
        loss.backward()
        for original, copy in zip(self.model.parameters(), self.copy.parameters()):
            original.grad = None if copy.grad is None else copy.grad.to(original.dtype)
            copy.grad = None
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.step += 1
        self.optimizer.step(self.args.rate * min(1.0, self.step / WARMUP))
        self.average.update()
        self.refresh()
        return float(loss.detach())

    @torch.no_grad()
    def averaged(self) -> MMDiT:
        model = deepcopy(self.copy)
        model.load_state_dict({name: tensor.to(self.dtype) for name, tensor in self.average.state().items()})
        return model

    @torch.no_grad()
    def measure(self) -> np.ndarray:
        """The averaged weights' loss of every held-out scene at every level, `(scenes, levels)`, by the same noise."""
        model, generator, held = self.averaged(), torch.Generator().manual_seed(0), self.held
        found = []
        for level in LEVELS:
            noise = torch.randn(held.latents.shape, generator=generator).to(self.device)
            sigma, parts = torch.full((len(held),), level, device=self.device), []
            for rows in torch.arange(len(held), device=self.device).split(self.args.batch):
                few = (held.latents[rows].float(), noise[rows], sigma[rows], held.context[rows], held.pooled[rows])
                parts.append(velocity_loss(model, *few))
            found.append(torch.cat(parts))
        return torch.stack(found, dim=1).cpu().numpy()

    # ---- what is kept ----------------------------------------------------------------------------

    def save(self) -> None:
        names = list(self.losses)
        held = torch.from_numpy(np.stack([self.losses[n] for n in names])) if names else torch.empty(0)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        more = {"average": self.average.values, "averaged": self.average.steps, "spent": self.spent}
        save(self.path, {**state, **more, "lines": self.lines, "names": names, "held": held})

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.values, self.average.steps = state["average"], state["averaged"]
        self.step, self.spent, self.lines = state["step"], state["spent"], state["lines"]
        self.losses = dict(zip(state["names"], state["held"].numpy()))
        self.refresh()

    def write(self, loss: float) -> None:
        """A line of the log, and the rest of what may be looked at while it trains."""
        self.losses[self.step] = self.measure()
        by_level = {str(level): round(float(x), 5) for level, x in zip(LEVELS, self.losses[self.step].mean(0))}
        held_out = round(float(self.losses[self.step].mean()), 5)
        line = {"step": self.step, "seconds": round(self.spent, 1), "flops": self.step * self.flops,
                "loss": round(loss, 5), "held_out": held_out, "by_level": by_level}  # fmt: skip
        self.lines.append(line)
        (self.args.out / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in self.lines))
        held: dict[str, Any] = {str(step): losses for step, losses in self.losses.items()}
        np.savez(self.args.out / "heldout.npz", **held)
        print(json.dumps(line), flush=True)

    def finish(self) -> None:
        model = deepcopy(self.model)
        model.load_state_dict(self.average.state())
        save_model(model, self.args.out, width=self.args.size, height=self.args.size)
        numbers = sum(p.numel() for p in model.parameters())
        told = {"variant": self.variant.name or "base", "seed": self.args.seed, "width": self.args.width,
                "depth": self.args.depth, "size": self.args.size, "batch": self.args.batch, "parameters": numbers,
                "flops_a_step": self.flops, "steps": self.step, "seconds": self.spent}  # fmt: skip
        (self.args.out / "run.json").write_text(json.dumps(told, indent=1) + "\n")


def velocity_loss(
    model: MMDiT, latents: Tensor, noise: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    """Of each sample `(B,)`, in float32."""
    dtype = next(model.parameters()).dtype
    x = torch.lerp(latents, noise, sigma[:, None, None, None]).to(dtype)
    velocity = model(x, sigma, context.to(dtype), pooled.to(dtype))
    return (velocity.float() - (noise - latents)).square().flatten(1).mean(1)


def train(run: Run, budget: Budget) -> bool:
    """To the end of the budget; False where SIGTERM came before: then it is saved."""
    stop, saved, running = [], time.monotonic(), 0.0
    before = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    try:
        while {"seconds": run.spent, "steps": run.step, "flops": run.step * run.flops}[budget.unit] < budget.amount:
            begin = time.monotonic()
            loss = run.update()
            run.spent += min(time.monotonic() - begin, 10.0)  # a paused process loses nothing
            running = 0.98 * running + 0.02 * loss if running else loss
            if run.step % EVERY == 0:
                run.write(running)
            if stop or time.monotonic() - saved > 60:
                run.save()
                saved = time.monotonic()
            if stop:
                return False
    finally:
        signal.signal(signal.SIGTERM, before)
    if run.step not in run.losses:
        run.write(running)
    run.save()
    run.finish()
    return True


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", metavar="FILE|MODULE", help="that registers it (default: the published model)")
    parser.add_argument("--budget", default="7min", help="20min, steps:3000 or flops:1e15 (default: 7min)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--init", type=Path, metavar="FOLDER|FILE", help="begin with what fits of a model or a run's OUT"
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default: out/variants/NAME-SEED)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--data", type=Path, default=Path("out/variants"), help="folder of the encoded scenes")
    parser.add_argument("--size", type=int, default=data.SIZE, help="of the scenes, in pixels")
    parser.add_argument("--scenes", type=int, default=data.COUNT, help="how many there are")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: all cores)")
    return parser


def main(arguments: Any = None) -> int:
    parser = parser_of()
    args = parser.parse_args(arguments)
    try:
        budget, variant = Budget.read(args.budget), variants.load(args.variant) if args.variant else PLAIN
    except SettingsError as error:
        parser.error(str(error))
    except ValueError:
        parser.error(f"--budget: {args.budget!r}: expected 20min, steps:3000 or flops:1e15")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out = args.out or Path("out/variants") / f"{variant.name or 'base'}-{args.seed}"
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        return 0 if train(Run(variant, args), budget) else 130
    except CheckpointError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
