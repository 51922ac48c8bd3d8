"""The settings of a run: one dataclass names them for the command line, the Python keywords and the metadata."""

import difflib
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

from mmdit.config import MMDiTConfig
from mmdit.errors import SettingsError
from mmdit.memory.options import memory_bytes


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


ATTENTIONS = ("auto", "sdpa", "cores", "flash", "xformers", "cudnn", "math")  # those of mmdit.attention


@dataclass(frozen=True)
class Settings:
    """Everything a picture depends on, and where it goes. None stands for the model's own default."""

    prompt: str = _setting("", "what to draw")
    negative: str = _setting("", "what to steer away from", metavar="TEXT")
    model: str | None = _setting(
        None, "diffusers folder, .safetensors or .gguf file, or Hugging Face id (default: the demo model)",
        metavar="FOLDER|FILE|ID",
    )  # fmt: skip
    clip_l: str | None = _setting(None, "CLIP-L from this file, not the model's", metavar="FILE")
    clip_g: str | None = _setting(None, "CLIP-G from this file, not the model's", metavar="FILE")
    t5xxl: str | None = _setting(None, "T5 from this file, not the model's", metavar="FILE")
    vae: str | None = _setting(None, "autoencoder from this file, not the model's", metavar="FILE")
    tokenizers: str | None = _setting(
        None, "folder with tokenizer/, tokenizer_2/, tokenizer_3/, for a single file", metavar="FOLDER"
    )
    lora: tuple[str, ...] = _setting(
        (), "adapter to merge, a file or a folder, with its strength (default 1); repeat it for more",
        metavar="FILE|FOLDER[:SCALE]",
    )  # fmt: skip
    width: int | None = _setting(None, "picture width in pixels (default: the model's own)", metavar="W")
    height: int | None = _setting(None, "picture height in pixels (default: the model's own)", metavar="H")
    steps: int | None = _setting(None, "denoising steps (default: the model's own)", metavar="N")
    cfg: float | None = _setting(
        None, "guidance scale; 1 is without guidance, at half the cost (default: the model's own)", metavar="X"
    )
    cfg_interval: str | None = _setting(
        None, "guide only where the share of noise lies between these, as 0.2:0.9; the other steps cost half",
        metavar="LOW:HIGH",
    )  # fmt: skip
    seed: int = _setting(0, "seed of the first picture; picture i has seed S + i", metavar="S")
    count: int = _setting(1, "number of pictures", metavar="N")
    t5: str = _setting(
        "on", "off: zeros in place of T5's tokens (as diffusers); omit: no such tokens (as ComfyUI)",
        choices=("on", "off", "omit"),
    )  # fmt: skip
    t5_length: int | None = _setting(None, "tokens that T5 reads, 2 to 512 (default: the model's own)", metavar="N")
    dtype: str = _setting("auto", "number format of the weights", choices=("auto", "bf16", "fp16", "fp32"))
    quantise: str = _setting(
        "none",
        "the transformer's blocks in 8 bits: half their memory, another picture",
        choices=("none", "int8", "fp8"),
    )
    device: str = _setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    memory: str = _setting(
        "auto", "what tensors may take on the device, as 4GB; auto: most of what is free", metavar="SIZE"
    )
    attention: str = _setting("auto", "who computes attention; auto: the fastest that is there", choices=ATTENTIONS)
    compile: bool = _setting(False, "compile the transformer: the first steps wait, later ones and other runs gain")
    out: str = _setting("out", "PNG file, or folder for files named after prompt and seed", metavar="FILE|FOLDER")
    prompts: str | None = _setting(
        None, "draw a list: a prompt a line, or JSON lines with any setting of a picture; what is there is skipped",
        metavar="FILE",
    )  # fmt: skip
    dump: str | None = _setting(None, "write every stage's tensors into this file", metavar="FILE.safetensors")

    def __post_init__(self) -> None:
        given = self.lora or ()
        object.__setattr__(self, "lora", (given,) if isinstance(given, str) else tuple(map(str, given)))

    def resolved(self, defaults: dict[str, Any]) -> "Settings":
        """With the model's `defaults`, then SD3.5-Medium's, in place of None; the result is checked.

        Raises SettingsError.
        """
        known = {**SD35_MEDIUM_DEFAULTS, **defaults}
        missing = {name: value for name, value in known.items() if getattr(self, name) is None}
        settings = replace(self, **missing)
        settings.check()
        return settings

    def check(self) -> None:
        """Raise SettingsError for what no model could do."""
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices:
                raise SettingsError(f"{f.name} is {value!r}: expected one of {', '.join(choices)}")
        needed = {name: getattr(self, name) for name in ("prompt", "negative", "memory", "out")}
        files = ("model", "clip_l", "clip_g", "t5xxl", "vae", "tokenizers", "prompts", "dump")
        given = {name: value for name in files if (value := getattr(self, name)) is not None}
        for name, value in (*needed.items(), *given.items(), *(("lora", text) for text in self.lora)):
            if not isinstance(value, str):
                raise SettingsError(f"{name} is {value!r}: expected text")
            if any(0xD800 <= ord(c) <= 0xDFFF for c in value):
                raise SettingsError(f"{name} is {value!a}: not valid Unicode")
        for text in self.lora:
            split_lora(text)
        interval_of(self.cfg_interval)
        memory_bytes(self.memory)
        if not isinstance(self.compile, bool):
            raise SettingsError(f"compile is {self.compile!r}: expected True or False")
        for name in ("steps", "count", "width", "height"):
            value = getattr(self, name)
            if not whole(value) or value < 1:
                raise SettingsError(f"{name} is {value!r}: expected a whole number from 1")
        if not whole(self.t5_length) or not 2 <= self.t5_length <= 512:
            raise SettingsError(f"t5_length is {self.t5_length!r}: expected 2 to 512; 77, 154, 256 and 512 are usual")
        if isinstance(self.cfg, bool) or not isinstance(self.cfg, int | float) or not math.isfinite(self.cfg):
            raise SettingsError(f"cfg is {self.cfg!r}: expected a number, 1 for no guidance")
        if not whole(self.seed) or not -(2**63) <= self.seed <= 2**64 - self.count:
            raise SettingsError(f"seed is {self.seed!r}: expected a whole number of at most 64 bits")


