"""Scenes with all that a transformer is trained on, encoded once by the demo's own autoencoder and text encoders.

They lie in a file that every variant reads: latents, contexts, pooled vectors. The first scenes are held out.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.check_variant import WIDTHS
from benchmarks.emoji.run_state import number_format
from benchmarks.emoji.scenes import Scene, random_scene, render
from mmdit import Pipeline
from mmdit.common.files import beside, put
from mmdit.driver.loading import DEMO

SEED, HELD_OUT, COUNT, SIZE = 20, 256, 12_000, 64
AT_ONCE = 16  # pictures encoded together: more no longer fit a core's cache


@dataclass
class Data:
    """Encoded scenes. latents `(N, C, h, w)`, context `(N, M, W)`, pooled `(N, P)`, all in the machine's own format.

    The last M of the context's tokens that are T5's follow `clip` tokens of CLIP's; `empty` is the empty caption.
    """

    latents: Tensor
    context: Tensor
    pooled: Tensor
    empty_context: Tensor
    empty_pooled: Tensor
    clip: int

    def __len__(self) -> int:
        return len(self.latents)

    def read_by(self, encoders: Sequence[str]) -> "Data":
        """With what these encoders alone would give, as `text_encoders.join` puts it together."""
        rows, first = [], 0
        for name, width in WIDTHS.items():
            rows += range(first, first + width) if name in encoders else ()
            first += width

        def contexts(every: Tensor) -> Tensor:
            clip = torch.zeros_like(every[:, : self.clip])
            clip[..., : len(rows)] = every[:, : self.clip, rows]  # those that are there lie side by side
            return torch.cat([clip, every[:, self.clip :]], dim=1) if "t5" in encoders else clip

        context, empty = map(contexts, (self.context, self.empty_context))
        pooled, empty_pooled = (t[:, rows] for t in (self.pooled, self.empty_pooled))
        return Data(self.latents, context, pooled, empty, empty_pooled, self.clip)

    def batch(self, rows: Tensor, empty: Tensor, without_t5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, contexts and pooled vectors of these rows; where true, with the empty caption, and without T5."""
        context = torch.where(empty[:, None, None], self.empty_context, self.context[rows])
        context[:, self.clip :] *= ~without_t5[:, None, None]
        return self.latents[rows], context, torch.where(empty[:, None], self.empty_pooled, self.pooled[rows])


def scenes(count: int, seed: int = SEED) -> list[Scene]:
    rng = Random(seed)
    return [random_scene(rng) for _ in range(count)]


def encode(count: int, size: int, device: torch.device) -> dict[str, Tensor]:
    """So many scenes, `size` pixels wide and high; the tensors of the file."""
    pipe = Pipeline.load(DEMO, dtype="bf16" if number_format(device) == torch.bfloat16 else "fp32", device=device.type)
    length = pipe.settings.resolved(pipe.defaults).t5_length
    assert length is not None
    found: dict[str, list[Tensor]] = {"latents": [], "context": [], "pooled": []}
    every = scenes(count)
    for i in range(0, count, AT_ONCE):
        some = every[i : i + AT_ONCE]
        pixels = torch.from_numpy(np.stack([render(scene, size) for scene in some])).permute(0, 3, 1, 2)
        with torch.no_grad():
            image = (pixels.to(device).float() / 127.5 - 1).to(pipe.vae.encoder.conv_in.weight.dtype)
            pipe.residency.use("vae")
            found["latents"].append(pipe.vae.encode(image)[0].bfloat16().cpu())
        text = pipe.encode([scene.caption for scene in some], length)
        found["context"].append(text.context.bfloat16().cpu())
        found["pooled"].append(text.pooled.bfloat16().cpu())
    empty = pipe.encode([""], length)
    clip = torch.tensor(empty.tokens["clip_l"].shape[1])
    parts = {name: torch.cat(tensors).contiguous() for name, tensors in found.items()}
    return parts | {
        "empty_context": empty.context.bfloat16().cpu(),
        "empty_pooled": empty.pooled.bfloat16().cpu(),
        "clip": clip,
    }


def provide(folder: Path, size: int, device: torch.device, count: int = COUNT) -> Path:
    """The file of scenes of this size, made now where it is not there."""
    path = folder / f"scenes-{size}-{count}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tensors = encode(count, size, device)
        with beside(path) as partial:
            save_file(tensors, partial)
            put(partial, path)
    return path


def load(path: Path, device: torch.device) -> tuple[Data, Data]:
    """Scenes to train on, and those held out."""
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    clip, dtype = int(found.pop("clip")), number_format(device)
    found = {name: tensor.to(device, dtype) for name, tensor in found.items()}
    every = Data(**found, clip=clip)

    def part(rows: slice) -> Data:
        shared = (every.empty_context, every.empty_pooled, clip)
        return Data(every.latents[rows], every.context[rows], every.pooled[rows], *shared)

    return part(slice(HELD_OUT, None)), part(slice(HELD_OUT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("out/variants"), help="folder of the file")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels along a side")
    args = parser.parse_args()
    print(provide(args.data, args.size, torch.device("cpu")))


if __name__ == "__main__":
    main()
