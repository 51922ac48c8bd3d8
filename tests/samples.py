"""The smallest valid files of every kind."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from reference import randomize
from safetensors.torch import save
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from text_encoders.clip import CLIPConfig, CLIPTextEncoder
from text_encoders.t5 import T5Config, T5Encoder
from vae.autoencoder import Autoencoder, VAEConfig
from weights import published
from weights.keymap import TRANSFORMER, VAE, revert, to_diffusers

Tensors = dict[str, Tensor]
E4M3 = torch.float8_e4m3fn

TRANSFORMER_CONFIG = MMDiTConfig(
    patch_size=1, in_channels=2, hidden_size=4, depth=1, num_heads=1, pos_embed_max_size=2, pooled_size=8,
    context_size=4, dual_attention_blocks=(),
)  # fmt: skip
CLIP_CONFIG = CLIPConfig(
    vocab_size=5, hidden_size=4, intermediate_size=6, num_layers=1, num_heads=1, max_length=3, projection_dim=4,
    activation="quick_gelu",
)  # fmt: skip
T5_CONFIG = T5Config(vocab_size=5, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2, num_buckets=4)
VAE_CONFIG = VAEConfig(
    block_out_channels=(2,), layers_per_block=1, latent_channels=2, image_channels=3, norm_num_groups=1
)
VAE_TENSORS = ("decoder.mid.block_1.conv1.weight", "decoder.conv_in.weight", "encoder.conv_in.bias", "decoder.a")


def tensors(kind: type[nn.Module], config: object) -> Tensors:
    """Random values of a network."""
    return {name: tensor.half() for name, tensor in randomize(kind(config), 0).state_dict().items()}


def transformer() -> Tensors:
    return tensors(MMDiT, TRANSFORMER_CONFIG)


def plain_fp8() -> Tensors:
    return {name: tensor.to(E4M3) for name, tensor in transformer().items()}


def wide_transformer() -> Tensors:
    """One whose rows are as long as a block of GGUF."""
    return tensors(MMDiT, replace(TRANSFORMER_CONFIG, hidden_size=32))


def single_file() -> Tensors:
    """Transformer, both CLIPs, T5, and four tensors of an autoencoder, as a whole one without its config is large."""
    parts = {
        "transformer": transformer(),
        "clip_l": tensors(CLIPTextEncoder, CLIP_CONFIG),
        "clip_g": tensors(CLIPTextEncoder, CLIP_CONFIG),
        "t5": tensors(T5Encoder, T5_CONFIG),
        "vae": {name: torch.arange(12.0).reshape(3, 4) for name in VAE_TENSORS},
    }
    parts["clip_l"].pop("text_projection.weight")
    return {published.PREFIXES[part] + name: tensor for part, own in parts.items() for name, tensor in own.items()}


def scaled(style: str) -> tuple[Tensors, dict[str, str]]:
    """The transformer with fp8 in its linear layers, a scale each; metadata. style: older, notes or metadata."""
    stored, layers = {}, {}
    note = {"format": "float8_e4m3fn"}
    for i, (name, tensor) in enumerate(transformer().items()):
        layer, _, leaf = name.rpartition(".")
        stored[name] = tensor
        if leaf == "weight" and tensor.ndim == 2:
            stored[name] = tensor.to(E4M3)
            stored[layer + (".scale_weight" if style == "older" else ".weight_scale")] = torch.tensor(0.01 * (i + 1))
            layers[layer] = note
            if style == "notes":
                stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    if style == "older":
        stored["scaled_fp8"] = torch.empty(0, dtype=E4M3)
    return stored, {"_quantization_metadata": json.dumps({"layers": layers})} if style == "metadata" else {}


def file(stored: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return save({name: tensor.clone().contiguous() for name, tensor in stored.items()}, metadata)


def folder() -> dict[str, bytes]:
    """A diffusers folder, its transformer in two shards; every number of a network's files is another one."""
    files = {}
    networks = {
        "transformer": (MMDiT, TRANSFORMER_CONFIG),
        "vae": (Autoencoder, VAE_CONFIG),
        "clip_l": (CLIPTextEncoder, CLIP_CONFIG),
        "t5": (T5Encoder, T5_CONFIG),
    }
    configs = {
        "transformer": published.transformer_config, "clip_l": published.clip_config,
        "vae": lambda shapes: published.vae_config(shapes, norm_num_groups=1), "t5": published.t5_config,
    }  # fmt: skip
    for part, (kind, config) in networks.items():
        native = {name: tensor.float() for name, tensor in tensors(kind, config).items()}
        place, stem = published.FOLDERS[part], published.STEMS[part]
        values = configs[part]({name: tuple(tensor.shape) for name, tensor in native.items()})
        files[f"{place}/config.json"] = json.dumps(values).encode()
        table = {"transformer": TRANSFORMER, "vae": VAE}.get(part)
        if table is not None:
            native = {n: revert(e, native[e.sources[0]]) for n, e in to_diffusers(native, table).items()}
        files |= _numbered(f"{place}/{stem}", native, 2 if part == "transformer" else 1)
    classes = {published.FOLDERS[part]: ["some", "Class"] for part in networks}
    files["model_index.json"] = json.dumps({"_class_name": "StableDiffusion3Pipeline", **classes}).encode()
    files["scheduler/scheduler_config.json"] = b'{"shift": 3.0, "use_karras_sigmas": false}'
    return files


