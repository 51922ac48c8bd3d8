"""The driver: text encoders, sampler, transformer and autoencoder in a row, prompt to pictures.

This is the one place that knows all the parts. Each stage is a method, so that a stage can be called, replaced or
watched on its own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mmdit.loading import Parts, adapters_of, load_parts
from mmdit.settings import Settings, SettingsError, check_size, settings_from, split_lora
from samplers import Step, classifier_free_guidance, euler, shifted_sigmas
from text_encoders import Conditioning, TokenizerError
from weights import CheckpointError


class NotFiniteError(ValueError):
    """A stage gave NaN or infinity; the message names the stage and what to try."""


USER_ERRORS = (SettingsError, CheckpointError, TokenizerError, NotFiniteError)


DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass
class Result:
    """What a run leaves behind."""

    images: list[Image.Image]
    settings: Settings  # with every default filled in, device and dtype as they were
    seconds: dict[str, float]  # per stage


class Pipeline:
    """A loaded model, ready to draw. Build one with `Pipeline.load`."""

    def __init__(self, parts: Parts, settings: Settings) -> None:
        """settings: those that loading fixed are read from it (model, tokenizers, lora, t5, dtype, device).

        `adapters` adds more adapters, rescales them and takes them out.
        """
        self.transformer, self.text, self.vae, self.defaults, self.shift = parts
        self.settings = settings
        weight = self.transformer.context_embedder.weight
        self.actual = {"device": weight.device.type, "dtype": DTYPE_NAMES[weight.dtype]}  # what "auto" came to
        encoders = {"clip_l": self.text.clip_l, "clip_g": self.text.clip_g, "t5": self.text.t5}
        self.adapters = adapters_of({"transformer": self.transformer, **encoders})
        for path, scale in map(split_lora, settings.lora):
            self.adapters.add(path, scale)

    @classmethod
    def load(cls, model: str | Path | None = None, **keywords: Any) -> "Pipeline":
        """Load a diffusers folder or a single file, or without an argument the demo model.

        keywords: `tokenizers`, `lora` (a list), `device`, `dtype`, `t5`, as in Settings; without T5 its weights are
        not opened.
        Raises one of USER_ERRORS, each a ValueError with a one-line message.
        """
        return cls.from_settings(settings_from({"model": model and str(model), **keywords}, Settings()))

    @classmethod
    def from_settings(cls, settings: Settings) -> "Pipeline":
        """Load the model that a Settings names; what it says of the picture may change from call to call."""
        return cls(load_parts(settings), settings)

    def __call__(self, prompt: str, **keywords: Any) -> list[Image.Image]:
        """Draw. keywords: negative, width, height, steps, cfg, seed, count, t5_length, as in Settings.

        Returns `count` pictures; picture i equals the single picture of seed + i. Raises one of USER_ERRORS.
        """
        settings = settings_from({"prompt": prompt, **keywords}, self.settings)
        for name in {"out", "dump"} & keywords.keys():
            raise SettingsError(f"{name} belongs to the command line: save the pictures that this returns")
        return self.run(settings).images

    @torch.inference_mode()
    def run(self, settings: Settings, trace: dict[str, Tensor] | None = None) -> Result:
        """Draw by a Settings. trace: filled with every stage's tensors where given (the names of `--dump`)."""
        settings = self.check(settings)
        seconds: dict[str, float] = {}
        guided = settings.cfg != 1
        with stage("encode", 1 + guided, seconds) as bar:
            cond = self.encode(settings.prompt, settings)
            bar.update()
            uncond = self.encode(settings.negative, settings) if guided else None
            bar.update(int(guided))
        noise = self.noise(settings)
        sigmas = shifted_sigmas(settings.steps or 1, self.shift)
        if trace is not None:
            trace.update(sigmas=sigmas, noise=noise)
            for name, text in (("cond", cond), ("uncond", uncond)):
                trace.update(traced_text(name, text, settings.count) if text else {})
        with stage("denoise", settings.steps, seconds) as bar:
            latents = self.denoise(noise, sigmas, cond, uncond, settings, bar, trace)
        with stage("decode", settings.count, seconds) as bar:
            pixels = torch.cat([self.decode(latent, bar) for latent in latents.split(1)])  # (B, H, W, 3)
        if trace is not None:
            trace["image"] = pixels
        images = [Image.fromarray(picture.numpy()) for picture in pixels]
        return Result(images, replace(settings, **self.actual, lora=self.adapters.settings), seconds)

    def check(self, settings: Settings) -> Settings:
        """The settings with defaults filled in; raises SettingsError for what this model cannot do."""
        actual = {**self.actual, "lora": self.adapters.settings}
        for name in ("model", "tokenizers", "lora", "t5", "dtype", "device"):
            if getattr(settings, name) not in (getattr(self.settings, name), actual.get(name)):
                raise SettingsError(f"{name} is fixed when the model is loaded: give it to Pipeline.load")
        settings = settings.resolved(self.defaults)
        config = self.transformer.config
        multiple = config.patch_size * self.vae.config.downscale
        check_size(settings, multiple, config.pos_embed_max_size * multiple)
        return settings

    def encode(self, prompt: str, settings: Settings) -> Conditioning:
        """One text to context `(1, n, context_size)` and pooled vector `(1, pooled_size)`."""
        text = replace(self.text, t5_length=settings.t5_length or 256).encode([prompt])
        for values in (text.context, text.pooled):
            check_finite(values, "the text encoders' output", "--t5 off tells whether it is T5")
        return text

    def noise(self, settings: Settings) -> Tensor:
        """The starting latents, float32 `(B, C, h, w)`, drawn on the CPU so that every device starts alike."""
        config, cell = self.vae.config, self.vae.config.downscale
        shape = (config.latent_channels, (settings.height or 0) // cell, (settings.width or 0) // cell)
        seeds = range(settings.seed, settings.seed + settings.count)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def denoise(
        self, noise: Tensor, sigmas: Tensor, cond: Conditioning, uncond: Conditioning | None, settings: Settings,
        bar: tqdm, trace: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Noise `(B, C, h, w)` to latents `(B, C, h, w)`, float32 between steps."""
        device, texts = self.transformer.context_embedder.weight.device, (cond, uncond) if uncond else (cond,)
        context = torch.cat([t.context.expand(settings.count, -1, -1) for t in texts]).to(device)
        pooled = torch.cat([t.pooled.expand(settings.count, -1) for t in texts]).to(device)
        dtype = self.transformer.context_embedder.weight.dtype
        context, pooled = context.to(dtype), pooled.to(dtype)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self.transformer(x.to(dtype), sigma.expand(len(x)), context, pooled).float()

        def watch(step: Step) -> None:
            hint = "--dtype fp32 or bf16 has a wider range"
            check_finite(step.x, f"the latents after step {step.index + 1} of {settings.steps}", hint)
            if trace is not None:
                trace[f"velocity.{step.index}"] = step.velocity.cpu()
                trace[f"latents.{step.index}"] = step.x.cpu()
            bar.update()

        guide = classifier_free_guidance(velocity, settings.cfg or 1.0) if uncond else velocity
        return euler(guide, noise.to(device), sigmas.to(device), watch)

    def decode(self, latent: Tensor, bar: tqdm) -> Tensor:
        """Latent `(1, C, h, w)` to pixels, uint8 `(1, H, W, 3)` on the CPU, rounded to the nearest level."""
        picture = self.vae.decode(latent.to(self.vae.decoder.conv_in.weight.dtype)).float()
        check_finite(picture, "the decoded picture", "--dtype fp32 or bf16 has a wider range")
        bar.update()
        return ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def check_finite(values: Tensor, what: str, hint: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError(f"{what}: NaN or infinity; {hint}")


def traced_text(name: str, text: Conditioning, count: int) -> dict[str, Tensor]:
    """A conditioning under its names in a dump, repeated for every picture."""
    named = {f"tokens.{encoder}": ids for encoder, ids in text.tokens.items()}
    named |= {"context": text.context.float(), "pooled": text.pooled.float()}
    return {f"{name}.{key}": t.expand(count, *t.shape[1:]).cpu().contiguous() for key, t in named.items()}


@contextmanager
def stage(name: str, total: int | None, seconds: dict[str, float]) -> Iterator[tqdm]:
    """Time a stage into `seconds` and show its progress on a terminal."""
    start = time.perf_counter()
    with tqdm(total=total, desc=name, disable=None, leave=False) as bar:
        yield bar
    seconds[name] = time.perf_counter() - start
