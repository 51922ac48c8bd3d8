"""Train the demo model's autoencoder on emoji scenes: `python -m benchmarks.emoji.train_vae --minutes 30`.

L1 and squared error with a slight pull of the latents towards a unit Gaussian. Three steps of four see crops around an
emoji, which is where there is something to learn, the fourth as many pixels in whole pictures. Resumes from its
checkpoint; `--init FOLDER` begins with the autoencoder of an exported demo model. With `--decoder-only` the encoder,
and so the latents that the transformer learns, stay as they are.
"""

import argparse
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.emoji.groupnorm import speed_up
from benchmarks.emoji.optimizer import Both
from benchmarks.emoji.run_state import Average, Clock, exported, learning_rate, save
from benchmarks.emoji.scenes import PLACES, Scene, random_scene, render
from vae.autoencoder import Autoencoder, VAEConfig

# Scale and shift are measured after training and written into the exported config; until then latents are raw.
CONFIG = VAEConfig(
    block_out_channels=(16, 32, 64, 160),
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=1.0,
    shift_factor=0.0,
)
KL_WEIGHT = 1e-4


CROP = 64


def batch(rng: Random, count: int, size: int, crop: int | None = None) -> Tensor:
    """Random training scenes, or crops of them, float `(B, 3, S, S)` in [-1, 1]."""
    scenes = [random_scene(rng) for _ in range(count)]
    pixels = [render(scene, size) for scene in scenes]
    if crop:
        pixels = [cropped(rng, picture, scene, crop) for picture, scene in zip(pixels, scenes)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def cropped(rng: Random, picture: np.ndarray, scene: Scene, side: int) -> np.ndarray:
    """A square of the picture somewhere about one of its subjects."""
    size = len(picture)
    corner = []
    for centre in rng.choice(PLACES[len(scene.subjects)]):
        start = round(centre * size) - side // 2 + rng.randint(-side // 3, side // 3)
        corner.append(min(max(start, 0), size - side))
    left, top = corner
    return picture[top : top + side, left : left + side]


def loss_of(model: Autoencoder, image: Tensor, decoder_only: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(not decoder_only):
            mean, std = (t.float() for t in model.encode(image))
        # A decoder refined by itself sees less noise: what it will get are means, or latents near them.
        noise = (0.3 if decoder_only else 1.0) * torch.randn_like(mean)
        decoded = model.decode(mean + std * noise).float()
    kl = 0.5 * (mean.square() + std.square() - 1.0 - 2.0 * std.log()).mean()
    return F.l1_loss(decoded, image) + 2.0 * F.mse_loss(decoded, image) + KL_WEIGHT * kl


@torch.no_grad()
def reconstruction_db(model: Autoencoder, image: Tensor) -> float:
    """Mean peak signal-to-noise ratio over the pictures, after rounding to 8 bits as a saved picture is."""
    decoded = torch.cat([model.decode(model.encode(part)[0]) for part in image.split(32)])
    levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
    error = (levels - (image + 1) * 127.5).square().mean(dim=(1, 2, 3)).clamp(min=1e-3)
    return float((10 * torch.log10(255.0**2 / error)).mean())


def optimizer_of(model: Autoencoder) -> Both:
    """Muon for the convolutions inside, AdamW for the norms, the biases and the layers at both ends of each half."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            muon = p.ndim == 4 and "conv_in" not in name and name != "decoder.conv_out.weight"
            (matrices if muon else others).append(p)
    return Both(matrices, others, decay=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/emoji"), help="folder of checkpoints")
    parser.add_argument("--minutes", type=float, default=30, help="training time over all sittings")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--init", type=Path, default=None, help="folder of an exported demo model to begin with")
    parser.add_argument("--rate", type=float, default=8e-3, help="peak learning rate")
    parser.add_argument("--decoder-only", action="store_true", help="refine the decoder of a trained autoencoder")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = Autoencoder(CONFIG)
    speed_up(model)
    for p in model.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    # A latent's standard deviation begins small, or its noise hides all else at first.
    nn.init.constant_(model.get_parameter("encoder.conv_out.bias")[CONFIG.latent_channels :], -6.0)
    path = args.work / ("decoder.pt" if args.decoder_only else "vae.pt")
    if args.init:
        model.load_state_dict(exported(args.init, "vae"))
    if args.decoder_only:
        model.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True)["average"])
        model.encoder.requires_grad_(False)
    optimizer = optimizer_of(model)
    average, clock, step = Average(model, horizon=500), Clock(args.minutes), 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.steps, step = state["average"], state["step"], state["step"]
        clock = Clock(args.minutes, state["spent"])
    rng = Random(args.seed * 1_000_003 + step)
    held_back = batch(Random(10**9), 64, args.size)

    def checkpoint() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state()}
        save(path, {**state, "step": step, "spent": clock.spent})

    running = 0.0
    while (share := clock.tick()) < 1.0:
        whole = step % 4 == 3
        count = max(1, args.batch * CROP**2 // args.size**2) if whole else args.batch
        image = batch(rng, count, args.size, None if whole else CROP).contiguous(memory_format=torch.channels_last)
        loss = loss_of(model, image, args.decoder_only)
        loss.backward()
        optimizer.step(args.rate * learning_rate(share))
        average.update()
        step += 1
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if step % 500 == 0:
            checkpoint()
            averaged = Autoencoder(CONFIG)
            averaged.load_state_dict(average.state())
            quality = reconstruction_db(averaged, held_back)
            pace = step * args.batch / clock.spent
            print(
                f"{clock.spent / 60:6.1f} min  step {step}  loss {running:.4f}  {quality:.2f} dB  {pace:.0f}/s",
                flush=True,
            )
    checkpoint()


if __name__ == "__main__":
    main()
