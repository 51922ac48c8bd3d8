"""Train the demo model's transformer and text encoders together: `python -m benchmarks.emoji.train_mmdit --minutes 90`.

Rectified flow (Esser et al. 2024, arXiv 2403.03206): x = (1 - sigma) latent + sigma noise, the target is
noise - latent, sigma is drawn logit-normally. Needs the autoencoder of `train_vae`; resumes from its checkpoint.
Whole captions and single encoders are dropped at random, so that guidance and running without T5 work.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.emoji.optimizer import Both
from benchmarks.emoji.run_state import Average, Clock, learning_rate, save
from benchmarks.emoji.scenes import random_scene, render
from benchmarks.emoji.tokenizers import CLIP_LENGTH, T5_LENGTH, write_tokenizers
from benchmarks.emoji.train_vae import CONFIG as VAE_CONFIG
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from text_encoders.clip import CLIPConfig, CLIPTextEncoder
from text_encoders.t5 import T5Config, T5Encoder
from text_encoders.tokenizers import CLIPTokenizer, T5Tokenizer
from vae.autoencoder import Autoencoder

MMDIT = MMDiTConfig(
    hidden_size=256,
    depth=5,
    num_heads=4,
    pos_embed_max_size=8,
    pooled_size=192,
    context_size=192,
    dual_attention_blocks=(0, 1, 2),
)
T5 = T5Config(vocab_size=256, d_model=192, d_kv=32, d_ff=384, num_layers=2, num_heads=4)
VOCABULARY = 768  # rows of both CLIPs' token embeddings; their tokenizers use 765


def clip_config(width: int, activation: str) -> CLIPConfig:
    return CLIPConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=2,
        num_heads=width // 32,
        max_length=CLIP_LENGTH,
        projection_dim=width,
        activation=activation,
    )


CLIP_L, CLIP_G = clip_config(64, "quick_gelu"), clip_config(128, "gelu")
DROP_CAPTION, DROP_T5, DROP_CLIP = 0.1, 0.15, 0.05  # CLIP-L and CLIP-G are dropped each on its own


class Trained(nn.Module):
    """All that is trained here, so that averaging and checkpoints see one module."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_l = CLIPTextEncoder(CLIP_L)
        self.clip_g = CLIPTextEncoder(CLIP_G)
        self.t5 = T5Encoder(T5)
        self.transformer = MMDiT(MMDIT)

    def forward(self, x: Tensor, sigma: Tensor, tokens: dict[str, Tensor], keep: dict[str, Tensor]) -> Tensor:
        """Velocity for noisy latents x `(B, C, h, w)`; `keep[encoder]` `(B,)` is 0 where an encoder is dropped."""
        l_hidden, l_pooled = self.clip_l(tokens["clip_l"])
        g_hidden, g_pooled = self.clip_g(tokens["clip_g"])
        keep_l, keep_g, keep_t5 = (keep[name][:, None] for name in ("clip_l", "clip_g", "t5"))
        pooled = torch.cat([l_pooled * keep_l, g_pooled * keep_g], dim=-1)
        clip = torch.cat([l_hidden * keep_l[..., None], g_hidden * keep_g[..., None]], dim=-1)
        t5 = self.t5(tokens["t5"]) * keep_t5[..., None]
        context = torch.cat([nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)
        return self.transformer(x, sigma, context, pooled)


@torch.no_grad()
def initialise(model: Trained) -> None:
    """Xavier weights, zero biases, zero gates (adaLN-Zero), embeddings of a unit's size, sines for positions."""
    for name, p in model.named_parameters():
        if "embedding" in name or "relative_attention_bias" in name or name.endswith("shared.weight"):
            nn.init.normal_(p, std=0.02 if "position" in name or "bias" in name else 0.5)
        elif p.ndim > 1 and "adaLN" not in name and "final_layer" not in name:
            nn.init.xavier_uniform_(p.flatten(1))
        elif p.ndim > 1 or name.endswith("bias"):
            nn.init.zeros_(p)
    model.transformer.pos_embed.copy_(position_table(MMDIT.pos_embed_max_size, MMDIT.hidden_size))


def position_table(side: int, width: int) -> Tensor:
    """Sines and cosines of column, then row, `(1, side², width)`; each half is [sin | cos] over width / 4 waves."""
    waves = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = (torch.arange(side, dtype=torch.float64) - side / 2)[:, None] * waves  # (side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width).float()


class Pool:
    """Encoded scenes with their captions' tokens, renewed a little at a time."""

    def __init__(self, work: Path, count: int, size: int, seed: int) -> None:
        folder = work / "tokenizers"
        if not folder.exists():  # a resumed run keeps the ids that its embeddings were trained with
            write_tokenizers(folder)
        clip_l, clip_g = (CLIPTokenizer.load(folder / name) for name in ("tokenizer", "tokenizer_2"))
        t5 = T5Tokenizer.load(folder / "tokenizer_3")
        self.tokenize = {
            "clip_l": lambda texts: clip_l(texts).ids,
            "clip_g": lambda texts: clip_g(texts).ids,
            "t5": lambda texts: t5(texts, T5_LENGTH).ids,
        }
        self.empty = {name: tokenize([""]) for name, tokenize in self.tokenize.items()}
        state = torch.load(work / "vae.pt", weights_only=True)["average"]
        self.vae = Autoencoder(VAE_CONFIG)
        self.vae.load_state_dict(state)
        self.vae.requires_grad_(False)
        self.rng, self.size = Random(seed), size
        self.latents, self.tokens = self.make(count)
        self.shift, self.scale = float(self.latents.mean()), 1.0 / float(self.latents.std())

    def make(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        scenes = [random_scene(self.rng) for _ in range(count)]
        latents = []
        for i in range(0, count, 64):
            pixels = np.stack([render(scene, self.size) for scene in scenes[i : i + 64]])
            image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(self.vae.encode(image.contiguous(memory_format=torch.channels_last))[0].float())
        captions = [scene.caption for scene in scenes]
        return torch.cat(latents), {name: tokenize(captions) for name, tokenize in self.tokenize.items()}

    def renew(self, count: int) -> None:
        """Replace `count` entries by new scenes."""
        rows = torch.randperm(len(self.latents))[:count]
        latents, tokens = self.make(count)
        self.latents[rows] = latents
        for name, ids in tokens.items():
            self.tokens[name][rows] = ids

    def sample(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised latents `(count, C, h, w)` and tokens, some captions dropped whole."""
        rows = torch.randint(len(self.latents), (count,))
        drop = torch.rand(count, 1) < DROP_CAPTION
        tokens = {name: torch.where(drop, self.empty[name], ids[rows]) for name, ids in self.tokens.items()}
        return (self.latents[rows] - self.shift) * self.scale, tokens


def loss_of(model: Callable[..., Tensor], latent: Tensor, tokens: dict[str, Tensor]) -> Tensor:
    count = len(latent)
    noise = torch.randn_like(latent)
    sigma = torch.sigmoid(torch.randn(count) + 0.3)
    x = torch.lerp(latent, noise, sigma[:, None, None, None])
    chances = {"clip_l": DROP_CLIP, "clip_g": DROP_CLIP, "t5": DROP_T5}
    keep = {name: (torch.rand(count) >= chance).float() for name, chance in chances.items()}
    # Plain matrix products are faster than flash attention for these few tokens, backwards above all.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = model(x, sigma, tokens, keep)
    return (velocity.float() - (noise - latent)).square().mean()


def optimizer_of(model: Trained) -> Both:
    """Muon for the matrices inside blocks, AdamW for embeddings, norms, modulation and the layers at both ends."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = any(part in name for part in ("joint_blocks.", ".layers.", ".block."))
        muon = inside and p.ndim == 2 and "adaLN" not in name and "relative_attention_bias" not in name
        (matrices if muon else others).append(p)
    return Both(matrices, others, decay=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/emoji"), help="folder of checkpoints")
    parser.add_argument("--minutes", type=float, default=90, help="training time over all sittings")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--pool", type=int, default=30_000, help="encoded scenes held in memory")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="a quarter faster after two minutes; needs a C++ compiler"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = Trained()
    initialise(model)
    optimizer, average = optimizer_of(model), Average(model, horizon=300)
    clock, step, path = Clock(args.minutes), 0, args.work / "mmdit.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values = {name: state["average"][name] for name in average.values}
        average.steps = step = state["step"]
        torch.manual_seed(args.seed + step)
        clock = Clock(args.minutes, state["spent"])
    pool = Pool(args.work, args.pool, args.size, seed=args.seed * 1_000_003 + step)
    print(f"{args.pool} scenes encoded; latent shift {pool.shift:.4f}, scale {pool.scale:.4f}", flush=True)
    clock.last = time.monotonic()  # encoding is not training time

    def checkpoint() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state()}
        latent = {"shift": pool.shift, "scale": pool.scale}
        save(path, {**state, "step": step, "spent": clock.spent, "latent": latent})

    compiled = torch.compile(model) if args.compile else model
    running = 0.0
    while (share := clock.tick()) < 1.0:
        loss = loss_of(compiled, *pool.sample(args.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(args.rate * learning_rate(share))
        average.update()
        step += 1
        running = loss.item() if step == 1 or not running else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            pool.renew(args.pool // 30)
            pace = step * args.batch / clock.spent
            print(f"{clock.spent / 60:6.1f} min  step {step}  loss {running:.4f}  {pace:.0f}/s", flush=True)
        if step % 300 == 0:
            checkpoint()
    checkpoint()


if __name__ == "__main__":
    main()
