"""The stages of a picture, one by one: encode, noise, velocity, decode; and the memory that each is given.

An experiment calls them one by one, wraps the velocity, or takes another sampler. Calls take turns: whatever thread a
stage is called from, it has the networks for itself until it returns.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import RLock
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmdit.attention import attention_by
from mmdit.common.errors import SettingsError
from mmdit.control.rows import Control, added
from mmdit.driver import sampling
from mmdit.driver.focusing import steep
from mmdit.driver.loading import Parts, part_dtype
from mmdit.driver.reading import context_length, in_chunks, lengths_of
from mmdit.driver.remembered import Remembered
from mmdit.driver.settings import LOADED, Settings
from mmdit.kernels.process import Switch
from mmdit.maps import Seen
from mmdit.memory.budget import DeviceMemoryError, budget_of, memory_errors
from mmdit.memory.devices import unlock
from mmdit.memory.plan import Job, Plan
from mmdit.memory.planner import Planner
from mmdit.memory.residency import Residency, Role, of_role
from mmdit.model import MMDiT
from mmdit.prepared import Prepared, Row, look, predict
from samplers import (
    NEGATIVE,
    PROMPT,
    Ask,
    Moment,
    Velocity,
    classifier_free_guidance,
    combined,
    guided,
    unguided,
)
from samplers.noise import generator_of
from text_encoders import Conditioning, Prompt
from vae import Autoencoder, decode_in_strips, encode_in_strips
from weights.fingerprint import with_adapters

T = TypeVar("T")
Controls = Sequence[Sequence[Control]]  # of each row

# Whoever computes on the CPU: two at once would share its cores, and the precision of products is the process's.
_CPU = RLock()


class NotFiniteError(ValueError):
    """A stage gave NaN or infinity; the message names the stage and what to try."""


class Stages:
    """A loaded model's networks, what is on the device of them, and what they do."""

    def __init__(self, parts: Parts, settings: Settings) -> None:
        """settings: what loading fixed is read from it (`LOADED`).

        `plan` is what is on the device when, `ended_with` the plan that the last stage was done by; `turn` is held by
        whoever uses the networks.
        """
        networks = parts.networks
        self.transformer: MMDiT = networks["transformer"].module
        self.vae: Autoencoder = networks["vae"].module
        self.denoisers: list[Any] = [networks[name].module for name in of_role(Role.DENOISES, networks)]
        self.text, self.adapters = parts.text, parts.adapters
        self.defaults, self.shift, self.device, self.dtype = parts.defaults, parts.shift, parts.device, parts.dtype
        self.parts, self.settings = parts, settings
        self.residency, self.planner = Residency(networks), Planner(networks, self.device, self.dtype)
        self.turn = self.adapters.turn = _CPU if self.device.type == "cpu" else RLock()
        self._attention = "auto"  # that of the transformer as it was built
        self._inside, self._let_go = 0, False
        self.tiny = parts.tiny() if parts.tiny else None
        self.remembered: Remembered | None = None  # texts from run to run
        self._staged = 0  # stages of drawings that are on their way

    # ---- settings --------------------------------------------------------------------------------

    @property
    def actual(self) -> dict[str, Any]:
        """What "auto" came to, and the adapters that are in."""
        lora = self.adapters.settings
        weights = with_adapters(self.parts.fingerprint, self.adapters.contents)
        return {"device": self.device.type, "dtype": self.parts.dtype_name, "lora": lora, "weights": weights}

    def check(self, settings: Settings) -> Settings:
        """The settings with defaults filled in; raises SettingsError for what this model cannot do."""
        for name in LOADED:
            value, fixed = getattr(settings, name), getattr(self.settings, name)
            if value != fixed and value != self.actual.get(name, fixed):
                raise SettingsError(f"{name} is fixed when the model is loaded: give it to Pipeline.load")
        return self.parts.check(settings)

    # ---- memory ----------------------------------------------------------------------------------

    def job(self, s: Settings, **more: Any) -> Job:
        """What settings, all filled in, ask of the memory. more: fields of a Job that they do not tell."""
        assert s.width and s.height and s.steps and s.t5_length
        config, cell = self.transformer.config, self.vae.config.downscale
        rows, columns = s.height // cell, s.width // cell
        if config.largest is not None:  # a default may be more than the model can do
            rows, columns = (min(side, config.largest * config.patch_size) for side in (rows, columns))
        t5_length, chunks = lengths_of(s)
        context, t5_length = context_length(self.text, t5_length, chunks), 0 if s.t5 == "omit" else t5_length
        levels = len(sampling.levels_of(s, self.shift))
        job = Job(rows, columns, s.count, max(1, levels), len(sampling.prompts_of(s)), t5_length, context=context)
        job = job._replace(init=s.init is not None or bool(s.control), chunks=chunks, blank=int(s.emphasis))
        return job._replace(attention=s.attention, memory=s.memory, steep=steep(s), **more)

    def plan_for(self, job: Job) -> Plan:
        """The fastest plan that draws this within its budget; SettingsError where none does.

        On a CPU texts that wait take of the same memory; they are few, and what is left is more where that is needed.
        """
        budget, exact = self.budget(job.memory), job.memory != "auto"
        try:
            return self.planner.plan(job, budget, exact)
        except SettingsError:
            if not job.waiting:
                raise
        return self.planner.plan(job._replace(waiting=0), budget, exact)

    def budget(self, memory: str) -> int:
        """Bytes that it allows on the device."""
        return budget_of(memory, self.device)

    def follow(self, plan: Plan, job: Job) -> None:
        """Have on the device what the plan for this job says, or the next smaller one where memory runs out."""
        self.plan = plan
        self.again("loading", job, self.arrange)

    def arrange(self) -> None:
        with memory_errors("loading"):
            self.residency.arrange(self.plan.modes, self.plan.kept)

    def again(self, name: str, job: Job, work: Callable[[], T]) -> T:
        """What `work` gives; where memory runs out, take the next smaller plan and call it once again."""
        failures, mine = 0, self.plan  # a watcher may draw by another plan meanwhile
        while True:
            try:
                if failures:
                    self.arrange()
                result = work()
                self.ended_with = mine
                return result
            except DeviceMemoryError as error:
                failures, told = failures + 1, str(error)  # not the error itself: it holds all that the attempt made
            self.residency.use(None)
            self.residency.drop()  # it may have been the host's memory that ran out
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # libraries that ask the driver for memory see none of what PyTorch holds
            plan = self.planner.smaller(job, mine, name) if failures == 1 else None
            if plan is None:
                raise DeviceMemoryError(told)
            warnings.warn(f"{name}: memory ran out; trying again with less: {plan}", stacklevel=3)
            self.plan = mine = plan

    def stage(self, name: str, job: Job, seconds: dict[str, float], work: Callable[[], T]) -> T:
        """Add a stage's time to `seconds`; where memory runs out, `work` is called once `again`."""
        start = perf_counter()
        result = self.again(name, job, lambda: self.attempt(name, work))
        seconds[name] = seconds.get(name, 0.0) + perf_counter() - start
        return result

    def attempt(self, name: str, work: Callable[[], T]) -> T:
        self._staged += 1
        try:
            with memory_errors(name):
                return work()
        finally:
            self._staged -= 1

    @contextmanager
    def computing(self) -> Iterator[None]:
        """In turn, and with convolutions as exact as the number format."""
        exact = self.dtype == torch.float32 and torch.cuda.is_available()
        with self.turn, exact_convolutions if exact else nullcontext():
            self._inside += 1
            try:
                yield
            finally:
                self._inside -= 1
                if self._let_go and not self._inside:
                    self.let_go()

    def decided(self, stopped: bool, ended: bool) -> tuple[bool, bool]:
        """Whether a picture, and whether all are to stop, where watchers want so; several processes agree."""
        return stopped, ended

    def let_go(self) -> None:
        """Nothing is to be computed for now: networks that do not stay leave the device.

        Where this thread computes, which happens when an abandoned drawing is collected, they do so after it.
        """
        with self.turn:
            self._let_go = self._inside > 0
            if not self._let_go:
                self.residency.use(None)

    # ---- stages ----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, texts: Sequence[str | Prompt], t5_length: int, chunks: int = 1) -> Conditioning:
        """Texts to context `(B, n, context_size)` and pooled vectors `(B, pooled_size)`, in one pass.

        chunks: of CLIP's tokens, as `TextEncoder.encode` takes it.
        """
        some: list[Any] = list(texts)  # where a variant reads them, all are plain
        with self.computing():
            text = self.text.encode(some, t5_length, **in_chunks(chunks))
        clip = max((ids.shape[1] for name, ids in text.tokens.items() if name.startswith("clip")), default=0)
        self.check_finite(text.context[:, :clip], "CLIP's context")
        self.check_finite(text.context[:, clip:], "T5's context" if clip else "the text's context")
        self.check_finite(text.pooled, "CLIP's pooled vector" if clip else "the text's pooled vector")
        return text

    def noise(self, width: int, height: int, seeds: Iterable[int], rng: str = "cpu") -> Tensor:
        """The starting latents, float32 `(B, C, h, w)` on the device, drawn on the CPU so that all devices start alike.

        rng: "cuda" gives those that a CUDA device would draw.
        """
        config, cell = self.vae.config, self.vae.config.downscale
        shape = (config.latent_channels, height // cell, width // cell)
        return torch.stack([generator_of(seed, rng)(shape) for seed in seeds]).to(self.device)

    def prepare(
        self, texts: Sequence[Conditioning], sigmas: Iterable[float] = (), network: str = "transformer"
    ) -> Prepared:
        """Encoded texts, one after another, ready to be predicted with; sigmas: the noise levels to expect.

        network: the transformer, or a ControlNet.
        """
        module = self.parts.networks[network].module
        with self.computing():
            context = torch.cat([text.context for text in texts]).to(self.device, self.dtype)
            pooled = torch.cat([text.pooled for text in texts]).to(self.device, self.dtype)
            if network in self.parts.controls and (module.config.pooled_zeros or module.config.extra_channels):
                pooled = torch.zeros_like(pooled)
            self.residency.use(network)
            return Prepared(module, context, pooled, sigmas)

    def predict(
        self, latents: Tensor, rows: Sequence[Row], attention: str | None = None, controls: Controls = ()
    ) -> Tensor:
        """The network's velocity of latents `(R, C, h, w)`, each by its own text and noise level; float32 in and out.

        attention: who computes it, if not whoever was named when the model was loaded. controls: of each row.
        """
        with self.before_transformer(latents, attention) as x:
            return predict(x, rows, added(self.transformer, x, rows, controls)).float()

    def look(
        self, latents: Tensor, rows: Sequence[Row], attention: str | None = None, controls: Controls = ()
    ) -> tuple[Tensor, list[Seen | None]]:
        """The same, and what each row looks at (`mmdit.maps`)."""
        with self.before_transformer(latents, attention) as x:
            velocity, seen = look(x, rows, added(self.transformer, x, rows, controls))
            return velocity.float(), seen

    @contextmanager
    def before_transformer(self, latents: Tensor, attention: str | None) -> Iterator[Tensor]:
        """The latents as the transformer takes them, which is there meanwhile."""
        with self.computing():
            self.attend_by(attention or self.settings.attention)
            self.residency.use("transformer")
            yield latents.to(self.device, self.dtype)

    def attend_by(self, attention: str) -> None:
        if attention != self._attention:
            for module in self.denoisers:
                attention_by(module, attention)
            self._attention = attention

    def velocity(
        self,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        cfg: float = 1.0,
        count: int = 1,
        sigmas: Iterable[float] = (),
        interval: tuple[float, float] = (0.0, 1.0),
        attention: str | None = None,
    ) -> Velocity:
        """What a sampler integrates: a function of latents `(count, C, h, w)` and sigma, float32 in and out.

        cond, uncond: texts of batch 1 or `count`; without `uncond` there is no guidance. sigmas: the noise levels that
        the sampler will ask for, if they are known; they are prepared together. interval: the noise levels, least and
        greatest, at which there is guidance. attention: as in `predict`. Gradients with respect to the latents flow,
        except on a GPU while the transformer comes block by block.
        """
        texts = {PROMPT: cond} if uncond is None else {PROMPT: cond, NEGATIVE: uncond}
        prepared = self.prepare(list(texts.values()), sigmas)
        rows, first = {}, 0
        for name, text in texts.items():
            each = len(text.pooled)
            assert each in (1, count), f"{each} texts for {count} latents"
            rows[name] = [first + i * each // count for i in range(count)]
            first += each

        def evaluate(at: Moment, asks: tuple[Ask, ...]) -> Sequence[Tensor]:
            wanted = [Row(prepared, float(at.sigma), row) for ask in asks for row in rows[ask.text]]
            return self.predict(torch.cat([at.x] * len(asks)), wanted, attention).chunk(len(asks))

        return guided(evaluate, unguided if uncond is None else combined(classifier_free_guidance(cfg, interval)))

    # ---- pictures ----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_picture(self, pixels: Tensor) -> Tensor:
        """Pixels, uint8 `(B, H, W, 3)`, to latents, float32 `(B, C, h, w)` on the device: the mean of their Gaussian.

        H and W are multiples of 8, as the transformer needs them of 16.
        """
        values = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        if self.tiny is None or self.tiny.encoder is None or not self.settings.taesd_decode:
            return self.encode_values(values)
        with self.computing():
            values = values.to(self.device, part_dtype("vae", self.dtype))
            stages = self.plan.stages
            mean = self.tiny.encode_within(values, stages.get("init", stages["decode"]).working)
        self.check_finite(mean, "the latents of a picture that was given")
        return mean.float().contiguous()

    @torch.no_grad()
    def encode_values(self, values: Tensor) -> Tensor:
        """The same of numbers `(B, 3, H, W)`, which are from -1 to 1 but for some ControlNets."""
        with self.computing():
            self.residency.use("vae")
            values = values.to(self.device, part_dtype("vae", self.dtype))
            rows = self.plan.init_strip or values.shape[2]
            mean, _ = encode_in_strips(self.vae, values, rows, "cpu")
        self.check_finite(mean, "the latents of a picture that was given")
        return mean.float().contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor, truncated: bool = False) -> Tensor:
        """Latents `(B, C, h, w)` to pixels, uint8 `(B, H, W, 3)` on the CPU, rounded to the nearest level.

        truncated: to the level below, as some programs do.
        """
        with self.computing():
            latents = latents.to(self.device, part_dtype("vae", self.dtype))
            if self.tiny is not None and self.settings.taesd_decode:
                pictures = self.tiny.decode_within(latents, self.plan.stages["decode"].working).float()
            else:
                self.residency.use("vae")
                pin = self.plan.locked > 0
                pictures = self.decode_by(latents, self.plan.strip or latents.shape[2], pin).float()  # (B, 3, H, W)
                if pin and not self._staged:  # a drawing keeps the host's memory for its next one, and gives it back
                    unlock(self.device)
        self.check_finite(pictures, "the decoded picture")
        return as_pixels(pictures, truncated)

    def decode_by(self, latents: Tensor, rows: int, pin: bool) -> Tensor:
        """Pictures of latents, in strips of so many rows of theirs; pin: page-lock the host's memory."""
        return decode_in_strips(self.vae, latents, rows, "cpu", pin)

    def check_finite(self, values: Tensor, what: str) -> None:
        """Raise NotFiniteError for NaN or infinity."""
        if not bool(torch.isfinite(values).all()):
            raise self.not_finite(what)

    def not_finite(self, what: str) -> NotFiniteError:
        narrow = "float16 may be too narrow: try --dtype bf16 or --dtype fp32"
        hint = narrow if self.dtype == torch.float16 else "the weights may be damaged: compare with another copy"
        return NotFiniteError(f"{what}: NaN or infinity; {hint}")


def as_pixels(pictures: Tensor, truncated: bool = False) -> Tensor:
    """Pictures `(B, 3, H, W)` in [-1, 1], clamped, to uint8 `(B, H, W, 3)` on the CPU.

    Rounded to the nearest level; truncated: to the level below.
    """
    levels = (pictures.clamp(-1, 1) + 1) * 127.5
    return (levels.floor() if truncated else levels.round()).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _convolutions() -> tuple[Any, str, Any]:
    """Who has the switch for the precision of cuDNN's convolutions, its name, and its value for float32."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(conv, "fp32_precision"):
        return conv, "fp32_precision", "ieee"
    return torch.backends.cudnn, "allow_tf32", False  # before PyTorch 2.9


# Float32 convolutions in float32: cuDNN would round their inputs to TF32.
exact_convolutions = Switch(
    lambda: getattr(*_convolutions()[:2]), lambda value: setattr(*_convolutions()[:2], value), _convolutions()[2]
)
