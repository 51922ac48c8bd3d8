"""Models of the Hugging Face hub: fetching the files that a run needs, and finding what is already in the cache.

Needs the package huggingface_hub for fetching; looking into the cache needs nothing.
"""

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from mmdit.common.jsons import read_json
from weights.checkpoint import PLACES, weights_file
from weights.errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".bin", ".json")

# Whose tokenizers serve for a single file, which brings none; all of Stable Diffusion 3 has the same.
_WITH_TOKENIZERS = (
    "stabilityai/stable-diffusion-3.5-medium",
    "stabilityai/stable-diffusion-3.5-large",
    "stabilityai/stable-diffusion-3.5-large-turbo",
    "stabilityai/stable-diffusion-3-medium-diffusers",
)


def is_id(model: str) -> bool:
    """Whether this reads as `owner/name` of the hub, and is nothing on this machine."""
    return bool(_ID.fullmatch(model)) and not model.endswith(_FILES) and not Path(model).exists()


def fetch(model: str, parts: Collection[str], tokenizers: Collection[str]) -> Path:
    """Fetch a diffusers folder of the hub, as far as it is needed and not cached; returns its folder in the cache.

    parts: the components whose weights are needed; tokenizers: names of tokenizer folders. Without a connection
    the cache alone is used. CheckpointError where the model is absent, gated or incomplete, or the package missing.
    """
    download = _package(model).hf_hub_download
    index = Path(_asked(model, download, model, "model_index.json"))
    names, online = _listing(model, index.parent)
    for name in needed(model, read_json(index, CheckpointError), names, parts, tokenizers, online):
        # By the commit of the first file: the model may change between two.
        _asked(model, download, model, name, revision=index.parent.name)
    return index.parent


def needed(
    model: str,
    index: dict[str, Any],
    names: Collection[str],
    parts: Collection[str],
    tokenizers: Collection[str],
    online: bool = True,
) -> list[str]:
    """Which of the files `names` of a diffusers folder a run reads; index: its model_index.json.

    CheckpointError where a part's weights are not among them.
    """
    wanted = [name for name in names if name in ("mmdit.json", "scheduler/scheduler_config.json")]
    wanted += [name for name in names if name.split("/")[0] in tokenizers]
    for part in parts:
        folder, stem = PLACES[part]
        if not any(index.get(folder) or ()):
            continue  # left out of this model; who opens the folder says so
        inside = {name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")}
        weights = weights_file(inside, stem)
        if weights is None:
            where = "the model on the hub has" if online else "the hub cannot be reached, and the cache has"
            raise CheckpointError(f"{model}: {where} no {folder}/{stem}.safetensors")
        wanted += [f"{folder}/{name}" for name in ("config.json", weights, *_shards(weights, inside)) if name in inside]
    return wanted


def cached_tokenizers(folders: Iterable[str]) -> Path | None:
    """A folder in the hub's cache that holds these tokenizer folders of Stable Diffusion 3, or None."""
    for model in _WITH_TOKENIZERS:
        snapshots = _cache() / ("models--" + model.replace("/", "--")) / "snapshots"
        for snapshot in sorted(snapshots.iterdir()) if snapshots.is_dir() else ():
            if all((snapshot / folder).is_dir() for folder in folders):
                return snapshot
    return None


def _shards(index: str, names: Collection[str]) -> list[str]:
    """The files of this component folder that belong to an index of either spelling."""
    if not index.endswith(".json"):
        return []
    stem, variant = index.removesuffix(".json").replace(".index", "").split(".safetensors")
    pattern = re.compile(re.escape(stem + variant) + r"-\d+-of-\d+\.safetensors")
    return sorted(name for name in names if pattern.fullmatch(name))


def _listing(model: str, folder: Path) -> tuple[list[str], bool]:
    """Names of the model's files, and whether they are the hub's; without a connection those in the cache."""
    try:
        return list(_package(model).list_repo_files(model)), True
    except Exception:  # errors of its HTTP library, which it has changed, have no class in common
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()], False


def _asked(model: str, call: Any, *arguments: str, **keywords: str) -> str:
    """Call a function of the hub; its errors become CheckpointError."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{model}"
    try:
        return call(*arguments, **keywords)
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{model}: gated: accept its licence at {page}, then log in here with: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"{model}: no such file or folder here, and no such model at {page}") from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(f"{model}: the hub cannot be reached, and {arguments[-1]} is not in the cache") from None
    except errors.EntryNotFoundError:
        raise CheckpointError(
            f"{model}: has no {arguments[-1]}; expected a diffusers folder: a single file is downloaded by hand"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: {arguments[-1]} could not be fetched: {error}") from None


def _package(model: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{model}: no such file or folder; for a model of the Hugging Face hub: pip install 'mmdit[hub]'"
        ) from None
    return huggingface_hub


def _cache() -> Path:
    """Where the hub's package keeps its files (its documentation, "Environment variables")."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or default)
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
