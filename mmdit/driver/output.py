"""Pictures and dumps onto the disk: named, with their settings inside, whole or not at all."""

import json
import os
import platform
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError

from mmdit.driver.settings import Settings, user_path
from mmdit.errors import SettingsError

_END = b"\0\0\0\0IEND\xaeB`\x82"  # of every PNG file
_BEHIND = 16  # pictures that may wait to be written


def save_images(images: list[Image.Image], settings: Settings) -> Iterator[Path]:
    """Write each picture as PNG with its settings inside, where `settings.out` says; gives each path once written.

    An `out` that ends in .png is the file, replaced if it is there; with several pictures -1, -2, ... is added before
    the ending. Any other `out` is a folder, made if need be; in it the files are named after prompt and seed and an
    existing file is never replaced.
    """
    for i, image in enumerate(images):
        own = replace(settings, seed=settings.seed + i, count=1)
        path = picture_path(own, i, len(images))
        save_image(image, own, path)
        yield path


def save_image(image: Image.Image, settings: Settings, path: Path) -> None:
    """Write one picture with its own settings inside; SettingsError where the disk does not take it."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters(settings))
    info.add_text("mmdit", json.dumps(asdict(settings), ensure_ascii=False))
    with whole_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def settings_in(path: Path) -> Settings | None:
    """What a picture was drawn by; None where the file is no picture of this program, or not a whole one."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            if file.read() != _END:
                return None
        with Image.open(path) as image:
            settings = Settings(**json.loads(image.info["mmdit"]))
        settings.check()
        return settings
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


class Saver:
    """Writes pictures in a thread of its own, while others are drawn; used as a context, whose end waits for all.

    waited: seconds that pictures had to wait to be taken, and the end for the last to be written.
    """

    def __init__(self, written: Callable[[Path], object]) -> None:
        """written: called, in the thread, with the path of each picture once it is there."""
        self.waited, self._written = 0.0, written
        self._thread, self._jobs = ThreadPoolExecutor(1, thread_name_prefix="save"), deque[Future[None]]()

    def __call__(self, image: Image.Image, settings: Settings, path: Path) -> None:
        """Have it written; where the thread is far behind, wait. Raises what went wrong with an earlier one."""
        self._wait(most=_BEHIND)
        self._jobs.append(self._thread.submit(self._save, image, settings, path))

    def _save(self, image: Image.Image, settings: Settings, path: Path) -> None:
        if not is_file(settings.out) and path.exists():
            path = picture_path(settings)  # somebody else was faster
        save_image(image, settings, path)
        self._written(path)

    def _wait(self, most: int) -> None:
        start = time.perf_counter()
        while self._jobs and (len(self._jobs) > most or self._jobs[0].done()):
            self._jobs.popleft().result()
        self.waited += time.perf_counter() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        # Pictures that are done are written also where drawing the next was broken off.
        try:
            if failed is None:
                self._wait(most=0)
        finally:
            self._thread.shutdown()


def is_file(out: str) -> bool:
    return out.lower().endswith(".png")


def picture_path(settings: Settings, index: int = 0, count: int = 1, taken: Container[Path] = ()) -> Path:
    """Where picture `index` of `count` goes: `out`, or in it the first free name, which is none of `taken`."""
    out = Path(settings.out).expanduser()
    if is_file(settings.out):
        return out if count == 1 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")
    name, again = stem(settings), 2
    path = out / f"{name}.png"
    while path in taken or path.exists():
        path, again = out / f"{name}-{again}.png", again + 1
    return path


def stem(settings: Settings) -> str:
    """A file's name after prompt and seed."""
    words = re.sub(r"[^a-z0-9]+", "-", settings.prompt.lower()).strip("-")[:60].rstrip("-") or "picture"
    return f"{words}-{settings.seed}"


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
    partial = path.with_name(f".{platform.node()}.{os.getpid()}.partial")
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


def sweep(folder: Path) -> None:
    """Remove what processes left in a folder that were killed while they wrote into it."""
    if os.name != "posix":
        return
    for partial in folder.glob(f".{platform.node()}.*.partial"):
        with suppress(OSError, ValueError):
            pid = int(partial.name.split(".")[-2])
            try:
                os.kill(pid, 0)  # only asks whether there is such a process
            except ProcessLookupError:
                partial.unlink()
