"""What a file or folder is, from its headers: which model and parts, how stored, and how it would be loaded.

    inspect("sd3.5_medium.safetensors")["model"]   # "SD3.5-Medium"

The answer is made of what JSON knows, always with the same keys:

    schema        1; a change that could break a reader of it makes it 2
    path          as given
    kind          "checkpoint" (it has a transformer), "component" (other networks only), "adapter", "other"
    what          in words
    format        "safetensors", "gguf", "diffusers folder"
    model         "SD3-Medium", "SD3.5-Medium", "SD3.5-Large", for an adapter also another model; null if not told
    components    of each network: name, layout, prefix, and tensors to quantisation as below
    missing       names of the networks that a picture needs and that are not there
    tensors       how many; parameters: numbers in them; bytes: what they take
    dtypes        {word of the file: {"tensors", "parameters", "bytes"}}
    quantisation  ways of it, in words
    adapter       null, or dialects, kinds, ranks, alphas, targets, model, refused (see `adapters.describe`)
    metadata      modelspec.*, ss_* and general.*, at most 40 texts of at most 160 characters
    load          loads: whether it would; options: the command line's; needs: those that must come with them;
                  reason: why it would not, or null
    notes         what else is worth knowing

Nothing but headers, small JSON files and single numbers is read, so that the size of a file does not matter.
"""

import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmdit.common.errors import one_line
from mmdit.common.jsons import read_json
from weights.adapters.describe import describe, is_adapter
from weights.adapters.groups import find_adapter
from weights.checkpoint import PLACES, Checkpoint, folder_header, open_checkpoint, open_part, weights_file
from weights.component import Component
from weights.control import open_control, told_control
from weights.errors import CheckpointError
from weights.files import is_gguf
from weights.gguf import GGUFFile
from weights.header import DTYPES, TensorInfo, read_safetensors
from weights.kinds import COMPONENTS, WHAT, Network, described, networks, split, stranger
from weights.layouts import is_ignored
from weights.quantised import FP8

SCHEMA = 1
T = TypeVar("T")

# Width, blocks, query-key norm, blocks of dual attention, tensors under native names: published transformers.
MODELS = {
    (1536, 24, False, 0): ("SD3-Medium", 491),
    (1536, 24, True, 13): ("SD3.5-Medium", 665),
    (2432, 38, True, 0): ("SD3.5-Large", 923),
}
# A tensor of each other part, which side of it, and how long that is in all of Stable Diffusion 3.
SIDES = {
    "vae": ("decoder.conv_in.weight", 16, "latent channels"),
    "clip_l": ("text_model.embeddings.token_embedding.weight", 768, "wide"),
    "clip_g": ("text_model.embeddings.token_embedding.weight", 1280, "wide"),
    "t5": ("shared.weight", 4096, "wide"),
}
OPTIONS = {"transformer": "--model", "clip_l": "--clip-l", "clip_g": "--clip-g", "t5": "--t5xxl", "vae": "--vae"}

_NOTES = {
    "SD3.5-Large": "SD3.5-Large-Turbo has the same shapes: it wants --steps 4 --cfg 1",
    "vae": "FLUX's autoencoder has the same shapes and other constants, which cannot be told",
    "t5": "without T5: --t5 off",
}
_SIZES = {"U16": 2, "U32": 4, "U64": 8, "F8_E8M0": 1, "C64": 8}  # of dtypes that no network here has
_TOLD, _MOST, _LONGEST = ("modelspec.", "ss_", "general."), 40, 160


class Stored(NamedTuple):
    """One tensor as it lies in the file."""

    info: TensorInfo
    word: str  # the file's own: "BF16", "F8_E4M3", "Q4_K"
    bytes: int


