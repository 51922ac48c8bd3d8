"""Train a variant of the transformer, small: `python -m benchmarks.emoji.train --variant FILE --budget 7min --seed 1`.

It learns the demo's scenes from the demo's own latents and text encodings, which are made once (`data`). Rectified flow
as in `train_mmdit`: x = (1 - sigma) latent + sigma noise, the target is noise - latent, sigma is logit-normal.

Two variants with one seed are a pair: parameters of one name and shape begin alike, and data, noise and what is left
out depend on seed and step alone. The learning rate is constant and the weights judged are averaged, so that every
point of a run may be compared with any of another. A run that was stopped and resumed is one that was never stopped.

OUT/log.jsonl: a line for every measurement, with the held-out loss by noise level; OUT/heldout.npz: of every held-out
scene; OUT/pictures.png: the first held-out scenes, and below them what the averaged weights draw of their captions.
None of that counts against the budget, or changes what is trained. At the end OUT is a model's folder too, the averaged
weights beside the demo's other networks: `python -m mmdit.run "a horse" --model OUT`.
"""

import argparse
import json
import sys
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.check_variant import save_model
from benchmarks.emoji import data
from benchmarks.emoji.beginning import config_of, generator_of, initialise, weights_of
from benchmarks.emoji.evaluate import sheet
from benchmarks.emoji.training import LEVELS, Budget, Training, sample, train, velocity_loss
from mmdit import Pipeline, variants
from mmdit.common.errors import SettingsError
from mmdit.common.files import beside, put
from mmdit.driver.loading import DEMO
from mmdit.upcycle import summary, upcycle
from mmdit.variants import PLAIN, Variant
from samplers import euler, shifted_sigmas
from weights import CheckpointError

NOISE_MEAN, NOISE_SPREAD = 0.0, 1.0  # of the logit of sigma
STEPS, CFG = 8, 3.0  # of the pictures on the way