def alone(settings: Settings) -> list[Settings]:
    """The settings of each of its `count` pictures."""
    return [replace(settings, seed=settings.seed + i, count=1) for i in range(settings.count)]


def user_path(name: str, text: str) -> Path:
    """A path as the user wrote it, `~` filled in; SettingsError where it cannot be looked at."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise SettingsError(f"{name}: {text}: {getattr(error, 'strerror', None) or error}") from None
    return path


def split_lora(text: str) -> tuple[str, float]:
    """What `lora` names, FILE_OR_FOLDER[:SCALE], as path and scale; SettingsError for a scale that is no number.

    A path that exists as it stands has no scale at its end.
    """
    path, colon, number = text.rpartition(":")
    if not colon or user_path("lora", text).exists():
        return text, 1.0
    try:
        scale = float(number)
    except ValueError:
        if not user_path("lora", path).exists():
            return text, 1.0  # a colon inside the path, not before a scale
        scale = math.nan
    if not path or not math.isfinite(scale):
        raise SettingsError(
            f"lora is {text!r}: expected FILE_OR_FOLDER:SCALE with a number, as in style.safetensors:0.8"
        )
    return path, scale


def interval_of(text: str | None) -> tuple[float, float]:
    """What `cfg_interval` names, LOW:HIGH, as two shares of noise; SettingsError for what is none, None for all."""
    if text is None:
        return 0.0, 1.0
    try:
        low, high = map(float, text.split(":"))
    except (AttributeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise SettingsError(f"cfg_interval is {text!r}: expected LOW:HIGH, shares of noise from 0 to 1, as in 0.2:0.9")
    return low, high


def whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


# What was given to loading and cannot change between two pictures.
_MODEL = ("model", "clip_l", "clip_g", "t5xxl", "vae", "tokenizers", "lora", "t5")
LOADED = (*_MODEL, "dtype", "quantise", "device", "compile")

SD35_MEDIUM_DEFAULTS: dict[str, Any] = {
    "width": 1024,
    "height": 1024,
    "steps": 28,
    "cfg": 4.5,
    "t5_length": 256,
}


def check_defaults(defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """A model's own defaults, as its folder brings them; raises SettingsError for what may not be there."""
    for name, value in defaults.items():
        if name not in SD35_MEDIUM_DEFAULTS or isinstance(value, bool) or not isinstance(value, int | float):
            allowed = ", ".join(SD35_MEDIUM_DEFAULTS)
            raise SettingsError(
                f"{where}: {name!r:.60}: {value!r:.60} is not a default: expected numbers for {allowed}"
            )
    try:
        Settings().resolved(defaults)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from None
    return defaults


def check_size(settings: Settings, config: MMDiTConfig, downscale: int) -> None:
    """Raise SettingsError where a side, if given, is not made of whole patches or leaves the table of positions.

    downscale: picture pixels per latent cell along a side.
    """
    multiple = config.patch_size * downscale
    largest = config.pos_embed_max_size * multiple
    for name in ("width", "height"):
        side = getattr(settings, name)
        if side is None:
            continue
        if side > largest:
            raise SettingsError(f"{name} {side} is more than the model's table of positions allows: {largest} at most")
        if side % multiple:
            below, above = side // multiple * multiple, (side // multiple + 1) * multiple
            nearest = " or ".join(str(s) for s in (below, above) if 0 < s <= largest)
            raise SettingsError(f"{name} {side} is not a multiple of {multiple}: the nearest are {nearest}")


def settings_from(keywords: dict[str, Any], base: Settings = Settings()) -> Settings:
    """`base` with Python keywords in place; SettingsError for an unknown one, with the name that may be meant."""
    names = [f.name for f in fields(Settings)]
    for name in keywords:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise SettingsError(f"no setting {name!r}: {hint}")
    return replace(base, **keywords)
