"""The driver: text encoders, sampler, transformer and autoencoder in a row, prompt to pictures.

This is the one place that knows all the parts. Each stage is a method of plain arguments (`encode`, `noise`,
`velocity`, `decode`), and `run` puts them in a row: an experiment calls them one by one, wraps the velocity, or takes
another sampler.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mmdit.loading import DTYPES, Parts, adapters_of, load_parts
from mmdit.settings import LOADED, Settings, SettingsError, check_size, settings_from, split_lora
from samplers import Step, classifier_free_guidance, euler, shifted_sigmas
from samplers.guidance import Velocity
from text_encoders import Conditioning, TokenizerError
from weights import CheckpointError


class NotFiniteError(ValueError):
    """A stage gave NaN or infinity; the message names the stage and what to try."""


class DeviceMemoryError(ValueError):
    """The device's memory does not suffice; the message names the stage and what to try."""


USER_ERRORS = (SettingsError, CheckpointError, TokenizerError, NotFiniteError, DeviceMemoryError)


@dataclass
class Result:
    """What a run leaves behind."""

    images: list[Image.Image]
    settings: Settings  # with every default filled in, device and dtype as they were
    seconds: dict[str, float]  # per stage


class Pipeline:
    """A loaded model, ready to draw. Build one with `Pipeline.load`."""

    def __init__(self, parts: Parts, settings: Settings) -> None:
        """settings: what loading fixed is read from it (`LOADED`).

        `adapters` adds more adapters, rescales them and takes them out.
        """
        self.transformer, self.text, self.vae = parts.transformer, parts.text, parts.vae
        self.defaults, self.shift, self.device, self.dtype = parts.defaults, parts.shift, parts.device, parts.dtype
        self.settings = settings
        encoders = {"clip_l": self.text.clip_l, "clip_g": self.text.clip_g, "t5": self.text.t5}
        self.adapters = adapters_of({"transformer": self.transformer, **encoders})
        for path, scale in map(split_lora, settings.lora):
            self.adapters.add(path, scale)

    @classmethod
    def load(cls, model: str | Path | None = None, **keywords: Any) -> "Pipeline":
        """Load a diffusers folder, a single file or a model of the hub, or without an argument the demo model.

        keywords: `clip_l`, `clip_g`, `t5xxl`, `vae`, `tokenizers`, `lora` (a list), `device`, `dtype`, `t5`, as in
        Settings; without T5 its weights are not opened. Raises one of USER_ERRORS, each a ValueError with a one-line
        message.
        """
        given = {name: str(v) if isinstance(v, Path) else v for name, v in {"model": model, **keywords}.items()}
        return cls.from_settings(settings_from(given))

    @classmethod
    def from_settings(cls, settings: Settings) -> "Pipeline":
        """Load the model that a Settings names; what it says of the picture may change from call to call."""
        with memory_errors("loading"):
            return cls(load_parts(settings), settings)

    def __call__(self, prompt: str, **keywords: Any) -> list[Image.Image]:
        """Draw. keywords: negative, width, height, steps, cfg, seed, count, t5_length, as in Settings.

        Returns `count` pictures; picture i equals the single picture of seed + i within rounding. Raises one of
        USER_ERRORS.
        """
        for name in {"out", "dump"} & keywords.keys():
            raise SettingsError(f"{name} belongs to the command line: save the pictures that this returns")
        return self.run(settings_from({"prompt": prompt, **keywords}, self.settings)).images

    @torch.no_grad()
    def run(self, settings: Settings, trace: dict[str, Tensor] | None = None) -> Result:
        """Draw by a Settings. trace: filled with every stage's tensors where given (the names of `--dump`)."""
        s, seconds = self.check(settings), {}
        assert s.width and s.height and s.steps and s.t5_length and s.cfg is not None
        with stage("encode", seconds, total=1 if s.cfg == 1 else 2) as bar:
            cond = self.encode([s.prompt], s.t5_length)
            bar.update()
            uncond = None if s.cfg == 1 else self.encode([s.negative], s.t5_length)
        noise = self.noise(s.width, s.height, range(s.seed, s.seed + s.count))
        sigmas = shifted_sigmas(s.steps, self.shift)
        with stage("denoise", seconds, total=s.steps) as bar, exact_convolutions(self.dtype):
            velocity = self.velocity(cond, uncond, s.cfg, s.count)

            def watch(step: Step) -> None:
                self.check_finite(step.x, f"the latents after step {step.index + 1} of {s.steps}")
                if trace is not None:
                    trace[f"velocity.{step.index}"] = step.velocity.cpu()
                    trace[f"latents.{step.index}"] = step.x.cpu()
                bar.update()

            latents = euler(velocity, noise.to(self.device), sigmas.to(self.device), watch)
        with stage("decode", seconds, total=s.count) as bar, exact_convolutions(self.dtype):
            pictures = []
            for latent in latents.split(1):
                pictures.append(self.decode(latent))
                bar.update()
        pixels = torch.cat(pictures)  # (B, H, W, 3)
        if trace is not None:
            trace.update(sigmas=sigmas, noise=noise, image=pixels, **traced_text("cond", cond, s.count))
            trace.update(traced_text("uncond", uncond, s.count) if uncond else {})
        images = [Image.fromarray(picture.numpy()) for picture in pixels]
        return Result(images, replace(s, **self.actual), seconds)

    @property
    def actual(self) -> dict[str, Any]:
        """What "auto" came to, and the adapters that are in."""
        return {"device": self.device.type, "dtype": self.dtype_name, "lora": self.adapters.settings}

    def check(self, settings: Settings) -> Settings:
        """The settings with defaults filled in; raises SettingsError for what this model cannot do."""
        for name in LOADED:
            value, fixed = getattr(settings, name), getattr(self.settings, name)
            if value != fixed and value != self.actual.get(name, fixed):
                raise SettingsError(f"{name} is fixed when the model is loaded: give it to Pipeline.load")
        settings = settings.resolved(self.defaults)
        check_size(settings, self.transformer.config, self.vae.config.downscale)
        return settings

    @torch.no_grad()
    def encode(self, texts: list[str], t5_length: int) -> Conditioning:
        """Texts to context `(B, n, context_size)` and pooled vectors `(B, pooled_size)`, in one pass."""
        text = replace(self.text, t5_length=t5_length).encode(texts)
        clip = text.tokens["clip_l"].shape[1]
        self.check_finite(text.context[:, :clip], "CLIP's context")
        self.check_finite(text.context[:, clip:], "T5's context")
        self.check_finite(text.pooled, "CLIP's pooled vector")
        return text

    def noise(self, width: int, height: int, seeds: Iterable[int]) -> Tensor:
        """The starting latents, float32 `(B, C, h, w)`, drawn on the CPU so that every device starts alike."""
        config, cell = self.vae.config, self.vae.config.downscale
        shape = (config.latent_channels, height // cell, width // cell)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def velocity(
        self, cond: Conditioning, uncond: Conditioning | None = None, cfg: float = 1.0, count: int = 1
    ) -> Velocity:
        """What a sampler integrates: a function of latents `(count, C, h, w)` and sigma, float32 in and out.

        cond, uncond: texts of batch 1 or `count`; without `uncond` there is no guidance. Gradients with respect to
        the latents flow.
        """
        texts = (cond,) if uncond is None else (cond, uncond)
        context = torch.cat([t.context.expand(count, -1, -1) for t in texts]).to(self.device, self.dtype)
        pooled = torch.cat([t.pooled.expand(count, -1) for t in texts]).to(self.device, self.dtype)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self.transformer(x.to(self.dtype), sigma.expand(len(x)), context, pooled).float()

        return velocity if uncond is None else classifier_free_guidance(velocity, cfg)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(B, C, h, w)` to pixels, uint8 `(B, H, W, 3)` on the CPU, rounded to the nearest level."""
        pictures = self.vae.decode(latents.to(self.dtype)).float()  # (B, 3, H, W)
        self.check_finite(pictures, "the decoded picture")
        return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def check_finite(self, values: Tensor, what: str) -> None:
        """Raise NotFiniteError for NaN or infinity."""
        if not bool(torch.isfinite(values).all()):
            narrow = "float16 may be too narrow: try --dtype bf16 or --dtype fp32"
            hint = narrow if self.dtype == torch.float16 else "the weights may be damaged: compare with another copy"
            raise NotFiniteError(f"{what}: NaN or infinity; {hint}")


def traced_text(name: str, text: Conditioning, count: int) -> dict[str, Tensor]:
    """A conditioning under its names in a dump, repeated for every picture."""
    named = {f"tokens.{encoder}": ids for encoder, ids in text.tokens.items()}
    named |= {"context": text.context.float(), "pooled": text.pooled.float()}
    return {f"{name}.{key}": t.expand(count, *t.shape[1:]).cpu().contiguous() for key, t in named.items()}


@contextmanager
def stage(name: str, seconds: dict[str, float], total: int) -> Iterator[tqdm]:
    """Time a stage into `seconds` and show its progress on a terminal."""
    start = time.perf_counter()
    with memory_errors(name), tqdm(total=total, desc=name, disable=None, leave=False) as bar:
        yield bar
    seconds[name] = time.perf_counter() - start


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn running out of device memory into a DeviceMemoryError that names the stage."""
    try:
        yield
    except torch.OutOfMemoryError:
        tries = "--t5 off, a smaller picture, a smaller --count, or --device cpu"
        raise DeviceMemoryError(f"{what}: the device's memory does not suffice; try {tries}") from None


@contextmanager
def exact_convolutions(dtype: torch.dtype) -> Iterator[None]:
    """Float32 convolutions in float32: cuDNN would round their inputs to TF32."""
    if dtype != torch.float32 or not torch.cuda.is_available():
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
