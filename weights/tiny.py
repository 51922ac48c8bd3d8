"""The files of TAESD3: its two halves apart or together, under the names of its own files, diffusers' or ComfyUI's.

References: madebyollin/taesd; diffusers `AutoencoderTiny`, in which layers of the decoder count from the one after the
first; ComfyUI's `sd.py`, which puts `taesd_decoder.` before the names.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdit.common.jsons import read_json
from weights.checkpoint import folder_header
from weights.component import Component
from weights.errors import CheckpointError
from weights.files import read_file
from weights.header import TensorInfo
from weights.keymap import Entry

# (pattern of a whole name, the half, what is added to the number of its layer); the first that fits counts.
_NAMES = (
    (r"(?:taesd_)?(encoder)\.(?:layers\.)?(\d+)\.(.+)", 0),
    (r"(?:taesd_)?(decoder)\.layers\.(\d+)\.(.+)", 1),
    (r"(?:taesd_)?(decoder)\.(\d+)\.(.+)", 0),
)
_ALONE = {"encoder": {"0.weight", "1.conv.0.weight"}, "decoder": {"1.weight", "3.conv.0.weight"}}
# What diffusers' config.json may say, and no other: numbers and functions that the network has built in.
_CONFIG = {"act_fn": "relu", "upsample_fn": "nearest", "scaling_factor": 1.0, "shift_factor": 0.0}
_EXPECTED = "expected TAESD3, as taesd3_decoder.safetensors or the folder of madebyollin/taesd3"


def open_tiny(path: Path) -> dict[str, Component]:
    """ "decoder", and "encoder" where it is there, of a file or a diffusers folder; reads no tensor.

    A file with the decoder alone has its encoder in the file beside it whose name says "encoder" in place of
    "decoder", if there is one. Raises CheckpointError for what is no TAESD.
    """
    if path.is_dir():
        header = folder_header(path, "diffusion_pytorch_model")
    else:
        header = read_file(path)
    found = _halves(path, header.tensors)
    beside = path.with_name(path.name.replace("decoder", "encoder"))
    if "encoder" not in found and beside != path and beside.is_file():
        found |= {name: part for name, part in _halves(beside, read_file(beside).tensors).items() if name == "encoder"}
    if "decoder" not in found:
        what = "the encoder of a TAESD alone" if found else "no TAESD"
        raise CheckpointError(f"{path}: {what}; {_EXPECTED}")
    _check_config(path / "config.json")
    return found


def _halves(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, Component]:
    """The halves that a file holds, under the names that each has in a file of its own."""
    own = next((half for half, marks in _ALONE.items() if marks <= tensors.keys()), None)
    entries: dict[str, dict[str, Entry]] = {}
    for key in tensors:
        half, name = (own, key) if own else _native(key)
        if half is not None:
            entries.setdefault(half, {})[name] = Entry((key,), "copy")
    return {half: Component(f"TAESD's {half}", path, tensors, each) for half, each in entries.items()}


def _native(key: str) -> tuple[str | None, str]:
    for pattern, more in _NAMES:
        match = re.fullmatch(pattern, key)
        if match and len(match[2]) < 9:
            return match[1], f"{int(match[2]) + more}.{match[3]}"
    return None, key


def _check_config(path: Path) -> None:
    config: dict[str, Any] = read_json(path, CheckpointError) if path.parent.is_dir() and path.exists() else {}
    for name, value in _CONFIG.items():
        if config.get(name, value) not in (value, None):
            raise CheckpointError(f"{path}: {name} is {config[name]!r:.60}, expected {value!r}, as in TAESD3")
