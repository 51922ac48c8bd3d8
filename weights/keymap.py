"""The names of the same tensors in diffusers and in Stability's files ("native"), as data.

A row maps a diffusers module to a native one; the table below is the whole map, and the functions under it
only expand it. `{i}` counts blocks, `{j}` layers inside a block, `{rev}` is n-1-i, `{last}` is n-1, `{qkv}`
stands for q, k and v in this order. Where two rows meet on a name, the later one wins. Operations, from
diffusers to native:

    copy         the same tensor
    split3       native rows are q, k and v one under the other
    swap_halves  the two halves of the rows change places: diffusers' last modulations are (scale, shift),
                 the native ones (shift, scale)
    conv1x1      a linear weight [out, in] is a 1x1 convolution [out, in, 1, 1] natively; biases are the same

Three more occur in files of other tools (see `layouts`), from theirs to native, and have no way back:

    third        the part-th third of the rows: q, k or v of a projection stored as one
    transpose    a matrix stored [in, out]
    table        the position table [cells, D], whose leading one was dropped

References: diffusers scripts/convert_sd3_to_diffusers.py and loaders/single_file_utils.py; Stability sd3.5
mmditx.py.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """One line of the map: patterns of module names and the operation between their tensors."""

    diffusers: str
    native: str
    op: str = "copy"


class Table(NamedTuple):
    """All rows of one model, and the name prefixes whose next number counts `{i}` and `{j}`."""

    rows: tuple[Row, ...]
    diffusers_counts: tuple[str, str]
    native_counts: tuple[str, str]


class Entry(NamedTuple):
    """How to make one tensor: the names it comes from, the operation, and which third for split3 reversed or third."""

    sources: tuple[str, ...]
    op: str
    part: int = 0


_T, _J = "transformer_blocks.{i}.", "joint_blocks.{i}."

TRANSFORMER = Table(
    rows=(
        Row("pos_embed.pos_embed", "pos_embed"),
        Row("pos_embed.proj", "x_embedder.proj"),
        Row("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        Row("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        Row("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        Row("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        Row("context_embedder", "context_embedder"),
        Row("norm_out.linear", "final_layer.adaLN_modulation.1", "swap_halves"),
        Row("proj_out", "final_layer.linear"),
        Row(_T + "norm1.linear", _J + "x_block.adaLN_modulation.1"),
        Row(_T + "attn.to_{qkv}", _J + "x_block.attn.qkv", "split3"),
        Row(_T + "attn.norm_q", _J + "x_block.attn.ln_q"),
        Row(_T + "attn.norm_k", _J + "x_block.attn.ln_k"),
        Row(_T + "attn.to_out.0", _J + "x_block.attn.proj"),
        Row(_T + "attn2.to_{qkv}", _J + "x_block.attn2.qkv", "split3"),
        Row(_T + "attn2.norm_q", _J + "x_block.attn2.ln_q"),
        Row(_T + "attn2.norm_k", _J + "x_block.attn2.ln_k"),
        Row(_T + "attn2.to_out.0", _J + "x_block.attn2.proj"),
        Row(_T + "ff.net.0.proj", _J + "x_block.mlp.fc1"),
        Row(_T + "ff.net.2", _J + "x_block.mlp.fc2"),
        Row(_T + "norm1_context.linear", _J + "context_block.adaLN_modulation.1"),
        Row(_T + "attn.add_{qkv}_proj", _J + "context_block.attn.qkv", "split3"),
        Row(_T + "attn.norm_added_q", _J + "context_block.attn.ln_q"),
        Row(_T + "attn.norm_added_k", _J + "context_block.attn.ln_k"),
        Row(_T + "attn.to_add_out", _J + "context_block.attn.proj"),
        Row(_T + "ff_context.net.0.proj", _J + "context_block.mlp.fc1"),
        Row(_T + "ff_context.net.2", _J + "context_block.mlp.fc2"),
        # The last context block only feeds the attention: its modulation is a (scale, shift) pair like
        # norm_out's.
        Row(
            "transformer_blocks.{last}.norm1_context.linear",
            "joint_blocks.{last}.context_block.adaLN_modulation.1",
            "swap_halves",
        ),
    ),
    diffusers_counts=("transformer_blocks.", ""),
    native_counts=("joint_blocks.", ""),
)

# A ControlNet is a transformer's beginning: of its rows those that it has, the last block being one as the others.
# Stability AI's for SD3.5-Large mix diffusers' names with their own; as later rows win, the way back has diffusers'.
CONTROL = Table(
    rows=(
        Row(_T + "adaLN_modulation.1", _J + "x_block.adaLN_modulation.1"),
        *(Row(_T + name, _J + "x_block." + name) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        *(row for row in TRANSFORMER.rows if "{last}" not in row.native and "final_layer" not in row.native),
        Row("pos_embed_input.proj", "pos_embed_input.proj"),
        Row("controlnet_blocks.{i}", "controlnet_blocks.{i}"),
    ),
    diffusers_counts=("controlnet_blocks.", ""),
    native_counts=("controlnet_blocks.", ""),
)

_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_MID_ATTENTION = {
    # Names before diffusers 0.17; first, so that the reverse map gives today's.
    "query": ("q", "conv1x1"),
    "key": ("k", "conv1x1"),
    "value": ("v", "conv1x1"),
    "proj_attn": ("proj_out", "conv1x1"),
    "group_norm": ("norm", "copy"),
    "to_q": ("q", "conv1x1"),
    "to_k": ("k", "conv1x1"),
    "to_v": ("v", "conv1x1"),
    "to_out.0": ("proj_out", "conv1x1"),
}

_SIDES = ("encoder", "decoder")

VAE = Table(
    rows=(
        *(Row(f"{side}.conv_in", f"{side}.conv_in") for side in _SIDES),
        *(Row(f"{side}.conv_norm_out", f"{side}.norm_out") for side in _SIDES),
        *(Row(f"{side}.conv_out", f"{side}.conv_out") for side in _SIDES),
        *(
            Row("encoder.down_blocks.{i}.resnets.{j}." + d, "encoder.down.{i}.block.{j}." + n)
            for d, n in _RESNET.items()
        ),
        # Native levels count from the finest on both sides, diffusers' decoder runs from the coarsest.
        *(Row("decoder.up_blocks.{i}.resnets.{j}." + d, "decoder.up.{rev}.block.{j}." + n) for d, n in _RESNET.items()),
        Row("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder.down.{i}.downsample.conv"),
        Row("decoder.up_blocks.{i}.upsamplers.0.conv", "decoder.up.{rev}.upsample.conv"),
        *(
            Row(f"{side}.mid_block.resnets.{k}.{d}", f"{side}.mid.block_{k + 1}.{n}")
            for side in _SIDES
            for k in (0, 1)
            for d, n in _RESNET.items()
        ),
        *(
            Row(f"{side}.mid_block.attentions.0.{d}", f"{side}.mid.attn_1.{n}", op)
            for side in _SIDES
            for d, (n, op) in _MID_ATTENTION.items()
        ),
    ),
    diffusers_counts=("decoder.up_blocks.", "decoder.up_blocks.0.resnets."),
    native_counts=("decoder.up.", "decoder.up.0.block."),
)

# Of the networks whose names differ between diffusers and Stability.
TABLES: dict[str, Table] = {"transformer": TRANSFORMER, "vae": VAE, "control": CONTROL}


def module_map(table: Table, blocks: int, layers: int = 1) -> dict[str, Entry]:
    """{native module name: Entry of diffusers module names} for `blocks` blocks of `layers` layers."""
    return {row.native: Entry(row.diffusers, row.op) for row in _expand(table, blocks, layers)}


def to_native(names: Iterable[str], table: Table) -> dict[str, Entry]:
    """{native tensor name: Entry of the diffusers names it is made from}.

    Names the map does not know, and q, k, v that are not all there, stay under their own name, so that
    whoever compares with a model reports them.
    """
    left = dict.fromkeys(names)
    blocks, layers = _counts(left, table.diffusers_counts)
    result: dict[str, Entry] = {}
    for row in _expand(table, blocks, layers):
        for end in ("", ".weight", ".bias"):
            sources = tuple(name + end for name in row.diffusers)
            if all(name in left for name in sources):
                result[row.native + end] = Entry(sources, _op(row.op, end))
                for name in sources:
                    del left[name]
    return result | {name: Entry((name,), "copy") for name in left}


def to_diffusers(names: Iterable[str], table: Table) -> dict[str, Entry]:
    """{diffusers tensor name: Entry of the one native name it is made from}; unknown names stay."""
    left = dict.fromkeys(names)
    blocks, layers = _counts(left, table.native_counts)
    result: dict[str, Entry] = {}
    for native, (sources, op, _) in module_map(table, blocks, layers).items():
        for end in ("", ".weight", ".bias"):
            if native + end in left:
                del left[native + end]
                for part, name in enumerate(sources):
                    result[name + end] = Entry((native + end,), _op(op, end), part)
    return result | {name: Entry((name,), "copy") for name in left}


VIEWS = ("copy", "conv1x1", "table", "third")  # the operations that need no memory


def convert(op: str, tensors: Sequence[torch.Tensor], part: int = 0) -> torch.Tensor:
    """Apply `op` to native; those of `VIEWS` return views. The caller checks shapes."""
    if op == "split3":
        return torch.cat(list(tensors))
    (tensor,) = tensors
    if op == "third":
        return tensor.chunk(3)[part]
    if op == "transpose":
        return tensor.t().contiguous()
    if op == "swap_halves":
        return torch.cat(tensor.chunk(2)[::-1])
    if op in ("conv1x1", "table"):
        return tensor.reshape(converted_shape(op, [tuple(tensor.shape)]))
    return tensor


def revert(entry: Entry, tensor: torch.Tensor) -> torch.Tensor:
    """Apply the operation of an Entry of `to_diffusers`: the native tensor in, the diffusers one out."""
    if entry.op == "split3":
        return tensor.chunk(3)[entry.part]
    if entry.op == "swap_halves":
        return convert("swap_halves", [tensor])
    if entry.op == "conv1x1":
        return tensor.flatten(1)
    return tensor


def converted_shape(op: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape `convert` gives for inputs of these shapes.

    Inputs the operation cannot take (q, k, v of different widths) raise ValueError; a 1x1 convolution may be
    stored with any number of trailing ones.
    """
    first = shapes[0]
    if op == "split3":
        if any(len(s) == 0 or s[1:] != first[1:] for s in shapes):
            raise ValueError(f"cannot stack {' '.join(str(list(s)) for s in shapes)}")
        return (sum(s[0] for s in shapes), *first[1:])
    if op == "swap_halves" and (len(first) == 0 or first[0] % 2):
        raise ValueError(f"cannot halve the rows of {list(first)}")
    if op == "third":
        if len(first) == 0 or first[0] % 3:
            raise ValueError(f"cannot cut the rows of {list(first)} in three")
        return (first[0] // 3, *first[1:])
    if op == "transpose":
        if len(first) != 2:
            raise ValueError(f"cannot transpose {list(first)}")
        return (first[1], first[0])
    if op == "table" and len(first) == 2:
        return (1, *first)
    if op == "conv1x1" and len(first) >= 2 and all(n == 1 for n in first[2:]):
        return (*first[:2], 1, 1)
    return first


def _op(op: str, end: str) -> str:
    return "copy" if op == "conv1x1" and end != ".weight" else op


class _Expanded(NamedTuple):
    diffusers: tuple[str, ...]
    native: str
    op: str


def _expand(table: Table, blocks: int, layers: int) -> list[_Expanded]:
    """Every row with its numbers filled in, one entry for each pair of names: the later row of two wins."""
    found: dict[tuple[str, ...], _Expanded] = {}
    for row in table.rows:
        for i in range(blocks) if "{i}" in row.diffusers else (0,):
            for j in range(layers) if "{j}" in row.diffusers else (0,):
                numbers = {"i": i, "j": j, "rev": blocks - 1 - i, "last": blocks - 1}
                letters = "qkv" if row.op == "split3" else "-"
                names = tuple(row.diffusers.format(qkv=letter, **numbers) for letter in letters)
                found[names] = _Expanded(names, row.native.format(**numbers), row.op)
    return list(found.values())


def _counts(names: Iterable[str], prefixes: tuple[str, str]) -> tuple[int, int]:
    """How many different numbers follow each prefix: blocks and layers; no prefix counts as one layer."""
    outer, inner = ({n[len(p) :].split(".")[0] for n in names if p and n.startswith(p)} for p in prefixes)
    return len(outer), max(len(inner), 1)
