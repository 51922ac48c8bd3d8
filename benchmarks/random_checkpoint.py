"""Checkpoints with random weights in the published layouts, from toy to full size.

    python -m benchmarks.random_checkpoint OUT --model sd35-medium --layout diffusers --dtype bf16 --clips --t5

Names and shapes come from the modules, built without memory; every tensor is drawn, rounded and written
before the next, so that 15 GB on disk need little more than the largest tensor in memory. One seed gives one
set of values: each tensor has its own generator, seeded by its native name, whatever the layout and dtype it
is then written in. A GPU (`--device cuda`) draws in seconds what takes a CPU minutes, and draws other values.

The weights are scaled to keep activations near unit size through all blocks; pictures made with them are
noise.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, TOY
from mmdit.model import MMDiT
from text_encoders.clip import CLIP_G, CLIP_L, CLIPConfig, CLIPTextEncoder
from text_encoders.t5 import T5_XXL, T5Config, T5Encoder
from vae.autoencoder import SD3_VAE, TOY_VAE, Autoencoder
from weights import published, write
from weights.keymap import TRANSFORMER, VAE, Entry, revert, to_diffusers
from weights.write import write_safetensors

MODELS = {"sd35-medium": SD35_MEDIUM, "sd3-medium": SD3_MEDIUM, "sd35-large": SD35_LARGE, "toy": TOY}
LAYOUTS = ("diffusers", "single-file")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Shapes = dict[str, tuple[int, ...]]


class Part(NamedTuple):
    """One network to write: its tensors' shapes under native names and its config.json."""

    shapes: Shapes
    config: dict[str, Any]


