"""Write the trained demo model as a diffusers folder: `python -m benchmarks.emoji.export weights/demo`."""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.emoji.networks import CLIP_G, CLIP_L
from benchmarks.emoji.tokenizers import T5_LENGTH
from benchmarks.emoji.train_vae import CONFIG as VAE_CONFIG
from weights import published
from weights.keymap import TRANSFORMER, VAE, Table, revert, to_diffusers

State = dict[str, Tensor]


def export(out: Path, work: Path, defaults: dict[str, float], shift: float) -> None:
    """The averaged weights of the last checkpoints in bfloat16, with tokenizers and all configuration files.

    Of the transformer, those at the end of the last sitting that came to its end.
    """
    final = work / "mmdit-final.pt"
    trained = torch.load(final if final.exists() else work / "mmdit.pt", weights_only=True, map_location="cpu")
    refined = work / "decoder.pt"
    vae = torch.load(refined if refined.exists() else work / "vae.pt", weights_only=True, map_location="cpu")["average"]
    parts = {name: part(trained["average"], name) for name in ("clip_l", "clip_g", "t5", "transformer")}
    latent = trained["latent"]
    shapes = {name: {key: tuple(v.shape) for key, v in state.items()} for name, state in {**parts, "vae": vae}.items()}
    clips = {"clip_l": CLIP_L, "clip_g": CLIP_G}
    configs = {
        **{name: published.clip_config(shapes[name], c.num_heads, c.activation) for name, c in clips.items()},
        "t5": published.t5_config(shapes["t5"]),
        "transformer": published.transformer_config(shapes["transformer"]),
        "vae": published.vae_config(shapes["vae"], VAE_CONFIG.norm_num_groups, latent["scale"], latent["shift"]),
    }
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    published.write_pipeline_files(out, list(configs), work / "tokenizers", defaults, shift)
    for name, state in {**parts, "vae": vae}.items():
        folder = out / published.FOLDERS[name]
        folder.mkdir()
        published.write_json(folder / "config.json", configs[name])
        tables = {"transformer": TRANSFORMER, "vae": VAE}
        state = renamed(state, tables[name]) if name in tables else state
        state = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in state.items()}
        save_file(state, folder / f"{published.STEMS[name]}.safetensors", metadata={"format": "pt"})


def part(state: State, name: str) -> State:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


def renamed(state: State, table: Table) -> State:
    """Native names to those of a diffusers folder."""
    return {name: revert(entry, state[entry.sources[0]]) for name, entry in to_diffusers(state, table).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("out/emoji"), help="folder of checkpoints")
    parser.add_argument("--cfg", type=float, default=3.0, help="the model's own guidance scale")
    parser.add_argument("--shift", type=float, default=3.0, help="shift of its noise schedule")
    args = parser.parse_args()
    defaults = {"width": 128, "height": 128, "steps": 28, "cfg": args.cfg, "t5_length": T5_LENGTH}
    export(args.out, args.work, defaults, args.shift)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
