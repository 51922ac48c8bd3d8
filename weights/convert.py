"""A checkpoint into another layout or number format, tensor by tensor.

    convert("sd3.5_medium.safetensors", "sd35", layout="diffusers", dtype="bf16", lora=["style.safetensors:0.8"])

Every tensor goes the same way: its native values, adapters merged in float32, the name and form of the new layout, one
rounding into the new dtype, the disk. Nothing is computed twice and nothing is kept.

fp8-scaled is ComfyUI's older style (see `quantised`): the weights of all linear layers of the transformer and of T5 are
F8_E4M3, each with a float32 `scale_weight` that makes its largest number 448, the largest of the format; the marker
`scaled_fp8` lies beside them, everything else is bfloat16. diffusers does not read such a folder; this engine does.

What a single file has no place for (a scheduler's shift, an autoencoder's scale, heads of another width) must be what
its readers take for granted, else the conversion is refused: the pictures would differ and nothing would say why.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.common.errors import SettingsError
from mmdit.common.paths import split_scale
from weights import hub, published
from weights.adapters.merge import Active, check_scale, merged_tensor, read_changes
from weights.adapters.plan import make_plan
from weights.adapters.targets import Lookup
from weights.checkpoint import Checkpoint, open_checkpoint
from weights.errors import CheckpointError
from weights.keymap import TABLES, Entry, revert, to_diffusers
from weights.kinds import COMPONENTS
from weights.published import TOKENIZERS
from weights.write import Item, whole, write_safetensors

LAYOUTS = ("diffusers", "single-file")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8-scaled": torch.bfloat16}
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of F8_E4M3

_PROJECTION = "text_projection.weight"
_NOT_LINEAR = ("shared.", "embed_tokens.", "relative_attention_bias.")  # T5's matrices that are looked up in


class Piece(NamedTuple):
    """One tensor of the output, and its scale where it is fp8: name and form there, and where it comes from."""

    name: str
    part: str
    entry: Entry  # from the native tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def items(self) -> list[Item]:
        """What it puts into the file."""
        weight = Item(self.name, self.dtype, self.shape)
        if self.dtype != FP8 or not self.name.endswith(".weight"):
            return [weight]
        return [weight, Item(f"{self.name.removesuffix('.weight')}.scale_weight", torch.float32, ())]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def convert(
    source: str | Path,
    out: str | Path,
    layout: str,
    dtype: str,
    lora: Sequence[str] = (),
    parts: Mapping[str, Path] | None = None,
) -> Path:
    """Write the checkpoint `source` to `out`, a new folder or file, and return its path.

    source: what `open_checkpoint` takes, or a Hugging Face id; layout: one of LAYOUTS; dtype: one of DTYPES; lora:
    adapters to merge, FILE_OR_FOLDER[:SCALE]; parts: {component: separate file}, each in the place of what the source
    brings. Warns of what of an adapter does not apply.

    Raises ValueError for an unknown layout or dtype; CheckpointError where the input or an adapter cannot be used,
    for what the new layout or dtype cannot hold, and where the disk does not take it: then nothing is left behind.
    """
    for value, known in ((layout, LAYOUTS), (dtype, tuple(DTYPES))):
        if value not in known:
            raise ValueError(f"{value!r} is not one of {', '.join(known)}")
    out = Path(out).expanduser()
    if not out.name:
        raise CheckpointError(f"{out}: is there already: expected a new name")
    if hub.is_id(str(source)):
        tokenizers = TOKENIZERS if layout == "diffusers" else ()
        source = hub.fetch(str(source), [name for name in COMPONENTS if name not in (parts or {})], tokenizers)
    checkpoint = open_checkpoint(source, parts)
    values = Values(checkpoint, layout, lora)
    if layout == "single-file":
        _check_taken_for_granted(checkpoint, values)
    pieces = {part: list(_pieces(part, values.shapes[part], layout, dtype)) for part in values.shapes}
    size = sum(piece.bytes for part in pieces.values() for piece in part)
    with whole(out, size) as partial, tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        if layout == "single-file":
            _write(partial, [piece for part in pieces.values() for piece in part], values, bar)
        else:
            _write_folder(partial, checkpoint, pieces, values, bar)
    return out


# ---- values --------------------------------------------------------------------------------------


class Values:
    """The native tensors of a checkpoint under adapters, read and merged one at a time.

    shapes: {component: {native name: shape}}, in an order that depends on the names alone.
    """

    def __init__(self, checkpoint: Checkpoint, layout: str, lora: Sequence[str]) -> None:
        """CheckpointError where a component or an adapter cannot be used."""
        self._components = {part: checkpoint.component(part) for part in checkpoint.components}
        self.shapes = {part: _ordered(component.shapes) for part, component in self._components.items()}
        lookup = Lookup({part: shapes for part, shapes in self.shapes.items() if part != "vae"})
        self._active = [_opened(text, lookup, [part for part in self.shapes if part != "vae"]) for text in lora]
        self._last: tuple[tuple[str, str], Tensor] | None = None
        self._arrange_projections(layout)

    def read(self, part: str, name: str) -> Tensor:
        """A native tensor: in the file's dtype as `Component.read` gives it, or float32 where an adapter changes it."""
        if self._last is None or self._last[0] != (part, name):  # q, k and v come from one tensor
            self._last = None  # let it go before the next
            self._last = ((part, name), self._made(part, name))
        return self._last[1]

    def where(self, part: str, name: str) -> str:
        """File and name of a tensor, for messages."""
        component = self._components[part]
        return f"{component.path}: {component.spelled(name, self.shapes[part])}"

    def _made(self, part: str, name: str) -> Tensor:
        if name not in self._components[part].shapes:  # a projection that was added
            return torch.eye(self.shapes[part][name][0])
        tensor = self._components[part].read(name)
        todo = [(a, change) for a in self._active if a.scale != 0 for change in a.changes.get((part, name), ())]
        return merged_tensor(name, tensor.to(torch.float32), todo) if todo else tensor

    def _arrange_projections(self, layout: str) -> None:
        """A folder's CLIPs have a projection, CLIP-L's an identity; in a single file CLIP-L has none.

        transformers would fill a missing one with random numbers.
        """
        for part in ("clip_l", "clip_g"):
            shapes = self.shapes.get(part)
            if shapes is None:
                continue
            if layout == "diffusers" and _PROJECTION not in shapes:
                width = shapes.get("text_model.final_layer_norm.weight", (0,))[0]
                shapes[_PROJECTION] = (width, width)
            elif layout == "single-file" and part == "clip_l" and _PROJECTION in shapes:
                matrix = self.read(part, _PROJECTION).float()
                if matrix.shape[0] != matrix.shape[1] or not torch.equal(matrix, torch.eye(len(matrix))):
                    raise CheckpointError(
                        f"{self._components[part].path}: CLIP-L's {_PROJECTION} is not the identity: a single file has "
                        "no place for it: --layout diffusers keeps it"
                    )
                del shapes[_PROJECTION]


