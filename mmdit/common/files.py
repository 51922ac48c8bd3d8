"""Files that are there whole or not at all, whoever else writes into the same folder."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A place to write what is to become `path`, a file or a folder; it has the same name, in a folder of its own.

    That folder lies beside `path`, is made under a random name and can be entered by this user alone: no other
    process or thread has it, and no link can be waiting in it. Give what was written its name by `put` or `put_new`.
    At the end the rest is removed, with folders on the way to `path` that were made and are empty. Raises OSError.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    own = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = tempfile.mkdtemp(".partial", f".{platform.node()}.{os.getpid()}.", path.parent)
        yield Path(own) / path.name
    finally:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()  # those that hold something stay


def put(written: Path, path: Path) -> None:
    """Give a file its name, in the place of what has it; OSError."""
    os.replace(written, path)


def put_new(written: Path, path: Path) -> bool:
    """Give a file or folder its name for good; False where something has that name already. Raises OSError.

    Of several that want the name at the same moment one gets it. Only for folders there is no such promise.
    """
    if written.is_dir():
        if path.exists() or path.is_symlink():
            return False
        os.rename(written, path)
        return True
    try:
        os.link(written, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links, or a disk that is full, which the next step tells
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        try:
            os.replace(written, path)
        except OSError:
            path.unlink()
            raise
    return True


def sweep(folder: Path) -> None:
    """Remove what processes of this machine left in a folder that were killed while they wrote into it."""
    if os.name != "posix":
        return
    for partial in folder.glob(f".{platform.node()}.*.partial"):
        process = partial.name.removeprefix(f".{platform.node()}.").split(".")[0]
        if not process.isdecimal() or len(process) > 9:  # more than any process has
            continue
        with suppress(OSError):
            try:
                os.kill(int(process), 0)  # only asks whether there is such a process
            except ProcessLookupError:
                if partial.is_dir() and not partial.is_symlink():
                    shutil.rmtree(partial, ignore_errors=True)
                else:
                    partial.unlink()
