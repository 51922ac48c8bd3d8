"""The toy as a diffusers folder that draws, and what became of a command line."""

from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

from benchmarks.emoji.tokenizers import write_tokenizers
from benchmarks.random_checkpoint import write_checkpoint


def toy_folder(root: Path, name: str = "toy", **more: Any) -> Path:
    """A new folder under `root` with small vocabularies and their tokenizers; more: as `write_checkpoint` takes it."""
    if not (root / "tokenizers").exists():
        write_tokenizers(root / "tokenizers", captions=2000)
    return write_checkpoint(root / name, tokenizers=root / "tokenizers", clip_vocab=1024, t5_vocab=512, **more)


class Ran(NamedTuple):
    code: int
    lines: list[str]  # of standard output
    errors: list[str]  # of standard error


# ---- in the place of processes, which take seconds to import PyTorch -----------------------------------


def trained_here(line: list[str], stdout: Any, **_: Any) -> CompletedProcess:
    """`python -m benchmarks.emoji.train ...` in this process, whose threads stay as they are."""
    from benchmarks.emoji import train

    assert line[1:3] == ["-m", "benchmarks.emoji.train"]
    threads = line.index("--threads")
    with redirect_stdout(stdout):
        return CompletedProcess(line, train.main([*line[3:threads], *line[threads + 2 :]]))


class OneByOne:
    """A pool of threads or processes without any: signals are for the main one."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> "OneByOne":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, work: Callable[..., Any], *items: Iterable[Any]) -> Iterable[Any]:
        return map(work, *items)
