"""The driver: text encoders, sampler, transformer and autoencoder in a row, prompt to pictures.

This is the one place that knows all the parts. Each stage is a method of plain arguments (`encode`, `noise`,
`velocity`, `decode`), and `run` puts them in a row: an experiment calls them one by one, wraps the velocity, or takes
another sampler.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mmdit.attention import attention_by
from mmdit.driver.batch import Drawing
from mmdit.driver.fingerprint import with_adapters
from mmdit.driver.loading import Parts, check_there, load_parts, part_dtype
from mmdit.driver.settings import LOADED, Settings, alone, interval_of, settings_from, split_lora
from mmdit.errors import SettingsError
from mmdit.kernels.compiled import compile_model
from mmdit.kernels.onednn import by_onednn
from mmdit.memory.plan import DeviceMemoryError, Job, Plan, Planner, budget_of, memory_errors
from mmdit.memory.residency import Residency
from mmdit.model import MMDiT
from mmdit.prepared import Prepared
from samplers import Step, classifier_free_guidance, euler, shifted_sigmas
from samplers.guidance import Velocity
from text_encoders import Conditioning, TokenizerError
from vae import Autoencoder, decode_in_strips
from weights import CheckpointError

T = TypeVar("T")
_ASKED = 8  # steps of a GPU that are asked about at a time


class NotFiniteError(ValueError):
    """A stage gave NaN or infinity; the message names the stage and what to try."""


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

        `adapters` adds more adapters, rescales them and takes them out; `plan` is what is on the device when.
        """
        networks = parts.networks
        self.transformer: MMDiT = networks["transformer"].module
        self.vae: Autoencoder = networks["vae"].module
        self.text = parts.text
        self.defaults, self.shift, self.device, self.dtype = parts.defaults, parts.shift, parts.device, parts.dtype
        self.parts, self.settings, self.adapters = parts, settings, parts.adapters
        self.residency, self.planner = Residency(networks), Planner(networks, self.device, self.dtype)
        for path, scale in map(split_lora, settings.lora):
            self.adapters.add(path, scale)
        if self.device.type == "cpu":
            by_onednn(self.transformer)
        if settings.compile:
            compile_model(self.transformer, self.device)
        settings = settings.resolved(self.defaults)
        self.follow(self.plan_for(settings), self.job(settings))

    @classmethod
    def load(cls, model: str | Path | None = None, **keywords: Any) -> "Pipeline":
        """Load a diffusers folder, a single file or a model of the hub, or without an argument the demo model.

        keywords: `clip_l`, `clip_g`, `t5xxl`, `vae`, `tokenizers`, `lora` (a list), `device`, `dtype`, `t5`, `memory`,
        `quantise`, `compile`, as in Settings; without T5 its weights are not opened. Raises one of USER_ERRORS, each a
        ValueError with a one-line message.
        """
        given = {name: str(v) if isinstance(v, Path) else v for name, v in {"model": model, **keywords}.items()}
        return cls.from_settings(settings_from(given))

    @classmethod
    def from_settings(cls, settings: Settings, parts: Parts | None = None) -> "Pipeline":
        """Load the model that a Settings names; what it says of the picture may change from call to call.

        parts: what `load_parts` found for these settings, where that was called before.
        """
        with memory_errors("loading"):
            return cls(parts or load_parts(settings), settings)

    def __call__(self, prompt: str, **keywords: Any) -> list[Image.Image]:
        """Draw. keywords: negative, width, height, steps, cfg, cfg_interval, seed, count, t5_length, memory, attention.

        They are as in Settings.

        Returns `count` pictures; picture i equals the single picture of seed + i within rounding. Raises one of
        USER_ERRORS.
        """
        return self.run(self.asked({"prompt": prompt, **keywords})).images

    def draw_many(
        self, pictures: Iterable[str | dict[str, Any] | Settings], **keywords: Any
    ) -> Iterator[tuple[Settings, Image.Image]]:
        """Draw a list: each a prompt, the keywords of a call as a dict, or a Settings.

        keywords: those of a call, for what an entry, other than a Settings, does not say. Each distinct text is
        encoded once, and pictures of equal size, steps and cfg are denoised together, as many as memory allows; each
        equals the single picture within rounding. Gives every picture as soon as it is done, in an order of its own,
        with its settings: all filled in, count 1. Raises one of USER_ERRORS, before anything is drawn for what cannot
        be asked for.
        """
        asked = [{"prompt": entry} if isinstance(entry, str) else entry for entry in pictures]
        every = [e if isinstance(e, Settings) else self.asked({**keywords, **e}) for e in asked]
        each = [s for some in map(self.check, every) for s in alone(some)]
        drawing = Drawing(self, each)
        return ((replace(each[i], **self.actual), image) for i, image in drawing)

    def asked(self, keywords: dict[str, Any]) -> Settings:
        """What the keywords of a call ask for; SettingsError for an unknown one."""
        for name in {"out", "prompts", "dump"} & keywords.keys():
            raise SettingsError(f"{name} belongs to the command line: save the pictures that this returns")
        if "prompt" not in keywords:
            raise SettingsError(f"a picture without a prompt: {keywords}")
        return settings_from(keywords, self.settings)

    @torch.no_grad()
    def run(self, settings: Settings, trace: dict[str, Tensor] | None = None) -> Result:
        """Draw by a Settings. trace: filled with every stage's tensors where given (the names of `--dump`)."""
        s, seconds = self.check(settings), {}
        assert s.width and s.height and s.steps and s.t5_length and s.cfg is not None
        steps, cfg, t5_length = s.steps, s.cfg, s.t5_length
        job = self.job(s)
        self.follow(self.plan_for(s), job)
        texts = [s.prompt] if cfg == 1 else [s.prompt, s.negative]
        noise = self.noise(s.width, s.height, range(s.seed, s.seed + s.count))
        sigmas = shifted_sigmas(steps, self.shift)

        def encode(bar: tqdm) -> Conditioning:
            bar.total = 1
            return self.encode(texts, t5_length)

        def denoise(bar: tqdm) -> Tensor:
            parts = noise.split(self.plan.batch)
            bar.total, ends, made = steps * len(parts), [], {}
            for i, x in enumerate(parts):
                watch, known = Watch(self, bar, steps, trace, first=i == 0), sigmas[:-1].tolist()
                if len(x) not in made:  # once for all batches but a shorter last one
                    made.clear()
                    made[len(x)] = self.velocity(cond, uncond, cfg, len(x), known, interval_of(s.cfg_interval))
                with attention_by(s.attention):
                    ends.append(euler(made[len(x)], x.to(self.device), sigmas, watch))
            return torch.cat(ends)

        def decode(bar: tqdm) -> Tensor:
            bar.total, pictures = s.count, []
            for latent in latents.split(1):
                pictures.append(self.decode(latent))
                bar.update()
            return torch.cat(pictures)

        encoded = self.stage("encode", job, seconds, encode)
        cond, uncond = encoded[:1], encoded[1:] if cfg != 1 else None
        latents = self.stage("denoise", job, seconds, denoise)
        pixels = self.stage("decode", job, seconds, decode)  # (B, H, W, 3)
        self.residency.use(None)
        if trace is not None:
            trace.update(sigmas=sigmas, noise=noise, image=pixels, **traced_text("cond", cond, s.count))
            trace.update(traced_text("uncond", uncond, s.count) if uncond else {})
        images = [Image.fromarray(picture.numpy()) for picture in pixels]
        return Result(images, replace(s, **self.actual), seconds)

    # ---- memory ----------------------------------------------------------------------------------

    def plan_for(self, s: Settings) -> Plan:
        """The fastest plan that draws by these settings within their `memory`; SettingsError where none does."""
        with attention_by(s.attention):
            return self.planner.plan(self.job(s), budget_of(s.memory, self.device), exact=s.memory != "auto")

    def job(self, s: Settings) -> Job:
        assert s.width and s.height and s.steps and s.t5_length
        config, cell = self.transformer.config, self.vae.config.downscale
        largest = config.pos_embed_max_size * config.patch_size  # a default may be more than the model can do
        rows, columns = (min(side // cell, largest) for side in (s.height, s.width))
        return Job(rows, columns, s.count, s.steps, 1 if s.cfg == 1 else 2, 0 if s.t5 == "omit" else s.t5_length)

    def follow(self, plan: Plan, job: Job) -> None:
        """Have on the device what the plan for this job says, or the next smaller one where memory runs out."""
        self.plan = plan
        self.again("loading", job, self.arrange)

    def arrange(self) -> None:
        with memory_errors("loading"):
            self.residency.arrange(self.plan.modes, self.plan.kept)

    def again(self, name: str, job: Job, work: Callable[[], T]) -> T:
        """What `work` gives; where memory runs out, take the next smaller plan and begin it once again."""
        failures = 0
        while True:
            try:
                if failures:
                    self.arrange()
                return work()
            except DeviceMemoryError as error:
                failures, told = failures + 1, str(error)  # not the error itself: it holds all that the attempt made
            self.residency.use(None)
            self.residency.drop()  # it may have been the host's memory that ran out
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # libraries that ask the driver for memory see none of what PyTorch holds
            plan = self.planner.smaller(job, self.plan, name) if failures == 1 else None
            if plan is None:
                raise DeviceMemoryError(told)
            warnings.warn(f"{name}: memory ran out; trying again with less: {plan}", stacklevel=3)
            self.plan = plan

    def stage(
        self, name: str, job: Job, seconds: dict[str, float], work: Callable[[tqdm], T], bar: tqdm | None = None
    ) -> T:
        """Add a stage's time to `seconds`; where memory runs out, it is begun once `again`.

        bar: what `work` is given, in place of a bar of its own.
        """
        start = time.perf_counter()
        result = self.again(name, job, lambda: self.attempt(name, work, bar))
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    def attempt(self, name: str, work: Callable[[tqdm], T], bar: tqdm | None) -> T:
        shown = tqdm(desc=name, disable=None, leave=False) if bar is None else nullcontext(bar)
        with memory_errors(name), exact_convolutions(self.dtype), shown as own:
            return work(own)

    # ---- stages ----------------------------------------------------------------------------------

    @property
    def actual(self) -> dict[str, Any]:
        """What "auto" came to, and the adapters that are in."""
        lora = self.adapters.settings
        weights = with_adapters(self.parts.fingerprint, lora)
        return {"device": self.device.type, "dtype": self.parts.dtype_name, "lora": lora, "weights": weights}

    def check(self, settings: Settings) -> Settings:
        """The settings with defaults filled in; raises SettingsError for what this model cannot do."""
        for name in LOADED:
            value, fixed = getattr(settings, name), getattr(self.settings, name)
            if value != fixed and value != self.actual.get(name, fixed):
                raise SettingsError(f"{name} is fixed when the model is loaded: give it to Pipeline.load")
        settings = self.parts.check(settings)
        check_there(settings, self.device, self.dtype)
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
        self,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        cfg: float = 1.0,
        count: int = 1,
        sigmas: Iterable[float] = (),
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Velocity:
        """What a sampler integrates: a function of latents `(count, C, h, w)` and sigma, float32 in and out.

        cond, uncond: texts of batch 1 or `count`; without `uncond` there is no guidance. sigmas: the noise levels that
        the sampler will ask for, if they are known; they are prepared together. interval: the noise levels, least and
        greatest, at which there is guidance. Gradients with respect to the latents flow, except on a GPU while the
        transformer comes block by block.
        """
        texts = (cond,) if uncond is None else (cond, uncond)
        rows = max(len(t.pooled) for t in texts)
        context = torch.cat([t.context.expand(rows, -1, -1) for t in texts]).to(self.device, self.dtype)
        pooled = torch.cat([t.pooled.expand(rows, -1) for t in texts]).to(self.device, self.dtype)
        self.residency.use("transformer")
        prepared = Prepared(self.transformer, context, pooled, count // rows, sigmas)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            self.residency.use("transformer")
            return prepared(x.to(self.dtype), sigma).float()

        return velocity if uncond is None else classifier_free_guidance(velocity, cfg, interval)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(B, C, h, w)` to pixels, uint8 `(B, H, W, 3)` on the CPU, rounded to the nearest level."""
        self.residency.use("vae")
        latents = latents.to(self.device, part_dtype("vae", self.dtype))
        rows = self.plan.strip or latents.shape[2]
        pictures = decode_in_strips(self.vae, latents, rows, "cpu").float()  # (B, 3, H, W)
        self.check_finite(pictures, "the decoded picture")
        return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def check_finite(self, values: Tensor, what: str) -> None:
        """Raise NotFiniteError for NaN or infinity."""
        if not bool(torch.isfinite(values).all()):
            raise self.not_finite(what)

    def not_finite(self, what: str) -> NotFiniteError:
        narrow = "float16 may be too narrow: try --dtype bf16 or --dtype fp32"
        hint = narrow if self.dtype == torch.float16 else "the weights may be damaged: compare with another copy"
        return NotFiniteError(f"{what}: NaN or infinity; {hint}")

    def finite_steps(self, steps: int) -> Callable[[Step], None]:
        """A sampler's callback for so many steps: raises NotFiniteError that names the first whose latents are not.

        A GPU is asked about several steps at a time: waiting for an answer leaves it without work.
        """
        flags: list[Tensor] = []

        def watch(step: Step) -> None:
            flags.append(torch.isfinite(step.x).all())
            if len(flags) == (1 if self.device.type == "cpu" else _ASKED) or step.index + 1 == steps:
                finite = torch.stack(flags).tolist()
                flags.clear()
                if not all(finite):
                    first = step.index + 2 - len(finite) + finite.index(False)
                    raise self.not_finite(f"the latents after step {first} of {steps}")

        return watch


class Watch:
    """What is looked at after each step: are the numbers finite; and the trace, if there is one, batch by batch."""

    def __init__(self, pipe: Pipeline, bar: tqdm, steps: int, trace: dict[str, Tensor] | None, first: bool) -> None:
        self.bar, self.trace, self.first = bar, trace, first
        self.check = pipe.finite_steps(steps)

    def __call__(self, step: Step) -> None:
        self.check(step)
        seen = {f"velocity.{step.index}": step.velocity, f"latents.{step.index}": step.x}
        if self.trace is not None:
            for name, values in seen.items():
                before = [] if self.first else [self.trace[name]]
                self.trace[name] = torch.cat([*before, values.cpu()])
        self.bar.update()


def traced_text(name: str, text: Conditioning, count: int) -> dict[str, Tensor]:
    """A conditioning under its names in a dump, repeated for every picture."""
    named = {f"tokens.{encoder}": ids for encoder, ids in text.tokens.items()}
    named |= {"context": text.context.float(), "pooled": text.pooled.float()}
    return {f"{name}.{key}": t.expand(count, *t.shape[1:]).cpu().contiguous() for key, t in named.items()}


@contextmanager
def exact_convolutions(dtype: torch.dtype) -> Iterator[None]:
    """Float32 convolutions in float32: cuDNN would round their inputs to TF32."""
    if dtype != torch.float32 or not torch.cuda.is_available():
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
