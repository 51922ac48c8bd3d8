"""Encoded scenes to train the transformer on: latents with their captions' tokens, renewed a little at a time."""

import json
import shutil
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from benchmarks.emoji.run_state import number_format
from benchmarks.emoji.scenes import random_scene, render
from benchmarks.emoji.tokenizers import CLIP_LENGTH, T5_LENGTH, write_tokenizers
from benchmarks.emoji.train_vae import CONFIG as VAE_CONFIG
from text_encoders.tokenizers import CLIPTokenizer, T5Tokenizer
from vae.autoencoder import Autoencoder

AT_ONCE = 16  # pictures encoded together: more no longer fit a core's cache


class Encoder:
    """Scenes to raw latents and tokens."""

    def __init__(self, work: Path, device: torch.device) -> None:
        folder = work / "tokenizers"
        clip_l, clip_g = (CLIPTokenizer.load(folder / name) for name in ("tokenizer", "tokenizer_2"))
        t5 = T5Tokenizer.load(folder / "tokenizer_3")
        self.tokenize = {
            "clip_l": lambda texts: clip_l(texts).ids,
            "clip_g": lambda texts: clip_g(texts).ids,
            "t5": lambda texts: t5(texts, T5_LENGTH).ids,
        }
        self.device, self.dtype = device, number_format(device)
        vae = Autoencoder(VAE_CONFIG)
        vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["average"])
        self.vae = vae.requires_grad_(False).to(device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def __call__(self, rng: Random, count: int, size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Random training scenes `size` (width, height) large: latents `(count, C, h, w)`, tokens `(count, L)`."""
        scenes, latents = [random_scene(rng) for _ in range(count)], []
        for i in range(0, count, AT_ONCE):
            pixels = np.stack([render(scene, *size) for scene in scenes[i : i + AT_ONCE]])
            image = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            image = image.to(self.dtype, memory_format=torch.channels_last)
            latents.append(self.vae.encode(image)[0])
        captions = [scene.caption for scene in scenes]
        tokens = {name: ids(captions).to(self.device) for name, ids in self.tokenize.items()}
        return torch.cat(latents), tokens

    def empty(self) -> dict[str, Tensor]:
        """The tokens of the empty caption."""
        return {name: ids([""]).to(self.device) for name, ids in self.tokenize.items()}


class Pool:
    """Scenes of one size, to draw batches from."""

    def __init__(self, encode: Encoder, size: tuple[int, int], count: int, limit: int, seed: int) -> None:
        self.encode, self.size, self.limit, self.rng = encode, size, limit, Random(seed)
        self.latents, self.tokens = encode(self.rng, count, size)

    def renew(self, count: int) -> None:
        """Add so many new scenes, or once there are `limit`, put them in the place of old ones."""
        latents, tokens = self.encode(self.rng, count, self.size)
        if len(self.latents) + count <= self.limit:
            self.latents = torch.cat([self.latents, latents])
            self.tokens = {name: torch.cat([self.tokens[name], ids]) for name, ids in tokens.items()}
            return
        rows = torch.randperm(len(self.latents), device=latents.device)[:count]
        self.latents[rows] = latents
        for name, ids in tokens.items():
            self.tokens[name][rows] = ids

    def sample(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.randint(len(self.latents), (count,), device=self.latents.device)
        return self.latents[rows], {name: ids[rows] for name, ids in self.tokens.items()}


def provide_tokenizers(work: Path, init: Path | None) -> None:
    """Those of the model to begin with, else new ones; a resumed run keeps the ids of its embeddings."""
    folder = work / "tokenizers"
    if folder.exists():
        return
    if init is None:
        write_tokenizers(folder)
        return
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(init / name, folder / name)
        path = folder / name / "tokenizer_config.json"
        length = T5_LENGTH if name == "tokenizer_3" else CLIP_LENGTH
        config = {**json.loads(path.read_text(encoding="utf-8")), "model_max_length": length}
        path.write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
