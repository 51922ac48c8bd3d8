"""Train a small ControlNet for the demo model, by edges: `python -m benchmarks.emoji.train_control --budget 60min`.

It begins as the first blocks of the transformer, with projections of zeros, so that at first it changes nothing (Zhang
et al. 2023, arXiv 2302.05543); the transformer stays as it is. Rectified flow as in `train`: x = (1 - sigma) latent +
sigma noise, the target is noise - latent. Scenes, their texts and the latents of their edges are encoded once.

A run that was stopped goes on where it was saved: OUT/run.pt. OUT/log.jsonl has the loss of held-out scenes with and
without the net. At the end OUT/net is a folder for --control:

    python -m benchmarks.emoji.train_control --draw-edges photo.png edges.png
    python -m mmdit.run "a red apple" --control OUT/net --control-image edges.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.emoji import data
from benchmarks.emoji.beginning import generator_of
from benchmarks.emoji.scenes import render
from benchmarks.emoji.training import LEVELS, Budget, Training, sample, train, velocity_loss
from mmdit import Pipeline
from mmdit.common.files import beside, put
from mmdit.control.adding import Added, adding
from mmdit.control.network import ControlConfig, ControlNet
from mmdit.driver.building import build
from mmdit.driver.loading import DEMO
from mmdit.model import MMDiT
from weights import fill, open_checkpoint, published
from weights.keymap import CONTROL, revert, to_diffusers

STEEP = 48  # of a brightness from 0 to 255, between a pixel and the next but one: an edge
LARGEST = 10_000_000  # bytes of the file


def edges(pixels: np.ndarray) -> np.ndarray:
    """White where the brightness of a picture, uint8 `(H, W, 3)`, changes fast, else black; of the same shape."""
    grey = np.pad(pixels.astype(np.float32).mean(axis=2), 1, mode="edge")
    down, right = grey[2:, 1:-1] - grey[:-2, 1:-1], grey[1:-1, 2:] - grey[1:-1, :-2]
    found = np.hypot(down, right) > STEEP
    return np.repeat(np.where(found, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def provide_edges(folder: Path, size: int, count: int, device: torch.device) -> Tensor:
    """The latents of the edges of the scenes of `data.provide`, `(N, C, h, w)`, made now where they are not there."""
    path = folder / f"edges-{size}-{count}.safetensors"
    if not path.exists():
        pipe = Pipeline.load(DEMO, t5="off", device=device.type)
        found, every = [], data.scenes(count)
        for i in range(0, count, data.AT_ONCE):
            drawn = np.stack([edges(render(scene, size)) for scene in every[i : i + data.AT_ONCE]])
            found.append(pipe.encode_picture(torch.from_numpy(drawn)).bfloat16().cpu())
        with beside(path) as partial:
            save_file({"latents": torch.cat(found)}, partial)
            put(partial, path)
    return load_file(path)["latents"]


def transformer_of(folder: Path) -> MMDiT:
    """A model's transformer, frozen, in float32."""
    component = open_checkpoint(folder).component("transformer")
    return fill(build(component), component, torch.float32)


def begun(transformer: MMDiT, depth: int) -> ControlNet:
    """A ControlNet that has the transformer's first blocks and adds nothing yet."""
    dual = tuple(i for i in transformer.config.dual_attention_blocks if i < depth)
    numbers = {**vars(transformer.config), "depth": depth, "dual_attention_blocks": dual}
    net = ControlNet(ControlConfig(**numbers, pooled_zeros=False))
    own = transformer.state_dict()
    zeros = ("controlnet_blocks.", "pos_embed_input.")
    state = {n: torch.zeros_like(t) if n.startswith(zeros) else own[n] for n, t in net.state_dict().items()}
    net.load_state_dict(state)
    return net


