"""The driver as Python sees it: a loaded model, and pictures from it.

    pipe = Pipeline.load("stable-diffusion-3.5-medium", device="cuda")
    pipe("a horse", seed=1)[0].save("horse.png")

Its stages can be called one by one as well (`mmdit.driver.stages`).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from PIL import Image
from torch import Tensor

from mmdit import inside
from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, marked
from mmdit.common.paths import split_scale
from mmdit.driver.attention import Attention, AttentionMaps, Place
from mmdit.driver.focusing import MAPS, found_in, tokens_of
from mmdit.driver.loading import Parts, load_parts
from mmdit.driver.loop import Arrivals, Drawing
from mmdit.driver.options import OF_THE_COMMAND
from mmdit.driver.preview import Glance
from mmdit.driver.repeat import settings_of_picture, without_levels
from mmdit.driver.settings import LOADED, Settings, alone, settings_from
from mmdit.driver.stages import NotFiniteError, Stages
from mmdit.driver.watch import OnStep, Stepped, Trace, Watcher
from mmdit.kernels.compiled import compile_model
from mmdit.kernels.onednn import by_onednn
from mmdit.memory.budget import DeviceMemoryError, memory_errors
from text_encoders import TokenizerError
from text_encoders.subjects import Found
from vae import keep_channels_last
from weights import CheckpointError

USER_ERRORS = (SettingsError, CheckpointError, TokenizerError, NotFiniteError, DeviceMemoryError)

OnEachStep = Callable[[Stepped], object]


@dataclass
class Result:
    """What a run leaves behind."""

    images: list[Image.Image]  # without those that a watcher stopped
    settings: Settings  # with every default filled in, device and dtype as they were
    seconds: dict[str, float]  # per stage


class Pipeline(Stages):
    """A loaded model, ready to draw, from any number of threads, which take turns. Build one with `Pipeline.load`.

    `adapters` adds more adapters, rescales them and takes them out; `plan` is what is on the device when.
    """

    def __init__(self, parts: Parts, settings: Settings, editable: bool = False) -> None:
        """settings: what loading fixed is read from it (`LOADED`). editable: as `load` takes it."""
        super().__init__(parts, settings)
        for path, scale in map(split_scale, settings.lora):
            self.adapters.add(path, scale)
        if editable:
            for network in parts.networks.values():
                network.settle()
        if self.device.type == "cpu":
            for module in self.denoisers:
                by_onednn(module)
        else:
            keep_channels_last(self.vae)
        if settings.compile:
            for module in self.denoisers:
                compile_model(module, self.device)
        job = self.job(settings.resolved(self.defaults))
        with self.turn:
            self.follow(self.plan_for(job), job)

    @classmethod
    def load(cls, model: str | Path | None = None, *, editable: bool = False, **keywords: Any) -> "Pipeline":
        """Load a diffusers folder, a single file or a model of the hub, or without an argument the demo model.

        keywords: `clip_l`, `clip_g`, `t5xxl`, `vae`, `tokenizers`, `lora`, `embedding` and `control` (lists), `device`,
        `dtype`, `t5`, `memory`, `quantise`, `compile`, as in Settings; without T5 its weights are not opened.

        editable: the weights lie in the modules as in any PyTorch program, all of them on the device: modules may be
        replaced, weights written to, parametrized or wrapped, and every picture drawn thereafter has it. Without it
        weights come and go, and what is put into their places meanwhile is refused; hooks work in either case.

        Raises one of USER_ERRORS, each a ValueError with a one-line message.
        """
        given = {name: str(v) if isinstance(v, Path) else v for name, v in {"model": model, **keywords}.items()}
        return cls.from_settings(settings_from(given), editable=editable)

    @classmethod
    def from_settings(cls, settings: Settings, parts: Parts | None = None, editable: bool = False) -> "Pipeline":
        """Load the model that a Settings names; what it says of the picture may change from call to call.

        parts: what `load_parts` found for these settings, where that was called before. editable: as in `load`.
        """
        with memory_errors("loading"):
            parts = parts or load_parts(settings)
            if editable:  # what it will have become when it draws, no hash tells
                name = f"edited-{uuid4()}"
                parts = parts._replace(fingerprint=name, weights=name)
            return cls(parts, settings, editable)

    def __call__(self, prompt: str, *, on_step: OnEachStep | None = None, **keywords: Any) -> list[Image.Image]:
        """Draw. keywords: all of Settings that loading does not fix, as negative, seed, steps, cfg, init and mask.

        on_step: called after each step of each picture with what is to be seen there
        (`mmdit.driver.watch.Stepped`); it may stop the picture, or all.

        Returns `count` pictures; picture i equals the single picture of seed + i within rounding. Raises one of
        USER_ERRORS.
        """
        return self.run(self.asked({"prompt": prompt, **keywords}), watchers=watching(on_step)).images

    def draw_many(
        self,
        pictures: Iterable[str | dict[str, Any] | Settings],
        *,
        on_step: OnEachStep | None = None,
        **keywords: Any,
    ) -> Iterator[tuple[Settings, Image.Image]]:
        """Draw a list: each a prompt, the keywords of a call as a dict, or a Settings.

        keywords: those of a call, for what an entry, other than a Settings, does not say. on_step: as in a call. Each
        distinct text is encoded once, and pictures that differ only in texts and seed are denoised together, as many
        as memory allows; each equals the single picture within rounding. Gives every picture as soon as it is done, in
        an order of its own, with its settings: all filled in, count 1. Raises one of USER_ERRORS, before anything is
        drawn for what cannot be asked for.
        """
        if isinstance(pictures, str | Mapping | Settings):
            raise SettingsError("draw_many takes a list: of prompts, of dicts or of Settings")
        asked: list[Any] = [{"prompt": entry} if isinstance(entry, str) else entry for entry in pictures]
        for entry in asked:
            if not isinstance(entry, Mapping | Settings):
                raise SettingsError(f"draw_many: {entry!r:.60}: expected a prompt, a dict or a Settings")
        every = [e if isinstance(e, Settings) else self.asked({**keywords, **e}) for e in asked]
        each = [s for some in map(self.check, every) for s in alone(some)]
        drawing = self.drawing(each, watching(on_step))
        return ((drawing.settings[i], image) for i, image in drawing)

    def drawing(
        self,
        pictures: Sequence[Settings],
        watchers: Sequence[Watcher] = (),
        seconds: dict[str, float] | None = None,
        arrivals: Arrivals | None = None,
    ) -> Drawing:
        """Pictures to be drawn, each with count 1 and as `check` returns it: iterate over it. Raises SettingsError.

        arrivals: others that join them (`mmdit.driver.loop`).
        """
        return Drawing(self, pictures, watchers, seconds, arrivals)

    def asked(self, keywords: dict[str, Any]) -> Settings:
        """What the keywords of a call ask for; SettingsError for an unknown one."""
        for name in keywords.keys() & set(OF_THE_COMMAND):
            raise SettingsError(f"{name} belongs to the command line: save the pictures that this returns")
        if "prompt" not in keywords:
            raise SettingsError(f"a picture without a prompt: {keywords}")
        return settings_from(keywords, self.settings)

    def repeat(self, path: str | Path, *, on_step: OnEachStep | None = None, **keywords: Any) -> list[Image.Image]:
        """Draw a picture again from what its file says of itself; keywords, those of a call, come first.

        What loading fixed (model, number format, ...) is that of this pipeline. A warning, on one line, tells what the
        file says beside that and was left out. Raises one of USER_ERRORS.
        """
        given, left_out = settings_of_picture(path)
        hashes = {name: given.pop(name, None) for name in marked(Settings, Mark.FOUND)}
        for name in LOADED:
            value = given.pop(name, getattr(self.settings, name))
            differs = value not in (getattr(self.settings, name), self.actual.get(name))
            if differs and name not in marked(Settings, Mark.PATH):
                left_out.append(f"{name} {value}")
        settings = replace(self.asked({**without_levels(given, keywords), **keywords}), size=hashes["size"])
        if hashes["weights"] not in (None, self.actual["weights"]):
            left_out.append("other weights")
        if left_out:
            warnings.warn(f"{path}: left out: {', '.join(left_out)}", stacklevel=2)
        return self.run(settings, watchers=watching(on_step)).images

    # ---- looking inside the transformer ------------------------------------------------------------

    def capture(self, what: Sequence[str] = ("x",), **more: Any) -> AbstractContextManager[inside.Seen]:
        """Keep what its blocks compute meanwhile; `mmdit.inside.capture` says what and how."""
        return inside.capture(self.transformer, what, **more)

    def ablate(self, part: str, **more: Any) -> AbstractContextManager[None]:
        """Have one of its parts return something else meanwhile; `mmdit.inside.ablate` says what."""
        return inside.ablate(self.transformer, part, **more)

    def patch(self, seen: inside.Seen, name: str, blocks: Sequence[int], **more: Any) -> AbstractContextManager[None]:
        """Have blocks return what another run had there; see `mmdit.inside.patch`."""
        return inside.patch(self.transformer, seen, name, blocks, **more)

    def found(self, prompt: str, subjects: str, **keywords: Any) -> list[Found]:
        """Where the words of subjects, as `"horse; bear"`, are in the prompt's context: their tokens by number.

        keywords: those of a call. With them `capture(("attention",), words=...)` has every head of every block and
        step. Raises SettingsError for words that are not there.
        """
        s = self.check(self.asked({"prompt": prompt, **keywords, "attention_maps": subjects}))
        return found_in(s, self.text)[MAPS]

    def attention_maps(
        self, prompt: str, subjects: str, *, on_step: OnEachStep | None = None, **keywords: Any
    ) -> list[AttentionMaps]:
        """Draw, and keep where each picture attends to the words of each subject, by step and block.

        subjects: as `"horse; bear"`, each in the prompt; `horse#2` is its second horse. on_step, keywords: those of a
        call. Raises one of USER_ERRORS.
        """
        seen, asked = Attention(), self.asked({"prompt": prompt, **keywords, "attention_maps": subjects})
        self.run(asked, watchers=[seen, *watching(on_step)])
        return [seen.done[i] for i in sorted(seen.done)]

    def attention_at(self, prompt: str, x: int, y: int, **keywords: Any) -> Place:
        """Draw one picture, and keep what the place at these pixels attends to: words, and the rest of the picture.

        keywords: those of a call, but for count, focus, upscale and mask_crop. A solver that asks twice a step has two
        steps here for each. Raises one of USER_ERRORS.
        """
        s = replace(self.check(self.asked({"prompt": prompt, **keywords})), count=1)
        assert s.width and s.height
        for name in ("focus", "upscale", "mask_crop"):
            if getattr(s, name) is not None:
                raise SettingsError(f"attention_at: {name} is given: expected a picture without it")
        if not (0 <= x < s.width and 0 <= y < s.height):
            raise SettingsError(f"attention_at: {x}, {y} is not in the picture of {s.width}x{s.height}")
        side = self.transformer.config.patch_size * self.vae.config.downscale
        rows, columns = s.height // side, s.width // side
        with self.capture(("attention",), patches=[y // side * columns + x // side]) as seen:
            image = self.run(s).images[0]
        steps = max(step for step, _ in seen["patches"]) + 1
        depth = self.transformer.config.depth
        shares = [
            torch.stack([seen["patches"][i, block][0].mean((0, 1)) for block in range(depth)]) for i in range(steps)
        ]
        every = torch.stack(shares).mean(1)  # (steps, M + N)
        text, picture = every.split([every.shape[1] - rows * columns, rows * columns], dim=1)
        words = {
            encoder: [(piece, float(text[:, column].mean())) for piece, column in places]
            for encoder, places in tokens_of(s, self.text).items()
        }
        return Place(image, words, text, picture.unflatten(1, (rows, columns)))

    @cached_property
    def preview(self) -> Glance:
        """What makes a quick picture of latents `(1, C, h, w)`, such as the `denoised` that `on_step` sees.

        By TAESD where it was loaded, else of the mean colour of each cell.
        """
        return Glance(self)

    def run(
        self, settings: Settings, trace: dict[str, Tensor] | None = None, watchers: Sequence[Watcher] = ()
    ) -> Result:
        """Draw by a Settings. trace: filled with every stage's tensors where given (the names of `--dump`)."""
        checked, seconds = self.check(settings), dict[str, float]()
        seen = [] if trace is None else [Trace()]
        images = dict(self.drawing(alone(checked), [*seen, *watchers], seconds))
        if trace is not None:
            trace.update(seen[0].tensors)
        return Result([images[i] for i in sorted(images)], replace(checked, **self.actual), seconds)


def watching(on_step: OnEachStep | None) -> list[Watcher]:
    return [] if on_step is None else [OnStep(on_step)]
