"""What surrounds the tensors in published SD3 checkpoints: folders, file names, prefixes, config files.

Values are those of the SD3 and SD3.5 folders on the Hugging Face hub. The sizes in a config follow from the shapes of
the tensors; what they do not tell has the published model's value, or the one given. A config raises KeyError where a
tensor that it reads is not there.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from weights.checkpoint import PLACES

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]  # of one component's tensors, by native name

FOLDERS = {part: folder for part, (folder, _) in PLACES.items()}
STEMS = {part: stem for part, (_, stem) in PLACES.items()}
PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
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

_EULER = "FlowMatchEulerDiscreteScheduler"
# Of scheduler_config.json, what changes the noise levels or the steps besides the shift.
_SCHEDULE = {
    "_class_name": _EULER,
    "num_train_timesteps": 1000,
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
}


def other_schedule(scheduler: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, value and SD3's own value of each setting that makes this another schedule than a shifted one."""
    usual = {**{name: False for name in scheduler if name.startswith("use_")}, **_SCHEDULE}
    found = [(name, scheduler[name], value) for name, value in usual.items() if name in scheduler]
    return [(name, value, usual) for name, value, usual in found if (value or None) != (usual or None)]


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
    scheduler: dict[str, Any] | None = None,
) -> None:
    """model_index.json, scheduler, tokenizers (copied) and mmdit.json of a folder with these components.

    scheduler: a whole scheduler_config.json in the place of SD3's with this shift.
    """
    present = {FOLDERS[part] for part in parts} | {"scheduler"}
    for name in TOKENIZERS:
        if tokenizers is not None and (tokenizers / name).is_dir():
            shutil.copytree(tokenizers / name, out / name, dirs_exist_ok=True)
            present.add(name)
    plain = {"_class_name": _EULER, "num_train_timesteps": 1000, "shift": shift}
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", scheduler or plain | _VERSION)
    classes = {name: kind if name in present else [None, None] for name, kind in _CLASSES.items()}
    index = {"_class_name": "StableDiffusion3Pipeline", **_VERSION, **classes}
    write_json(
        out / "model_index.json", index | {"scheduler": ["diffusers", (scheduler or plain).get("_class_name", _EULER)]}
    )
    if defaults is not None:
        write_json(out / "mmdit.json", defaults)


def transformer_config(shapes: Shapes) -> dict[str, Any]:
    """transformer/config.json."""
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


def control_config(shapes: Shapes, pooled_zeros: bool | None = None) -> dict[str, Any]:
    """config.json of a ControlNet's folder; without a text, SD3.5-Large's.

    pooled_zeros: whether zeros stand in the place of the pooled text; where nothing is said, where there is a text.
    """
    width, channels, patch, _ = shapes["pos_embed_input.proj.weight"]
    text, depth = shapes.get("context_embedder.weight"), _count(shapes, "controlnet_blocks.")
    own = shapes["x_embedder.proj.weight"][1] if text else channels
    qk_norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = qk_norm[0] if qk_norm else 64
    return {
        "_class_name": "SD3ControlNetModel",
        **_VERSION,
        "attention_head_dim": head,
        "caption_projection_dim": width,
        "dual_attention_layers": [i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes],
        "extra_conditioning_channels": channels - own,
        "force_zeros_for_pooled_projection": text is not None if pooled_zeros is None else pooled_zeros,
        "in_channels": own,
        "joint_attention_dim": text[1] if text else None,
        "num_attention_heads": width // head,
        "num_layers": depth,
        "out_channels": own,
        "patch_size": patch,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]) if text else None,
        "pos_embed_type": "sincos" if text else None,
        "qk_norm": "rms_norm" if qk_norm else None,
        "sample_size": 128,
        "use_pos_embed": text is not None,
    }


def vae_config(
    shapes: Shapes, norm_num_groups: int = 32, scaling_factor: float = 1.5305, shift_factor: float = 0.0609
) -> dict[str, Any]:
    """vae/config.json."""
    levels = len({name.split(".")[2] for name in shapes if name.startswith("encoder.down.")})
    layers = {name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")}
    channels = shapes["encoder.conv_in.weight"][1]
    return {
        "_class_name": "AutoencoderKL",
        **_VERSION,
        "act_fn": "silu",
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": channels,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": len(layers),
        "norm_num_groups": norm_num_groups,
        "out_channels": channels,
        "sample_size": 1024,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def clip_config(shapes: Shapes, heads: int | None = None, activation: str | None = None) -> dict[str, Any]:
    """text_encoder/config.json; a CLIP without projection is a CLIPTextModel.

    By default heads are 64 wide, and a model up to 768 wide (OpenAI's) has quick_gelu, a wider one (OpenCLIP's) gelu.
    """
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "bos_token_id": 0,
        # Long out of date, and meaningful: with 2, transformers pools at the largest token id of the prompt.
        "eos_token_id": 2,
        "hidden_act": activation or ("quick_gelu" if width <= 768 else "gelu"),
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "model_type": "clip_text_model",
        "num_attention_heads": heads or max(1, width // 64),
        "num_hidden_layers": _count(shapes, "text_model.encoder.layers."),
        "pad_token_id": 1,
        "projection_dim": projection[0] if projection else width,
        "vocab_size": vocabulary,
    }


def t5_config(shapes: Shapes) -> dict[str, Any]:
    """text_encoder_3/config.json."""
    vocabulary, width = shapes["shared.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shapes[attention + "relative_attention_bias.weight"]
    layers = _count(shapes, "encoder.block.")
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "d_kv": shapes[attention + "q.weight"][0] // heads,
        "d_model": width,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "model_type": "t5",
        "num_decoder_layers": layers,
        "num_heads": heads,
        "num_layers": layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": buckets,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocabulary,
    }


def _count(shapes: Shapes, prefix: str) -> int:
    """How many different numbers follow the prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
