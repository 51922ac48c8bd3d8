"""Pictures and dumps onto the disk: named, with their settings inside, whole or not at all."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError

from mmdit.settings import Settings, SettingsError, user_path


def save_images(images: list[Image.Image], settings: Settings) -> Iterator[Path]:
    """Write each picture as PNG with its settings inside, where `settings.out` says; gives each path once written.

    An `out` that ends in .png is the file, replaced if it is there; with several pictures -1, -2, ... is added before
    the ending. Any other `out` is a folder, made if need be; in it the files are named after prompt and seed and an
    existing file is never replaced.
    """
    for i, image in enumerate(images):
        own = replace(settings, seed=settings.seed + i, count=1)
        path = picture_path(own, i, len(images))
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", parameters(own))
        info.add_text("mmdit", json.dumps(asdict(own), ensure_ascii=False))
        with whole_file(path) as partial:
            image.save(partial, format="PNG", pnginfo=info)
        yield path


def is_file(out: str) -> bool:
    return out.lower().endswith(".png")


def picture_path(settings: Settings, index: int, count: int) -> Path:
    out = Path(settings.out).expanduser()
    if is_file(settings.out):
        return out if count == 1 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")
    words = re.sub(r"[^a-z0-9]+", "-", settings.prompt.lower()).strip("-")[:60].rstrip("-") or "picture"
    stem, path, again = f"{words}-{settings.seed}", out / f"{words}-{settings.seed}.png", 2
    while path.exists():
        path, again = out / f"{stem}-{again}.png", again + 1
    return path


def parameters(settings: Settings) -> str:
    """The settings as the text that picture tools read from a PNG's `parameters` chunk.

    Prompt, negative prompt, then one line of `name: value` pairs (the form that AUTOMATIC1111's web UI introduced):
    first the names those tools know, then all other settings under their own.
    """
    known = {
        "Steps": settings.steps,
        "Sampler": "Euler",
        "CFG scale": settings.cfg,
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": Path(settings.model).name if settings.model else "demo",
    }
    told = ("prompt", "negative", "steps", "cfg", "seed", "width", "height", "model", "out", "dump", "count")
    own = {name: value for name, value in asdict(settings).items() if name not in told and value not in (None, ())}
    pairs = ", ".join(f"{name}: {quoted(value)}" for name, value in {**known, **own, "Version": engine()}.items())
    negative = f"\nNegative prompt: {settings.negative}" if settings.negative else ""
    return f"{settings.prompt}{negative}\n{pairs}"


def quoted(value: object) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def engine() -> str:
    try:
        return f"mmdit {version('mmdit')}"
    except PackageNotFoundError:
        return "mmdit"


def check_writable(settings: Settings) -> None:
    """Raise SettingsError, before any work is done, where `out` or `dump` cannot be written."""
    targets = {"out": user_path("out", settings.out)}
    if settings.dump is not None:
        if not settings.dump.endswith(".safetensors"):
            raise SettingsError(f"dump is {settings.dump!r}: expected a name ending in .safetensors")
        targets["dump"] = user_path("dump", settings.dump)
    for name, path in targets.items():
        file = name == "dump" or is_file(settings.out)
        if file and path.is_dir():
            raise SettingsError(f"{name}: {path} is a folder, expected a file's name")
        check_folder(name, path.parent if file else path)


def check_folder(name: str, folder: Path) -> None:
    """Make a folder if need be and try to write into it, leaving no trace."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingsError(f"{name}: cannot write into {folder}: {error.strerror or error}") from None
    finally:
        # A folder is made for good with its first file; a run that fails before leaves none.
        with suppress(OSError):
            for path in made:
                path.rmdir()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to; what stands there when all went well becomes `path`, else nothing remains.

    Raises SettingsError where the disk does not take it.
    """
    made = [p for p in path.parents if not p.exists()]
    partial = path.with_name(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()  # those that hold a file stay