def write_checkpoint(
    out: str | Path,
    model: str = "toy",
    layout: str = "diffusers",
    dtype: str = "fp32",
    clips: bool = True,
    t5: bool = True,
    seed: int = 0,
    tokenizers: str | Path | None = None,
    *,
    clip_vocab: int = 49408,
    t5_vocab: int = 32128,
    max_shard_bytes: int | None = None,
    defaults: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Path:
    """Write a random checkpoint to `out`, a new folder or file, and return its path.

    tokenizers: a folder with tokenizer/, tokenizer_2/, tokenizer_3/ to copy in; clip_vocab, t5_vocab:
    embedding rows of the toy's encoders; max_shard_bytes: split a diffusers component above this size (None:
    as published, 10 GB for transformer and VAE, 5 GB for text encoders); defaults: content of mmdit.json. These
    two need the diffusers layout. device: where the values are drawn. Raises ValueError for an unknown model, layout
    or dtype.
    """
    for value, known in ((model, MODELS), (layout, LAYOUTS), (dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{value!r} is not one of {', '.join(known)}")
    out = Path(out)
    parts = _parts(model, layout, clips, t5, clip_vocab, t5_vocab)
    values = Values(DTYPES[dtype], seed, device)
    if layout == "single-file":
        if tokenizers is not None or defaults is not None:
            raise ValueError("a single file has no place for tokenizers or defaults")
        _write_single_file(out, parts, values)
    else:
        _write_folder(out, parts, values, max_shard_bytes)
        published.write_pipeline_files(out, list(parts), None if tokenizers is None else Path(tokenizers), defaults)
    return out


def _parts(model: str, layout: str, clips: bool, t5: bool, clip_vocab: int, t5_vocab: int) -> dict[str, Part]:
    toy = model == "toy"
    clip_l, clip_g, t5_config = (CLIP_L, CLIP_G, T5_XXL)
    transformer, vae = _shapes(MMDiT, MODELS[model]), _shapes(Autoencoder, TOY_VAE if toy else SD3_VAE)
    if toy:
        clip_l, clip_g = toy_clips(transformer["y_embedder.mlp.0.weight"][1], clip_vocab)
        t5_config = toy_t5(transformer["context_embedder.weight"][1], t5_vocab)
    if layout == "diffusers":
        # The published folder gives CLIP-L an identity projection that the single file leaves out.
        clip_l = replace(clip_l, projection_dim=clip_l.hidden_size)
    parts = {
        "transformer": Part(transformer, published.transformer_config(transformer)),
        "vae": Part(vae, published.vae_config(vae)),
    }
    for name, config in {"clip_l": clip_l, "clip_g": clip_g}.items() if clips else ():
        shapes = _shapes(CLIPTextEncoder, config)
        parts[name] = Part(shapes, published.clip_config(shapes, activation=config.activation))
    if t5:
        shapes = _shapes(T5Encoder, t5_config)
        parts["t5"] = Part(shapes, published.t5_config(shapes))
    return parts


def toy_clips(pooled: int, vocab: int) -> tuple[CLIPConfig, CLIPConfig]:
    """Two CLIPs whose pooled vectors together are `pooled` wide: 64 and the rest, heads of 64."""
    # quick_gelu in both: a reader without a config takes a CLIP this narrow for OpenAI's.
    sizes = {"vocab_size": vocab, "num_layers": 2, "activation": "quick_gelu"}
    narrow, wide = 64, pooled - 64
    assert wide in range(64, pooled, 64), f"no two CLIPs with heads of 64 make {pooled}"
    return (
        replace(CLIP_L, hidden_size=narrow, intermediate_size=4 * narrow, num_heads=narrow // 64, **sizes),
        replace(
            CLIP_G,
            hidden_size=wide,
            intermediate_size=4 * wide,
            num_heads=wide // 64,
            projection_dim=wide,
            **sizes,
        ),
    )


def toy_t5(width: int, vocab: int) -> T5Config:
    """A two-block T5 of this width, heads of 16."""
    return replace(T5_XXL, vocab_size=vocab, d_model=width, d_ff=2 * width, d_kv=16, num_heads=4, num_layers=2)


def _shapes(kind: Callable[[Any], nn.Module], config: Any) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}


# ---- values --------------------------------------------------------------------------------------


class Values(NamedTuple):
    """How the numbers of a checkpoint are made."""

    dtype: torch.dtype
    seed: int
    device: str  # where they are drawn; each kind of device has values of its own


def draw(seed: int, part: str, name: str, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """The fp32 values of one tensor, a function of its arguments alone."""
    if name == "pos_embed":
        return pos_embed(shape)
    if part == "clip_l" and name == "text_projection.weight":
        return torch.eye(shape[0])
    key = hashlib.sha256(f"{seed}/{part}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
    centre, spread = _distribution(name, shape)
    return torch.empty(shape, device=device).normal_(centre, spread, generator=generator)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep activations near unit size."""
    if len(shape) == 1:
        return (1.0, 0.05) if name.endswith("weight") else (0.0, 0.02)  # norms, biases
    if "embedding" in name or name == "shared.weight" or "relative_attention_bias" in name:
        return 0.0, 0.5
    spread = 1 / math.sqrt(math.prod(shape[1:]))
    if "adaLN_modulation" in name:
        return 0.0, 0.3 * spread
    if "SelfAttention.q." in name:
        return 0.0, spread / 8  # T5 does not divide its logits by the root of the head width
    return 0.0, spread


def pos_embed(shape: tuple[int, ...]) -> Tensor:
    """The published position table [1, M*M, D]: sines and cosines of the column, then of the row.

    Coordinates are (i - (M - 64) / 2) / 4 patches, frequencies 10000^(-k / (D/4)).
    """
    _, cells, width = shape
    side = math.isqrt(cells)
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = ((torch.arange(side, dtype=torch.float64) - (side - 64) / 2) / 4)[:, None] * frequency  # (M, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1).float()  # (M, D/2)
    table = torch.empty(side, side, width)
    table[..., : width // 2] = axis[None, :]
    table[..., width // 2 :] = axis[:, None]
    return table.view(shape)


# ---- files ---------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One tensor of a file: the name it is stored under, its native part and Entry, its stored shape."""

    name: str
    part: str
    entry: Entry
    shape: tuple[int, ...]


def _items(part: str, shapes: Shapes, diffusers: bool) -> list[Item]:
    if not diffusers or part not in ("transformer", "vae"):
        return [Item(name, part, Entry((name,), "copy"), shape) for name, shape in shapes.items()]
    entries = to_diffusers(shapes, TRANSFORMER if part == "transformer" else VAE)
    with torch.device("meta"):
        return [
            Item(name, part, entry, tuple(revert(entry, torch.empty(shapes[entry.sources[0]])).shape))
            for name, entry in entries.items()
        ]


def _write_single_file(out: Path, parts: Mapping[str, Part], values: Values) -> None:
    items = []
    for part, (shapes, _) in parts.items():
        own = _items(part, shapes, diffusers=False)
        if part == "t5":
            # The published file stores the embedding twice.
            own.append(own[0]._replace(name="encoder.embed_tokens.weight"))
        items += [item._replace(name=published.PREFIXES[part] + item.name) for item in own]
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_safetensors(out, items, _all_shapes(parts), values)


def _write_folder(out: Path, parts: Mapping[str, Part], values: Values, limit: int | None) -> None:
    for part, (shapes, config) in parts.items():
        folder = out / published.FOLDERS[part]
        folder.mkdir(parents=True, exist_ok=True)
        stem = published.STEMS[part]
        word = str(values.dtype).removeprefix("torch.")
        published.write_json(folder / "config.json", config | ({"torch_dtype": word} if stem == "model" else {}))
        items = _items(part, shapes, diffusers=True)
        sizes = [math.prod(item.shape) * values.dtype.itemsize for item in items]
        shards = published.split(items, sizes, limit or published.SHARD_BYTES[stem])
        names = published.shard_names(stem, len(shards))
        for name, shard in zip(names, shards):
            _write_safetensors(folder / name, shard, _all_shapes(parts), values)
        if len(shards) > 1:
            weight_map = {item.name: name for name, shard in zip(names, shards) for item in shard}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
            published.write_json(folder / f"{stem}.safetensors.index.json", index)


def _all_shapes(parts: Mapping[str, Part]) -> dict[str, Shapes]:
    return {part: shapes for part, (shapes, _) in parts.items()}


def _write_safetensors(path: Path, items: list[Item], shapes: Mapping[str, Shapes], values: Values) -> None:
    described = [write.Item(item.name, values.dtype, item.shape) for item in items]
    write_safetensors(path, described, _drawn(items, shapes, values))


def _drawn(items: list[Item], shapes: Mapping[str, Shapes], values: Values) -> Iterator[Tensor]:
    """Tensor after tensor; neighbours from one native tensor share its draw."""
    drawn, native = None, torch.empty(0)
    for item in items:
        source = (item.part, item.entry.sources[0])
        if source != drawn:
            native = draw(values.seed, *source, shapes[item.part][source[1]], values.device).to("cpu", values.dtype)
            drawn = source
        yield revert(item.entry, native)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, help="folder (diffusers) or file (single-file) to write")
    parser.add_argument("--model", choices=MODELS, default="toy")
    parser.add_argument("--layout", choices=LAYOUTS, default="diffusers")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--clips", action="store_true", help="write the two CLIP text encoders too")
    parser.add_argument("--t5", action="store_true", help="write the T5 text encoder too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizers", type=Path, help="folder with tokenizer/, tokenizer_2/, tokenizer_3/")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the values are drawn")
    write_checkpoint(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