Tensors = Mapping[str, Stored]


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a file or folder; the keys are above. CheckpointError where it is missing or damaged."""
    given = os.fspath(path)
    try:
        path = Path(given).expanduser()
        found = _folder(path) if path.is_dir() else _file(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{given}: {getattr(error, 'strerror', None) or error}") from None
    return {**_EMPTY, **found, "schema": SCHEMA, "path": given}


_EMPTY: dict[str, Any] = dict.fromkeys(
    ("schema", "path", "kind", "what", "format", "model", "components", "missing", "tensors", "parameters", "bytes",
     "dtypes", "quantisation", "adapter", "metadata", "load", "notes")
)  # fmt: skip


# ---- files ---------------------------------------------------------------------------------------


def _file(path: Path) -> dict[str, Any]:
    tensors, metadata, form = _stored(path)
    told = {"format": form, "metadata": _bounded(metadata), **_sizes(tensors, metadata)}
    keys = [key for key in tensors if not is_ignored(key)]
    if is_adapter(keys):
        return {**told, **_adapter(path, keys)}
    text = stranger(keys)
    found = networks(keys)
    found = {name: found[name] for name in (*COMPONENTS, *found) if name in found}  # in one order everywhere
    if text is not None or not found:
        what, _, reason = (text or described((), keys)).partition("; ")
        load = _load([], [], reason or "not for this engine")
        return {**told, **_OTHER, "what": what, "load": load}
    groups = split(tensors, found)[0]
    parts = [_part(network, groups[name], metadata) for name, network in found.items()]
    if "control" in found:
        return {**told, **_control(path, parts)}
    if "transformer" in found:
        return {**told, **_single(path, parts)}
    return {**told, **_alone(path, found, parts)}


_OTHER = {"kind": "other", "components": [], "missing": [], "notes": []}


def _stored(path: Path) -> tuple[dict[str, Stored], dict[str, Any], str]:
    """Tensors, metadata and format of a file."""
    if is_gguf(path):
        file = GGUFFile(path)
        return {key: Stored(info, *file.stored[key]) for key, info in file.tensors.items()}, file.metadata, "gguf"
    header = read_safetensors(path)
    return _plain(header.tensors), header.metadata, "safetensors"


def _plain(infos: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    def size(info: TensorInfo) -> int:
        width = DTYPES[info.dtype].itemsize if info.dtype in DTYPES else _SIZES.get(info.dtype, 0)
        return math.prod(info.shape) * width

    return {key: Stored(info, info.dtype, size(info)) for key, info in infos.items()}


def _adapter(path: Path, keys: list[str]) -> dict[str, Any]:
    facts = describe(path, keys)
    kinds, model = " and ".join(facts["kinds"]) or "of no kind that is known", facts["model"]
    load = _load(["--lora", str(path)], [], facts["refused"])
    what = f"an adapter ({kinds})" + (f" for {model}" if model else "")
    return {**_OTHER, "kind": "adapter", "what": what, "model": model, "adapter": facts, "load": load}


def _single(path: Path, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A file with a transformer."""
    checkpoint, notes = _warned(lambda: open_checkpoint(path))
    return {**_checkpoint(path, checkpoint, parts, notes), "what": "a single file"}