def _numbered(stem: str, stored: Tensors, count: int) -> dict[str, bytes]:
    """The tensors with 0, 1, 2, ... for values, in so many files; names of the second half and the first differ."""
    at, numbered = 0, {}
    for name, tensor in stored.items():
        numbered[name] = torch.arange(at, at + tensor.numel(), dtype=torch.float32).reshape(tensor.shape)
        at += tensor.numel()
    if count == 1:
        return {f"{stem}.safetensors": file(numbered)}
    names = published.shard_names(Path(stem).name, count)
    shards = {shard: dict(list(numbered.items())[i::count]) for i, shard in enumerate(names)}
    index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
    files = {f"{Path(stem).parent}/{shard}": file(own) for shard, own in shards.items()}
    return {f"{stem}.safetensors.index.json": json.dumps(index).encode(), **files}


# ---- adapters ------------------------------------------------------------------------------------

# {module of a file: what of the toy it changes: (component, module, rows, whether the halves change places)}.
Targets = dict[str, tuple[str, str, tuple[int, int] | None, bool]]
_BLOCK = "joint_blocks.0.x_block."


def adapter_networks() -> dict[str, nn.Module]:
    networks = {"transformer": MMDiT(TRANSFORMER_CONFIG), "clip_l": CLIPTextEncoder(CLIP_CONFIG)}
    return {name: randomize(network, 1) for name, network in networks.items()}


def kohya() -> tuple[dict[str, bytes], Targets]:
    """One module of each kind, with alphas."""
    fc1, fc2, qkv = ("lora_unet_joint_blocks_0_x_block_" + name for name in ("mlp_fc1", "mlp_fc2", "attn_qkv"))
    context, patches, last = "lora_unet_context_embedder", "lora_unet_x_embedder_proj", "lora_unet_final_layer_linear"
    text = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    stored = {
        **_drawn(fc1, **{"lora_down.weight": (2, 4), "lora_up.weight": (16, 2), "alpha": ()}),
        **_drawn(fc2, hada_w1_a=(4, 2), hada_w1_b=(2, 16), hada_w2_a=(4, 2), hada_w2_b=(2, 16), alpha=()),
        **_drawn(qkv, lokr_w1=(3, 2), lokr_w2_a=(4, 1), lokr_w2_b=(1, 2), alpha=()),
        **_drawn(context, **{"lora_down.weight": (1, 4), "lora_up.weight": (4, 1), "dora_scale": (4, 1)}),
        **_drawn(patches, **{"lora_down.weight": (1, 2, 1, 1), "lora_up.weight": (4, 1, 1, 1), "alpha": ()}),
        **_drawn(last, diff=(2, 4), diff_b=(2,)),
        **_drawn(text, **{"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "alpha": ()}),
    }
    targets: Targets = {
        fc1: ("transformer", _BLOCK + "mlp.fc1", None, False),
        fc2: ("transformer", _BLOCK + "mlp.fc2", None, False),
        qkv: ("transformer", _BLOCK + "attn.qkv", None, False),
        context: ("transformer", "context_embedder", None, False),
        patches: ("transformer", "x_embedder.proj", None, False),
        last: ("transformer", "final_layer.linear", None, False),
        text: ("clip_l", "text_model.encoder.layers.0.self_attn.q_proj", None, False),
    }
    return {"file": file(stored, {"ss_network_dim": "2"})}, targets


def diffusers() -> tuple[dict[str, bytes], Targets]:
    """Rows of one weight, swapped halves, alphas in the metadata."""
    q, k = (f"transformer.transformer_blocks.0.attn.to_{letter}" for letter in "qk")
    last, text = "transformer.norm_out.linear", "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    stored = {
        **_drawn(q, **{"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)}),
        **_drawn(k, **{"lora_A.weight": (1, 4), "lora_B.weight": (4, 1)}),
        **_drawn(last, **{"lora_A.weight": (2, 4), "lora_B.weight": (8, 2)}),
        **_drawn(text, **{"lora_A.weight": (2, 4), "lora_B.weight": (6, 2)}),
    }
    told = {"transformer.r": 2, "transformer.lora_alpha": 3, "transformer.use_rslora": True,
            "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_k": 5, ".*linear": 0.5}}  # fmt: skip
    targets: Targets = {
        q: ("transformer", _BLOCK + "attn.qkv", (0, 4), False),
        k: ("transformer", _BLOCK + "attn.qkv", (4, 8), False),
        last: ("transformer", "final_layer.adaLN_modulation.1", None, True),
        text: ("clip_l", "text_model.encoder.layers.0.mlp.fc1", None, False),
    }
    return {"file": file(stored, {"lora_adapter_metadata": json.dumps(told)})}, targets


def peft() -> tuple[dict[str, bytes], Targets]:
    """A folder: DoRA, a bias, one alpha of its own."""
    first, out = ("base_model.model.transformer_blocks.0." + name for name in ("ff.net.0.proj", "attn.to_out.0"))
    stored = {
        **_drawn(first, **{"lora_A.weight": (2, 4), "lora_B.weight": (16, 2), "lora_magnitude_vector": (16,)}),
        **_drawn(out, **{"lora_A.weight": (2, 4), "lora_B.weight": (4, 2), "lora_B.bias": (4,)}),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "target_modules": ["to_out.0"],
              "alpha_pattern": {"attn.to_out.0": 1.5}, "rank_pattern": {}, "bias": "lora_only"}  # fmt: skip
    targets: Targets = {
        first: ("transformer", _BLOCK + "mlp.fc1", None, False),
        out: ("transformer", _BLOCK + "attn.proj", None, False),
    }
    return {"adapter_model.safetensors": file(stored), "adapter_config.json": json.dumps(config).encode()}, targets


def _drawn(module: str, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(len(module))
    return {f"{module}.{end}": torch.rand(shape, generator=generator) + 0.5 for end, shape in shapes.items()}