def _opened(text: str, lookup: Lookup, parts: Sequence[str]) -> Active:
    try:
        path, scale = split_scale(text)
    except SettingsError as error:
        raise CheckpointError(str(error)) from None
    check_scale(scale)
    plan = make_plan(Path(path).expanduser(), lookup, parts)
    if (warning := plan.report.warning()) is not None:
        warnings.warn(warning, stacklevel=5)
    return Active(plan.report.path, scale, read_changes(plan))


def _ordered(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """By name, numbers as numbers, q before k before v before o, T5's embedding first: as the shards are cut."""

    def key(name: str) -> tuple[Any, ...]:
        return (name != "shared.weight", [word(part) for part in name.split(".")])

    def word(part: str) -> tuple[int, int, str]:
        if part.isdecimal():
            return 0, int(part), ""
        return (1, "qkvo".index(part), "") if part in tuple("qkvo") else (2, 0, part)

    return {name: shapes[name] for name in sorted(shapes, key=key)}


def rounded(where: str, tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The tensor in this dtype; as fp8 codes, saturated, and the float32 scale that they are to be multiplied by.

    CheckpointError where finite numbers leave the range of float16, and in fp8 for numbers that are not finite.
    """
    if dtype != FP8:
        result = tensor.to(dtype)
        if dtype == torch.float16 and not bool(result.isfinite().all()) and bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{where}: has numbers that float16 cannot hold: use bf16 or fp32")
        return [result]
    values = tensor.to(torch.float32, copy=True)
    largest = max(-float(values.min()), float(values.max())) if values.numel() else 0.0
    if not math.isfinite(largest):
        raise CheckpointError(f"{where}: has NaN or infinity: fp8 needs finite numbers")
    # No smaller than float32's normal numbers, so that the division stays exact enough.
    scale = torch.tensor(max(largest / LARGEST, torch.finfo(torch.float32).tiny) if largest else 1.0)
    return [values.div_(scale).clamp_(-LARGEST, LARGEST).to(FP8), scale]


# ---- names and forms -----------------------------------------------------------------------------


def _pieces(part: str, shapes: dict[str, tuple[int, ...]], layout: str, dtype: str) -> Iterator[Piece]:
    """Every tensor of a component in the new layout."""
    table = TABLES.get(part) if layout == "diffusers" else None
    entries = to_diffusers(shapes, table) if table else {name: Entry((name,), "copy") for name in shapes}
    if part == "t5" and layout == "single-file" and "shared.weight" in shapes:
        entries["encoder.embed_tokens.weight"] = Entry(("shared.weight",), "copy")  # the published file has it twice
    prefix = published.PREFIXES[part] if layout == "single-file" else ""
    scaled = dtype == "fp8-scaled" and part in ("transformer", "t5")
    for name, entry in entries.items():
        shape = _new_shape(entry, shapes[entry.sources[0]])
        linear = name.endswith(".weight") and len(shape) == 2 and not any(word in name for word in _NOT_LINEAR)
        yield Piece(prefix + name, part, entry, shape, FP8 if scaled and linear else DTYPES[dtype])
    if scaled:
        yield Piece(prefix + "scaled_fp8", part, Entry((), "copy"), (0,), FP8)


def _new_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.device("meta"):
        return tuple(revert(entry, torch.empty(shape)).shape)


def _check_taken_for_granted(checkpoint: Checkpoint, values: Values) -> None:
    """CheckpointError where the folder says of itself what a single file cannot, and it is not what readers assume."""
    scheduler = {"shift": 3.0, **(checkpoint.scheduler or {})}
    told: list[tuple[str, Any, Any]] = (
        [] if scheduler["shift"] == 3.0 else [("scheduler: shift", scheduler["shift"], 3.0)]
    )
    told += [(f"scheduler: {name}", *values) for name, *values in published.other_schedule(scheduler)]
    variant = (checkpoint.config("transformer") or {}).get("variant")
    if variant is not None:
        told.insert(0, ("transformer: variant", variant, "the published architecture"))
    for part, keys in _UNTOLD.items():
        config = checkpoint.config(part) if part in values.shapes else None
        if config and "variant" not in config:
            usual = {**_config(part, values.shapes[part], checkpoint), "attention_head_dim": 64}
            told += [(f"{part}: {k}", config[k], usual[k]) for k in keys if k in config and config[k] != usual[k]]
    if told:
        what, is_, expected = told[0]
        raise CheckpointError(
            f"{checkpoint.path}: {what} is {is_!r}; readers of a single file, which cannot say so, take {expected!r}: "
            "use --layout diffusers"
        )


# What pictures depend on and no shape tells.
_UNTOLD = {
    "transformer": ("attention_head_dim",),
    "vae": ("norm_num_groups", "scaling_factor", "shift_factor"),
    "clip_l": ("num_attention_heads", "hidden_act", "layer_norm_eps"),
    "clip_g": ("num_attention_heads", "hidden_act", "layer_norm_eps"),
    "t5": ("layer_norm_epsilon", "relative_attention_max_distance"),
}


def _config(part: str, shapes: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> dict[str, Any]:
    """The component's config.json, from the shapes of its tensors."""
    try:
        if part == "transformer":
            return published.transformer_config(shapes)
        if part == "vae":
            return published.vae_config(shapes)
        return published.t5_config(shapes) if part == "t5" else published.clip_config(shapes)
    except KeyError as missing:
        name = checkpoint.component(part).spelled(missing.args[0], shapes)
        raise CheckpointError(f"{checkpoint.path}: {part} lacks {name}") from None
    except (ValueError, TypeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{checkpoint.path}: {part}: sizes without sense: {error}") from None


# ---- files ---------------------------------------------------------------------------------------


def _write(path: Path, pieces: Sequence[Piece], values: Values, bar: Any) -> None:
    write_safetensors(path, [item for piece in pieces for item in piece.items], _tensors(pieces, values, bar))


def _tensors(pieces: Sequence[Piece], values: Values, bar: Any) -> Iterator[Tensor]:
    for piece in pieces:
        if not piece.entry.sources:  # the marker
            yield torch.empty(piece.shape, dtype=piece.dtype)
            continue
        tensor = revert(piece.entry, values.read(piece.part, piece.entry.sources[0]))
        yield from rounded(values.where(piece.part, piece.entry.sources[0]), tensor, piece.dtype)
        bar.update(piece.bytes)


def _write_folder(
    out: Path, checkpoint: Checkpoint, pieces: dict[str, list[Piece]], values: Values, bar: Any
) -> None:  # fmt: skip
    for part, own in pieces.items():
        folder, stem = out / published.FOLDERS[part], published.STEMS[part]
        folder.mkdir(parents=True)
        published.write_json(folder / "config.json", _new_config(part, own, checkpoint, values))
        shards = published.split(own, [piece.bytes for piece in own], published.SHARD_BYTES[stem])
        names = published.shard_names(stem, len(shards))
        for name, shard in zip(names, shards):
            _write(folder / name, shard, values, bar)
        if len(shards) > 1:
            weight_map = {item.name: name for name, s in zip(names, shards) for piece in s for item in piece.items}
            index = {"metadata": {"total_size": sum(piece.bytes for piece in own)}, "weight_map": weight_map}
            published.write_json(folder / f"{stem}.safetensors.index.json", index)
    published.write_pipeline_files(
        out, list(pieces), checkpoint.tokenizers, checkpoint.defaults or None, scheduler=checkpoint.scheduler
    )


def _new_config(part: str, pieces: list[Piece], checkpoint: Checkpoint, values: Values) -> dict[str, Any]:
    """The input's own config.json where it has one, for what shapes do not tell."""
    config = checkpoint.config(part)
    if config is not None and "variant" in config:  # of which only its own file knows what shapes mean
        return config
    derived = _config(part, values.shapes[part], checkpoint)
    config = config or derived
    if part.startswith("clip"):  # a projection may have been added
        config |= {key: derived[key] for key in ("architectures", "projection_dim")}
    if published.STEMS[part] == "model":
        dtype = next(piece.dtype for piece in pieces if piece.dtype != FP8)
        config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
        config.pop("dtype", None)  # transformers 5 writes this in its place
    return config
