"""Hashes that tell one set of weights from another, made from what the files hold and not from where they lie.

A copy, on another machine for one, is the same; another file under the same name is not. Small files count with every
byte. Of large ones, which take longer to read than the pictures may take to draw, blocks spread over the whole file
count: whatever was trained as a whole differs in all of them. A large file of which only a few numbers, or one small
matrix, were changed may be taken for what it was.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from weights.component import Component
from weights.errors import CheckpointError

_WHOLE = 32 << 20  # bytes of a file that is read whole
_BLOCKS, _BLOCK = 2048, 4096  # of others


def of_model(
    components: Mapping[str, Component],
    configs: Mapping[str, object],
    shift: float,
    tokenizers: Iterable[Path],
    code: Sequence[Path] = (),
) -> str:
    """A hash of the networks' files and configurations, the noise schedule's shift, and the tokenizers' folders.

    code: files of a variant of the architecture.
    """
    told = {name: [repr(configs[name]), *map(of_file, component.files)] for name, component in components.items()}
    values = [sorted(told.items()), shift, [_of_folder(folder) for folder in tokenizers]]
    return _hash([*values, *([[of_file(path) for path in code]] if code else [])])


def with_adapters(model: str, adapters: Sequence[str]) -> str:
    """The hash of a model and of the adapters in it, by their own hashes; their scales do not count."""
    return _hash([model, *adapters]) if adapters else model


def with_embeddings(model: str, files: Mapping[str, Path]) -> str:
    """The hash of a model and of the textual inversions that its prompts may name, by word."""
    return _hash([model, [(word, of_file(path)) for word, path in files.items()]]) if files else model


def with_autoencoder(model: str, files: Iterable[Path]) -> str:
    """The hash of a model that decodes by another autoencoder, in these files."""
    return _hash([model, "decoded by", *map(of_file, files)])


def of_adapter(path: Path) -> str:
    """A hash of an adapter, a file or a folder; CheckpointError where it cannot be read."""
    return _of_folder(path) if path.is_dir() else of_file(path)


def _of_folder(folder: Path) -> str:
    """Of weights, configurations and vocabularies; not of files for people, as .md."""
    endings = (".safetensors", ".json", ".txt", ".model")
    return _hash([(path.name, of_file(path)) for path in sorted(folder.iterdir()) if path.suffix in endings])


def of_file(path: Path) -> str:
    """A hash of what the file holds; CheckpointError where it cannot be read."""
    try:
        stat = path.stat()
        return _read(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=1000)  # a file of several parts is read once
def _read(path: Path, size: int, _: int) -> str:
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            found.update(file.read())
        else:
            for i in range(_BLOCKS):
                file.seek(i * (size - _BLOCK) // (_BLOCKS - 1), os.SEEK_SET)
                found.update(file.read(_BLOCK))
    return found.hexdigest()


def _hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
