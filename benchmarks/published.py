"""What surrounds the tensors in published SD3 checkpoints: folders, file names, prefixes, config files.

Values are those of the SD3 and SD3.5 folders on the Hugging Face hub.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from text_encoders.clip import CLIPConfig
from text_encoders.t5 import T5Config
from vae.autoencoder import VAEConfig

T = TypeVar("T")

FOLDERS = {
    "transformer": "transformer",
    "vae": "vae",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
}
PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
STEMS = {part: "model" if folder.startswith("text") else "diffusion_pytorch_model" for part, folder in FOLDERS.items()}
SHARD_BYTES = {"diffusion_pytorch_model": 10_000_000_000, "model": 5_000_000_000}

_CLASSES = {
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
}
_VERSION = {"_diffusers_version": "0.31.0"}


def split(items: Sequence[T], sizes: Sequence[int], limit: int) -> list[list[T]]:
    """Items in order, cut into shards of at most `limit` bytes; a larger item stands alone."""
    shards: list[list[T]] = [[]]
    room = limit
    for item, size in zip(items, sizes):
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= size
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """File names as transformers and diffusers number them; one shard has the plain name."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as readable JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_pipeline_files(
    out: Path,
    parts: Sequence[str],
    tokenizers: Path | None,
    defaults: dict[str, Any] | None,
    shift: float = 3.0,
) -> None:
    """model_index.json, scheduler, tokenizers (copied) and mmdit.json of a folder with these components."""
    present = {FOLDERS[part] for part in parts} | {"scheduler"}
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if tokenizers is not None and (tokenizers / name).is_dir():
            shutil.copytree(tokenizers / name, out / name, dirs_exist_ok=True)
            present.add(name)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", scheduler | _VERSION)
    classes = {name: kind if name in present else [None, None] for name, kind in _CLASSES.items()}
    index = {"_class_name": "StableDiffusion3Pipeline", **_VERSION, **classes}
    write_json(out / "model_index.json", index | {"scheduler": ["diffusers", scheduler["_class_name"]]})
    if defaults is not None:
        write_json(out / "mmdit.json", defaults)


def transformer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """transformer/config.json of the model with these native tensors."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    qk_norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = qk_norm[0] if qk_norm else 64
    depth = len({name.split(".")[1] for name in shapes if name.startswith("joint_blocks.")})
    dual = [i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes]
    config = {
        "_class_name": "SD3Transformer2DModel",
        **_VERSION,
        "attention_head_dim": head,
        "caption_projection_dim": width,
        "in_channels": channels,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "num_attention_heads": width // head,
        "num_layers": depth,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "patch_size": patch,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "sample_size": 128,
    }
    if qk_norm:
        config["qk_norm"] = "rms_norm"
    if dual:
        config["dual_attention_layers"] = dual
    return config


def vae_config(config: VAEConfig) -> dict[str, Any]:
    """vae/config.json."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.image_channels,
        "sample_size": 1024,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def clip_config(config: CLIPConfig) -> dict[str, Any]:
    """text_encoder/config.json; a CLIP without projection is a CLIPTextModel."""
    return {
        "architectures": ["CLIPTextModel" if config.projection_dim is None else "CLIPTextModelWithProjection"],
        "bos_token_id": 0,
        # Long out of date, and meaningful: with 2, transformers pools at the largest token id of the prompt.
        "eos_token_id": 2,
        "hidden_act": config.activation,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "pad_token_id": 1,
        "projection_dim": config.projection_dim or config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def t5_config(config: T5Config) -> dict[str, Any]:
    """text_encoder_3/config.json."""
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": config.eps,
        "model_type": "t5",
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.num_buckets,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
