"""From the names of a file to native ones: which tensors make each, for every network and every tool that wrote it.

Layouts:

    native        Stability's names of transformer and autoencoder
    diffusers     its folders; the names of transformer and autoencoder differ (see `keymap`)
    transformers  the text encoders in every other place
    openclip      CLIP as OpenCLIP stores it: q, k and v in one tensor, the projection transposed
    llama.cpp     T5 in a GGUF file of llama.cpp's converter

References: diffusers' loaders/single_file_utils.py, ComfyUI's utils.py, llama.cpp's gguf-py/gguf/tensor_mapping.py.
"""

import re
from collections.abc import Iterable

from weights.keymap import TABLES, Entry, to_native

# Attention weights of the VAE, which some tools store without the trailing ones of a 1x1 convolution.
_MID_CONV = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight")

# What trainers and other tools leave in files and no SD3 network reads (see ComfyUI's and
# stable-diffusion.cpp's loaders, which skip the same names).
_IGNORED_STARTS = ("model_ema.", "denoiser.sigmas", "loss.")
_IGNORED_ENDS = ("logit_scale", "scaled_fp8", "embeddings.position_ids", "spiece_model", "control_type")

# The halves of a whole CLIP and a whole T5 that encode no prompt.
_OTHER_HALF = {
    "clip_l": ("visual.", "vision_model.", "visual_projection."),
    "clip_g": ("visual.", "vision_model.", "visual_projection."),
    "t5": ("decoder.", "lm_head.", "dec.", "output."),
}

_LAYER = r"transformer\.resblocks\.(\d+)\."
_TO_LAYER = r"text_model.encoder.layers.\1."

# (pattern of a whole name, the name here).
_OPENCLIP = (
    (r"positional_embedding", r"text_model.embeddings.position_embedding.weight"),
    (r"token_embedding\.weight", r"text_model.embeddings.token_embedding.weight"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
    (_LAYER + r"ln_([12])\.(weight|bias)", _TO_LAYER + r"layer_norm\2.\3"),
    (_LAYER + r"mlp\.c_fc\.(weight|bias)", _TO_LAYER + r"mlp.fc1.\2"),
    (_LAYER + r"mlp\.c_proj\.(weight|bias)", _TO_LAYER + r"mlp.fc2.\2"),
    (_LAYER + r"attn\.out_proj\.(weight|bias)", _TO_LAYER + r"self_attn.out_proj.\2"),
)
_IN_PROJECTION = re.compile(_LAYER + r"attn\.in_proj_(weight|bias)")

_BLOCK = r"enc\.blk\.(\d+)\."
_TO_BLOCK = r"encoder.block.\1.layer."

_LLAMA_CPP_T5 = (
    (r"token_embd\.weight", r"shared.weight"),
    (r"enc\.output_norm\.weight", r"encoder.final_layer_norm.weight"),
    (_BLOCK + r"attn_([qkvo])\.weight", _TO_BLOCK + r"0.SelfAttention.\2.weight"),
    (_BLOCK + r"attn_rel_b\.weight", _TO_BLOCK + r"0.SelfAttention.relative_attention_bias.weight"),
    (_BLOCK + r"attn_norm\.weight", _TO_BLOCK + r"0.layer_norm.weight"),
    (_BLOCK + r"ffn_gate\.weight", _TO_BLOCK + r"1.DenseReluDense.wi_0.weight"),
    (_BLOCK + r"ffn_up\.weight", _TO_BLOCK + r"1.DenseReluDense.wi_1.weight"),
    (_BLOCK + r"ffn_down\.weight", _TO_BLOCK + r"1.DenseReluDense.wo.weight"),
    (_BLOCK + r"ffn_norm\.weight", _TO_BLOCK + r"1.layer_norm.weight"),
)


def is_ignored(key: str) -> bool:
    """Whether no network reads this tensor, under its name in the file."""
    return key.startswith(_IGNORED_STARTS) or key.endswith(_IGNORED_ENDS)


def native_entries(name: str, layout: str, keys: Iterable[str]) -> dict[str, Entry]:
    """{native name: Entry} of the component `name`, from its tensors' names without prefix.

    Names that the layout does not know stay, so that whoever compares with a model reports them.
    """
    keys = [key for key in keys if not is_ignored(key) and not key.startswith(_OTHER_HALF.get(name, ("\0",)))]
    if name in TABLES:
        return to_native(keys, TABLES[name]) if layout == "diffusers" else _published_entries(keys)
    if name == "t5":
        return _t5_entries(keys)
    return _clip_entries(name, layout, keys)


def _published_entries(keys: Iterable[str]) -> dict[str, Entry]:
    entries = {key: Entry((key,), "conv1x1" if _MID_CONV.fullmatch(key) else "copy") for key in keys}
    if "pos_embed" in entries:
        entries["pos_embed"] = Entry(("pos_embed",), "table")
    return entries


def _clip_entries(name: str, layout: str, keys: Iterable[str]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for key in keys:
        match = _IN_PROJECTION.fullmatch(key)
        if match:
            for part, letter in enumerate("qkv"):
                native = f"text_model.encoder.layers.{match[1]}.self_attn.{letter}_proj.{match[2]}"
                entries[native] = Entry((key,), "third", part)
        elif key == "text_projection":  # a bare parameter, used as x @ P, where a linear layer's weight is P transposed
            entries["text_projection.weight"] = Entry((key,), "transpose")
        elif key != "attn_mask":
            entries[_with_text_model(_renamed(key, _OPENCLIP))] = Entry((key,), "copy")
    if name == "clip_l" and layout != "diffusers":
        # Stability's code never applies CLIP-L's projection; files that have one come from other tools.
        entries.pop("text_projection.weight", None)
    return entries


def _with_text_model(key: str) -> str:
    """transformers 5.6 dropped the `text_model.` of a CLIPTextModel; published files have it."""
    return f"text_model.{key}" if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key


def _t5_entries(keys: Iterable[str]) -> dict[str, Entry]:
    """A T5's embedding is stored as `shared`, `encoder.embed_tokens`, or both."""
    shared, alias = "shared.weight", "encoder.embed_tokens.weight"
    entries = {_renamed(key, _LLAMA_CPP_T5): Entry((key,), "copy") for key in keys}
    if alias in entries:
        entries.setdefault(shared, entries.pop(alias))
    return entries


def _renamed(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in table:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(name)
    return key
