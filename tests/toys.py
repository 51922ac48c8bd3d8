"""The toy as a diffusers folder that draws, and what became of a command line."""

from pathlib import Path
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
