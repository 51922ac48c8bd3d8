"""Adapter files: which tensors they hold for which module, found from names alone.

A key is `<module><ending>`; the ending says which role the tensor plays there. The module's part stays as it is in the
file, one of the many spellings that `targets` knows.

References for the endings: ComfyUI comfy/weight_adapter/*.py, diffusers utils/state_dict_utils.py, LyCORIS
lycoris/modules/*.py, PEFT utils/save_and_load.py.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmdit.common.jsons import parse_json, read_json
from weights.adapters.scale import Scaling
from weights.errors import CheckpointError
from weights.header import DTYPES, TensorInfo, read_header

_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight",
         ".lora_linear_layer.down.weight", ".lora_A")  # fmt: skip
_UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", "_lora.up.weight",
       ".lora_linear_layer.up.weight", ".lora_B")  # fmt: skip
_MAGNITUDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".magnitude")
_OWN_NAMES = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("alpha", "dora_scale", "diff", "diff_b", "set_weight"),
)

# Ending of a key: role. PEFT may put the adapter's name in the middle, which `_NAMED` reads.
ENDINGS: dict[str, str] = {
    **dict.fromkeys(_DOWN, "down"),
    **dict.fromkeys(_UP, "up"),
    **dict.fromkeys(_MAGNITUDE, "magnitude"),
    **{f".{name}": name for name in _OWN_NAMES},
    ".lora_mid.weight": "mid",
    ".lora_alpha": "alpha",
    ".lora_B.bias": "up_bias",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
}
_NAMED = re.compile(r"(.+\.(?:lora_A|lora_B|lora_magnitude_vector))\.([^.]+)\.(weight|bias)")

# Kinds whose arithmetic is not here: part of a key, what to call them.
UNSUPPORTED = {
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".rescale": "OFT",
    ".a1.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".on_input": "IA3",
    ".ia3_l": "IA3",
    ".vera_lambda": "VeRA",
    ".reshape_weight": "LoRA that reshapes its weight",
}

# What trainers leave in the files that no weight needs: OneTrainer's embeddings, helpers, an unused LoKr name.
_IGNORED_STARTS, _IGNORED_PARTS, _IGNORED_ENDS = ("bundle_emb.",), ("_aux.",), (".lokr_t1",)

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_METADATA = "lora_adapter_metadata"
_PARTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass
class AdapterFile:
    """An opened adapter; no tensor is read yet.

    path: the safetensors file; groups: {module as spelled: {role: where the tensor lies}}; unknown: keys with an
    ending that no adapter has; scalings: PEFT's configuration by the prefix it is for, "" for names without one.
    """

    path: Path
    groups: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    scalings: dict[str, Scaling] = field(default_factory=dict)

    def scaling(self, module: str) -> tuple[Scaling | None, str]:
        """The configuration for a module, if there is one, and the module's name in it."""
        prefix = next((p for p in self.scalings if p and module.startswith(f"{p}.")), None)
        if prefix is not None:
            return self.scalings[prefix], module.removeprefix(f"{prefix}.")
        return self.scalings.get(""), module.removeprefix("base_model.model.")

    def read(self, modules: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
        """{module: {role: tensor}}, on the CPU, in the file's dtype, copied so that the file may go.

        CheckpointError if the file went bad since it was opened.
        """
        try:
            with safe_open(str(self.path), framework="pt", device="cpu") as file:
                return {
                    module: {role: file.get_tensor(info.key).clone() for role, info in self.groups[module].items()}
                    for module in modules
                }
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error


def open_adapter(path: Path) -> AdapterFile:
    """Sort the tensors of a file, or of the one adapter in a folder, by module and role; reads headers and JSON.

    Raises CheckpointError for what is no adapter, for a kind that is not supported, and for a broken configuration.
    """
    file, config = find_adapter(path.expanduser())
    infos = read_header(file)
    adapter = AdapterFile(file)
    for key, info in infos.items():
        _sort(adapter, key, info)
    if not adapter.groups:
        first = f", the first is {next(iter(infos))}" if infos else ""
        raise CheckpointError(f"{file}: not an adapter: none of its {len(infos)} tensors is named like one's{first}")
    adapter.scalings = _scalings(file, config)
    return adapter


def split_key(key: str) -> tuple[str, str] | None:
    """A key's module and role, or None for a name that no adapter has."""
    for ending, role in ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    named = _NAMED.fullmatch(key)
    return split_key(f"{named[1]}.{named[3]}") if named else None


def _sort(adapter: AdapterFile, key: str, info: TensorInfo) -> None:
    if key.startswith(_IGNORED_STARTS) or key.endswith(_IGNORED_ENDS) or any(p in key for p in _IGNORED_PARTS):
        return
    kind = next((name for part, name in UNSUPPORTED.items() if part in key), None)
    if kind is not None:
        raise CheckpointError(
            f"{adapter.path}: {kind} ({key}) is not supported: LoRA, LoHa, LoKr, DoRA and full differences are"
        )
    found = split_key(key)
    if found is None:
        adapter.unknown.append(key)
        return
    module, role = found
    if info.dtype not in _FLOATS and (role != "alpha" or info.dtype not in DTYPES):
        raise CheckpointError(f"{adapter.path}: {key} is {info.dtype}: expected one of {', '.join(_FLOATS)}")
    roles = adapter.groups.setdefault(module, {})
    if role in roles:
        raise CheckpointError(
            f"{adapter.path}: {roles[role].key} and {key} are the same part of two adapters: expected one adapter"
        )
    roles[role] = info


def find_adapter(path: Path) -> tuple[Path, Path | None]:
    """The safetensors file that a path means, and PEFT's configuration beside it."""
    if not path.is_dir():
        config = path.parent / "adapter_config.json"
        return path, config if path.name == "adapter_model.safetensors" and config.is_file() else None
    config = path / "adapter_config.json"
    files = sorted(p for p in path.glob("*.safetensors"))
    usual = [path / n for n in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")]
    known = [p for p in usual if p in files] or files
    if len(known) == 1 or known[:1] == usual[:1]:
        return known[0], config if config.is_file() else None
    if known:
        raise CheckpointError(f"{path}: {len(files)} safetensors files: name one of them ({files[0].name}, ...)")
    pickles = sorted(p.name for p in path.glob("*.bin"))
    only = f" (only {pickles[0]}: pickles are never opened)" if pickles else ""
    raise CheckpointError(f"{path}: no adapter_model.safetensors and no other safetensors file{only}")


def _scalings(file: Path, config: Path | None) -> dict[str, Scaling]:
    """PEFT's configurations by prefix: of adapter_config.json, else those in the file's metadata."""
    if config is not None:
        found = {"": Scaling.from_json(read_json(config, CheckpointError), str(config))}
    else:
        where = f"{file}: metadata {_METADATA}"
        found = {prefix: Scaling.from_json(v, where) for prefix, v in _by_prefix(_metadata(file), where).items()}
    return {prefix: scaling for prefix, scaling in found.items() if scaling is not None}


def _metadata(file: Path) -> str | None:
    try:
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            return (opened.metadata() or {}).get(_METADATA)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def _by_prefix(text: str | None, where: str) -> dict[str, dict[str, Any]]:
    """diffusers' flat JSON, `transformer.r`, `text_encoder.lora_alpha`, ... or bare names, as one dict per prefix."""
    try:
        flat = parse_json(text) if text else {}
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(flat, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(flat).__name__}")
    result: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        prefix = next((p for p in _PARTS if key.startswith(f"{p}.")), "")
        result.setdefault(prefix, {})[key.removeprefix(f"{prefix}.")] = value
    return result