def _control(path: Path, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A ControlNet, a file or a folder of its own."""
    opened, reason = _tried(lambda: open_control(path))
    model, what = None, WHAT["control"]
    if opened is not None:
        model, more, reason = told_control(opened)
        what = f"a ControlNet ({more}) for {model or 'another model than the published ones'}"
    mask = ["--control-mask MASK"] if "with a mask" in what else []
    needs = ["--control-image IMAGE", *mask]
    load = _load(["--control", str(path)], needs, reason)
    return {**_OTHER, "kind": "component", "what": what, "model": model, "components": parts, "load": load}


def _alone(path: Path, found: Mapping[str, Network], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A file with other networks only; one whose CLIP cannot be told may be either."""
    options, reasons, notes = [], [], []
    for name in found:
        usual = ("clip_l", "clip_g") if name == "clip" else (name,)
        if name not in SIDES:
            reasons.append(f"{WHAT[name]}: Stable Diffusion 3 reads CLIP-L and CLIP-G of 12 and 32 layers")
            continue
        component, reason = _tried(lambda name=name: open_part(path, name))
        if component is not None:
            reason = _other_size(component)
        reasons += [reason] if reason else []
        options += [word for part in usual for word in (OPTIONS[part], str(path))]
        notes += [_NOTES[name]] if name == "vae" and not reason else []
    return {
        "kind": "component",
        "what": " and ".join(WHAT[name] for name in found),
        "components": parts,
        "missing": [name for name in COMPONENTS if name not in found],
        "load": _load(options, [], "; ".join(reasons) or None),
        "notes": notes,
    }


def _other_size(component: Component) -> str | None:
    key, wanted, what = SIDES[component.name]
    shape = component.shapes.get(key, ())
    if len(shape) < 2:
        return f"{WHAT[component.name]} that lacks {component.spelled(key)}"
    return None if shape[1] == wanted else f"{shape[1]} {what}; Stable Diffusion 3's has {wanted}"


# ---- folders -------------------------------------------------------------------------------------


def _folder(path: Path) -> dict[str, Any]:
    if (path / "model_index.json").exists():
        return _diffusers(path)
    names = [file.name for file in path.iterdir()]
    for stem in ("diffusion_pytorch_model", "model"):
        file = weights_file(names, stem)
        if file is not None and file.endswith(".json"):
            return _shards(path, stem)
        if file is not None:
            found = _file(path / file)
            if found["components"] and found["components"][0]["name"] == "control":  # beside it lies its config.json
                found |= _control(path, found["components"])
            return found
    file = find_adapter(path)[0]
    found = _file(file)
    return {**found, **_adapter(path, list(_stored(file)[0]))} if found["kind"] == "adapter" else found


def _diffusers(path: Path) -> dict[str, Any]:
    index = read_json(path / "model_index.json", CheckpointError)
    form = {"format": "diffusers folder", "metadata": {}, **_sizes({}, {})}
    pipeline = str(index.get("_class_name", "?"))
    if not pipeline.startswith("StableDiffusion3"):
        load = _load([], [], "this engine runs StableDiffusion3Pipeline folders")
        return {**form, **_OTHER, "what": one_line(f"a diffusers folder for {pipeline:.60}"), "load": load}
    checkpoint, notes = _warned(lambda: open_checkpoint(path))
    parts, everything, metadata = [], {}, {}
    for name in checkpoint.components:
        folder, stem = path / PLACES[name][0], PLACES[name][1]
        if weights_file([file.name for file in folder.iterdir()], stem) is None:
            notes.append(f"{PLACES[name][0]}/ is there without its weights")
            checkpoint.components = tuple(part for part in checkpoint.components if part != name)
            continue
        header = folder_header(folder, stem)
        tensors = _plain(header.tensors)
        parts.append(_part(Network(name, "diffusers", ""), tensors, header.metadata))
        everything |= {f"{name}/{key}": stored for key, stored in tensors.items()}
        metadata |= header.metadata
    told = {**form, "metadata": _bounded(metadata), **_sizes(everything, metadata)}
    return {**told, **_checkpoint(path, checkpoint, parts, notes), "what": "a diffusers folder"}


def _shards(path: Path, stem: str) -> dict[str, Any]:
    """One component's folder, in several files, which nothing loads by itself."""
    header = folder_header(path, stem)
    tensors, found = _plain(header.tensors), networks(header.tensors)
    groups = split(tensors, found)[0]
    if "control" in found:
        parts = [_part(found["control"], groups["control"], header.metadata)]
        told = {"format": "diffusers folder", "metadata": _bounded(header.metadata), **_sizes(tensors, header.metadata)}
        return {**told, **_control(path, parts)}
    return {
        "kind": "component",
        "what": f"{described(found, header.tensors)}, one folder of a diffusers folder",
        "format": "diffusers folder",
        "components": [_part(network, groups[name], header.metadata) for name, network in found.items()],
        "missing": [name for name in COMPONENTS if name not in found],
        "metadata": _bounded(header.metadata),
        "load": _load([], [], "in several files: give the folder above it, which has a model_index.json"),
        "notes": [],
        **_sizes(tensors, header.metadata),
    }


# ---- what holds for both -------------------------------------------------------------------------


def _checkpoint(path: Path, checkpoint: Checkpoint, parts: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """Something with a transformer, as the loader sees it."""
    missing = [name for name in COMPONENTS if name not in checkpoint.components]
    reasons, model, variant = ["has no transformer"] if "transformer" in missing else [], None, None
    for name in checkpoint.components:
        component, reason = _tried(lambda name=name: checkpoint.component(name))
        if component is not None and name == "transformer":
            variant = (component.config or {}).get("variant")
            model, reason = _model(component) if variant is None else (None, None)
        reasons += [reason] if reason else []
    needs = [f"{OPTIONS[name]} FILE" for name in missing if name != "transformer"]
    needs += [] if checkpoint.tokenizers else ["--tokenizers FOLDER"]
    if variant is not None:  # which networks it reads texts with, its file says
        needs = ["--variant FILE"] + [need for need in needs if not need.startswith(("--clip", "--t5"))]
        notes += [one_line(f"another architecture than SD3's, the variant {variant!r:.60}")]
    notes += [_NOTES["t5"]] if "t5" in missing else []
    notes += [_NOTES[model]] if model in _NOTES else []
    load = _load(["--model", str(path)], needs, "; ".join(reasons) or None)
    return {"kind": "checkpoint", "model": model, "components": parts, "missing": missing, "load": load, "notes": notes}


def _model(component: Component) -> tuple[str | None, str | None]:
    """The published model with these native shapes, or None, and what is wrong with it, or None."""
    shapes, key = component.shapes, "x_embedder.proj.weight"
    patches = shapes.get(key)
    if not patches:
        return None, f"lacks {component.spelled(key)}: not a transformer of Stable Diffusion 3"
    blocks = {name.split(".")[1] for name in shapes if name.startswith("joint_blocks.")}
    dual = sum(name.endswith("x_block.attn2.qkv.weight") for name in shapes)
    norm = any(name.endswith("attn.ln_k.weight") for name in shapes)
    model, tensors = MODELS.get((patches[0], len(blocks), norm, dual), (None, len(shapes)))
    return model, None if len(shapes) == tensors else f"{model} has {tensors} tensors, this has {len(shapes)}"


def _part(network: Network, tensors: Tensors, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {**network._asdict(), **_sizes(tensors, metadata)}


def _sizes(tensors: Tensors, metadata: Mapping[str, Any]) -> dict[str, Any]:
    dtypes: dict[str, dict[str, int]] = {}
    for stored in tensors.values():
        own = dtypes.setdefault(stored.word, {"tensors": 0, "parameters": 0, "bytes": 0})
        own["tensors"] += 1
        own["parameters"] += math.prod(stored.info.shape)
        own["bytes"] += stored.bytes
    whole = {key: sum(own[key] for own in dtypes.values()) for key in ("tensors", "parameters", "bytes")}
    return {**whole, "dtypes": dtypes, "quantisation": _quantisation(tensors, dtypes, metadata)}


def _quantisation(tensors: Tensors, words: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
    leaves = {key.rpartition(".")[2] for key in tensors}
    found = [word for word in words if word in FP8]
    styles = []
    if "scale_weight" in leaves:
        styles.append("scaled, the older style (scale_weight)")
    if "weight_scale" in leaves:
        note = (
            "comfy_quant" if "comfy_quant" in leaves else "metadata" if "_quantization_metadata" in metadata else "bare"
        )
        styles.append(f"scaled, the newer style (weight_scale, {note})")
    names = [FP8[word] for word in found] or (["8 bits in bytes"] if styles and "U8" in words else [])
    told = [f"{name}, {style}" for name in names for style in (styles or ["plain"])]
    blocks = sorted(word for word in words if word not in DTYPES and word not in _SIZES)
    gguf = all(stored.word in DTYPES or stored.info.dtype == "F32" for stored in tensors.values())
    return told + ([f"{'GGUF' if gguf else 'unknown'} {', '.join(blocks)}"] if blocks else [])


def _load(options: list[str], needs: list[str], reason: str | None) -> dict[str, Any]:
    return {"loads": reason is None, "options": options, "needs": needs, "reason": reason and one_line(reason)}


def _bounded(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Of a model's or a trainer's account of itself what fits on lines; thumbnails are pictures."""
    told = {key: value for key, value in sorted(metadata.items()) if key.startswith(_TOLD) and "thumbnail" not in key}
    texts = {
        one_line(key[:_LONGEST]): one_line(" ".join(str(value)[: 4 * _LONGEST].split())) for key, value in told.items()
    }
    return {
        key: text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
        for key, text in list(texts.items())[:_MOST]
    }


def _tried(attempt: Callable[[], T]) -> tuple[T | None, str | None]:
    """What the loader gives, or why it refuses."""
    try:
        return attempt(), None
    except CheckpointError as error:
        return None, str(error)


def _warned(attempt: Callable[[], Checkpoint]) -> tuple[Checkpoint, list[str]]:
    """What the loader gives, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return attempt(), [one_line(str(warning.message)) for warning in caught]