class Run(Training):
    """A variant in training."""

    def __init__(self, variant: Variant, args: argparse.Namespace) -> None:
        self.args, self.variant = args, variant
        device = torch.device(args.device)
        path = data.provide(args.data, args.size, device, args.scenes)
        self.train, self.held = (part.read_by(variant.encoders) for part in data.load(path, device))
        model = variant.build(config_of(variant, args.width, args.depth))
        initialise(model, args.seed)
        if args.init and not (args.out / "run.pt").exists():
            print(summary(upcycle(model, weights_of(args.init))), flush=True)
        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        super().__init__(model, args.out, args.rate, device, dtype)
        self.losses: dict[int, np.ndarray] = {}  # of the held-out scenes (scenes, levels), by step
        self.flops = self.count()
        state = self.resume()
        if state is not None:
            self.losses = dict(zip(state["names"], state["held"].numpy()))

    def count(self) -> float:
        """Floating-point operations of a step, by torch's own counter, on the plain model."""
        model = deepcopy(self.model)
        few = self.sample(0, 2)
        with FlopCounterMode(display=False) as counter:
            velocity_loss(model, *few).mean().backward()
        return counter.get_total_flops() / 2 * self.args.batch

    def sample(self, step: int, count: int) -> tuple[Tensor, ...]:
        """Latents, noise, sigma, contexts and pooled vectors of a step, by seed and step alone."""
        return sample(self.train, count, generator_of(self.args.seed, step), NOISE_MEAN, NOISE_SPREAD)[1]

    def update(self) -> float:
        return self.descend(velocity_loss(self.copy, *self.sample(self.step, self.args.batch)).mean())

    @torch.no_grad()
    def held_out(self) -> np.ndarray:
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

    def measure(self, loss: float) -> None:
        found = self.losses[self.step] = self.held_out()
        by_level = {str(level): round(float(x), 5) for level, x in zip(LEVELS, found.mean(0))}
        held_out = round(float(found.mean()), 5)
        told = {"loss": round(loss, 5), "held_out": held_out, "by_level": by_level}
        self.write({"flops": self.step * self.flops, **told})
        held: dict[str, Any] = {str(step): losses for step, losses in self.losses.items()}
        np.savez(self.out / "heldout.npz", **held)
        if self.args.pictures:
            with beside(self.out / "pictures.png") as partial:
                sheet(np.concatenate([self.scenes, self.drawn()]), partial, columns=len(self.scenes))
                put(partial, self.out / "pictures.png")

    @cached_property
    def demo(self) -> Pipeline:
        """Whose autoencoder the latents are of."""
        return Pipeline.load(DEMO, t5="off", device=self.device.type)

    @cached_property
    def scenes(self) -> np.ndarray:
        """The first held-out scenes as the autoencoder gives them back, uint8 `(pictures, H, W, 3)`."""
        return self.demo.decode(self.held.latents[: self.args.pictures].float()).numpy()

    @torch.no_grad()
    def drawn(self) -> np.ndarray:
        """Their captions drawn by the averaged weights, always from the same noise."""
        model, held, count = self.averaged(), self.held, len(self.scenes)
        context = torch.cat([held.context[:count], held.empty_context.expand(count, -1, -1)]).to(self.dtype)
        pooled = torch.cat([held.pooled[:count], held.empty_pooled.expand(count, -1)]).to(self.dtype)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            both = model(x.to(self.dtype).repeat(2, 1, 1, 1), sigma.to(self.device).expand(2 * count), context, pooled)
            cond, uncond = both.float().chunk(2)
            return uncond + CFG * (cond - uncond)

        noise = torch.randn(held.latents[:count].shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        return self.demo.decode(euler(velocity, noise, shifted_sigmas(STEPS, self.demo.shift))).numpy()

    def save(self, **more: Any) -> None:
        names = list(self.losses)
        held = torch.from_numpy(np.stack([self.losses[n] for n in names])) if names else torch.empty(0)
        super().save(names=names, held=held, **more)

    def finish(self) -> None:
        model = deepcopy(self.model)
        model.load_state_dict(self.average.state())
        save_model(model, self.args.out, width=self.args.size, height=self.args.size)
        numbers = sum(p.numel() for p in model.parameters())
        told = {"variant": self.variant.name or "base", "seed": self.args.seed, "width": self.args.width,
                "depth": self.args.depth, "size": self.args.size, "batch": self.args.batch, "parameters": numbers,
                "flops_a_step": self.flops, "steps": self.step, "seconds": self.spent}  # fmt: skip
        (self.args.out / "run.json").write_text(json.dumps(told, indent=1) + "\n")


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
    parser.add_argument(
        "--pictures", type=int, default=8, help="held-out captions drawn at each measurement, 0 to 8 (default: 8)"
    )
    parser.add_argument("--data", type=Path, default=Path("out/variants"), help="folder of the encoded scenes")
    parser.add_argument("--size", type=int, default=data.SIZE, help="of the scenes, in pixels")
    parser.add_argument("--scenes", type=int, default=data.COUNT, help="how many there are")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: all cores)")
    return parser


def device_of(name: str) -> str:
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: Any = None) -> int:
    parser = parser_of()
    args = parser.parse_args(arguments)
    try:
        budget, variant = Budget.read(args.budget), variants.load(args.variant) if args.variant else PLAIN
    except SettingsError as error:
        parser.error(str(error))
    except ValueError:
        parser.error(f"--budget: {args.budget!r}: expected 20min, steps:3000 or flops:1e15")
    if args.scenes <= data.HELD_OUT:
        parser.error(f"--scenes {args.scenes}: expected more than the {data.HELD_OUT} that are held out")
    if not 0 <= args.pictures <= 8:
        parser.error(f"--pictures {args.pictures}: expected 0 to 8")
    args.device = device_of(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out = args.out or Path("out/variants") / f"{variant.name or 'base'}-{args.seed}"
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        return 0 if train(Run(variant, args), budget) else 130
    except (CheckpointError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