class Run(Training):
    """A ControlNet in training."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, device = args, torch.device(args.device)
        self.train, self.held = data.load(data.provide(args.data, args.size, device, args.scenes), device)
        drawn = provide_edges(args.data, args.size, args.scenes, device).to(device)
        self.drawn, self.drawn_held = drawn[data.HELD_OUT :], drawn[: data.HELD_OUT]
        transformer = transformer_of(args.model)
        net = begun(transformer, args.depth)
        size = 2 * sum(tensor.numel() for tensor in net.state_dict().values())
        if size > LARGEST:
            raise SystemExit(f"--depth {args.depth}: {size / 1e6:.1f} MB, expected at most {LARGEST / 1e6:.0f}")
        super().__init__(net, args.out, args.rate, device, None)
        self.transformer = self.computing(transformer)
        self.resume()

    def loss(self, net: ControlNet, drawn: Tensor, given: tuple[Tensor, ...], scale: float = 1.0) -> Tensor:
        """Of each sample `(B,)`. drawn: latents of edges. given: as `velocity_loss` takes it."""
        latents, noise, sigma, context, pooled = given
        x = torch.lerp(latents, noise, sigma[:, None, None, None]).to(self.dtype)
        found = net(x, sigma, context.to(self.dtype), pooled.to(self.dtype), drawn.to(self.dtype))
        with adding(self.transformer, [Added(found, scale=scale)]):
            return velocity_loss(self.transformer, latents, noise, sigma, context, pooled)

    def update(self) -> float:
        rows, given = sample(self.train, self.args.batch, generator_of(self.args.seed, self.step))
        return self.descend(self.loss(self.copy, self.drawn[rows], given).mean())

    @torch.no_grad()
    def measure(self, loss: float) -> None:
        """A line of the log: held-out loss with the averaged net, and without any."""
        net, held, generator = self.averaged(), self.held, torch.Generator().manual_seed(0)
        losses: dict[str, list[float]] = {"with": [], "without": []}
        for level in LEVELS:
            noise = torch.randn(held.latents.shape, generator=generator).to(self.device)
            for rows in torch.arange(len(held), device=self.device).split(self.args.batch):
                sigma = torch.full((len(rows),), level, device=self.device)
                given = (held.latents[rows].float(), noise[rows], sigma, held.context[rows], held.pooled[rows])
                for name, scale in (("with", 1.0), ("without", 0.0)):
                    losses[name] += self.loss(net, self.drawn_held[rows], given, scale).tolist()
        self.write({"loss": round(loss, 5)} | {name: round(sum(each) / len(each), 5) for name, each in losses.items()})

    def finish(self) -> None:
        """The averaged net as a diffusers folder, in bfloat16."""
        native, folder = self.average.state(), self.out / "net"
        folder.mkdir(exist_ok=True)
        tensors = {
            name: revert(entry, native[entry.sources[0]]).bfloat16().contiguous().cpu()
            for name, entry in to_diffusers(native, CONTROL).items()
        }
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        shapes = {name: tuple(tensor.shape) for name, tensor in native.items()}
        published.write_json(folder / "config.json", published.control_config(shapes, pooled_zeros=False))
        print(folder, flush=True)


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="60min", help="60min or steps:3000")
    parser.add_argument("--depth", type=int, default=1, help="blocks of the net")
    parser.add_argument("--model", type=Path, default=DEMO, help="folder of the demo model that it is for")
    parser.add_argument("--out", type=Path, default=Path("out/control"), help="folder of the run")
    parser.add_argument("--data", type=Path, default=Path("out/variants"), help="folder of the encoded scenes")
    parser.add_argument("--size", type=int, default=128, help="of the scenes, in pixels")
    parser.add_argument("--scenes", type=int, default=data.COUNT, help="how many there are")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: all cores)")
    parser.add_argument("--draw-edges", nargs=2, type=Path, metavar=("IN", "OUT"), help="of a picture, and no more")
    args = parser.parse_args(arguments)
    if args.draw_edges:
        picture = np.array(Image.open(args.draw_edges[0]).convert("RGB"))
        Image.fromarray(edges(picture)).save(args.draw_edges[1])
        return 0
    try:
        budget = Budget.read(args.budget)
        assert budget.unit != "flops"
    except (ValueError, AssertionError):
        parser.error(f"--budget: {args.budget!r}: expected 60min or steps:3000")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    return 0 if train(Run(args), budget) else 130


if __name__ == "__main__":
    sys.exit(main())
