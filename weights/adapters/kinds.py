"""The arithmetic of every kind of adapter: factors in, a change of the weight out.

Shapes: a linear weight is `[out, in]`, a convolution's `[out, in, kh, kw]`; r ranks. All values are float32.

    LoRA     delta = up @ down                            (Hu et al. 2021, arXiv 2106.09685)
             convolution: up after down, or with a core between them (Tucker, LyCORIS locon.py)
    LoHa     delta = (w1_a @ w1_b) * (w2_a @ w2_b)        (Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS loha.py)
    LoKr     delta = kron(w1, w2)                         (Edalati et al. 2022, arXiv 2212.10650; LyCORIS lokr.py)
    diff     delta itself                                 (ComfyUI, LyCORIS full.py and norms.py)
    set      the new weight                               (ComfyUI `set_weight`)
    DoRA     W' = m * (W + s delta) / norm(W + s delta)   (Liu et al. 2024, arXiv 2402.09353), over any delta

A strength of 0 leaves the weight, 1 makes it what was trained: additive kinds are W + strength * s * delta, the others
W + strength * (W' - W).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = Mapping[str, Tensor]


class Kind(NamedTuple):
    """One kind: roles that tell it, the shape and rank its factors give, and what they multiply to.

    shape raises ValueError, on one line, for factors that do not go together; delta gets only factors that do, and
    returns `[out, in]` or `[out, in * kh * kw]` or `[out, in, kh, kw]`; rank None: alpha has no meaning.
    """

    name: str
    roles: tuple[str, ...]
    shape: Callable[[Shapes], Shape]
    rank: Callable[[Shapes], int | None]
    delta: Callable[[Tensors], Tensor]


# ---- LoRA ----------------------------------------------------------------------------------------


def lora_shape(shapes: Shapes) -> Shape:
    """down `[r, in]` or `[r, in, kh, kw]`, up `[out, r]` or `[out, r, 1, 1]`.

    With a core: mid `[r_up, r, kh, kw]`, down `[r, in, 1, 1]`, up `[out, r_up, 1, 1]`.
    """
    down, up, mid = _needed(shapes, "down"), _needed(shapes, "up"), shapes.get("mid")
    _must(len(down) in (2, 4) and len(up) in (2, 4) and set(up[2:]) <= {1}, shapes)
    if mid is None:
        _must(up[1] == down[0], shapes)
        return (up[0], *down[1:])
    _must(len(mid) == 4 and set(down[2:]) <= {1} and mid[:2] == (up[1], down[0]), shapes)
    return (up[0], down[1], *mid[2:])


def lora_delta(t: Tensors) -> Tensor:
    """up @ down; with a core, the composition of three convolutions."""
    up, down = t["up"].flatten(1), t["down"].flatten(1)
    if "mid" in t:
        return torch.einsum("oi,ijkl,jc->ockl", up, t["mid"], down)
    return up @ down


# ---- LoHa ----------------------------------------------------------------------------------------


def loha_shape(shapes: Shapes) -> Shape:
    """w*_a `[out, r]`, w*_b `[r, in]`; with cores: t* `[r, r, kh, kw]`, w*_a `[r, out]`, w*_b `[r, in]`."""
    halves = [_product_shape(shapes, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)]
    _must(halves[0] == halves[1], shapes)
    return halves[0]


def loha_delta(t: Tensors) -> Tensor:
    """The elementwise product of two low-rank matrices."""
    one, two = (_product(t, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    return one * two


# ---- LoKr ----------------------------------------------------------------------------------------


def lokr_shape(shapes: Shapes) -> Shape:
    """w1 `[m, n]` and w2 `[p, q]` or `[p, q, kh, kw]`, each whole or in two factors: `[m p, n q]`, with (kh, kw)."""
    w1, w2 = _lokr_factor_shape(shapes, 1), _lokr_factor_shape(shapes, 2)
    _must(len(w1) == 2 and len(w2) in (2, 4), shapes)
    return (w1[0] * w2[0], w1[1] * w2[1], *w2[2:])


def lokr_rank(shapes: Shapes) -> int | None:
    """The rank of w2, else of w1, where factored; with both whole alpha has no say (LyCORIS lokr.py)."""
    factored = next((name for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes), None)
    return shapes[factored][0] if factored else None


def lokr_delta(t: Tensors) -> Tensor:
    """Element (i p + k, j q + l) is w1[i, j] * w2[k, l]; a convolution's kernel goes with w2."""
    w1, w2 = (t[f"lokr_w{i}"] if f"lokr_w{i}" in t else _product(t, *_lokr_names(i)) for i in (1, 2))
    return torch.kron(w1, w2.flatten(1))


def _lokr_names(i: int) -> tuple[str, str, str]:
    return f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}"


def _lokr_factor_shape(shapes: Shapes, i: int) -> Shape:
    return shapes.get(f"lokr_w{i}") or _product_shape(shapes, *_lokr_names(i))


# ---- all kinds -----------------------------------------------------------------------------------

LORA = Kind("LoRA", ("down", "up", "mid"), lora_shape, lambda s: s["down"][0], lora_delta)
LOHA = Kind(
    "LoHa",
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    loha_shape,
    lambda s: s["hada_w1_b"][0],
    loha_delta,
)
LOKR = Kind(
    "LoKr",
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    lokr_shape,
    lokr_rank,
    lokr_delta,
)
DIFF = Kind("diff", ("diff",), lambda s: s["diff"], lambda _: None, lambda t: t["diff"])
SET = Kind("set", ("set_weight",), lambda s: s["set_weight"], lambda _: None, lambda t: t["set_weight"])
KINDS = (LORA, LOHA, LOKR, DIFF, SET)


def kind_of(shapes: Shapes) -> Kind | None:
    """The kind that a module's roles tell, None where they change no weight.

    Raises ValueError, on one line, for roles of two kinds, for empty tensors, and for an alpha of several numbers.
    """
    kinds = [kind for kind in KINDS if not shapes.keys().isdisjoint(kind.roles)]
    if len(kinds) > 1:
        raise ValueError(f"is {' and '.join(kind.name for kind in kinds)} at once")
    if 0 in (n for shape in shapes.values() for n in shape):
        raise ValueError("has an empty tensor")
    if math.prod(shapes.get("alpha", ())) != 1:
        raise ValueError(f"has an alpha of shape {list(shapes['alpha'])}")
    return kinds[0] if kinds else None


def fits(shape: Shape, weight: Shape) -> bool:
    """Whether a delta of `shape` is one of `weight`: equal, flattened to `[out, in * kh * kw]`, or with ones behind."""
    whole, more = shape[: len(weight)], shape[len(weight) :]
    return shape == (weight[0], math.prod(weight[1:])) or (whole == weight and set(more) <= {1})


def magnitude_shape(shapes: Shapes, weight: Shape) -> Shape | None:
    """DoRA's magnitude as a shape that multiplies `weight`: `[out, 1, ...]` or `[1, in, 1, ...]`; None without DoRA.

    PEFT's vector, `[out]` or a convolution's `[1, out, 1, 1]`, is always per output. A `dora_scale` is per output as
    `[out]`, `[out, 1, ...]` or `[1, out, 1, 1]`, and per input as `[1, in, ...]`. Raises ValueError for any other.
    """
    role = next((role for role in ("magnitude", "dora_scale") if role in shapes), None)
    if role is None:
        return None
    shape, ones = shapes[role], (1,) * (len(weight) - 1)
    per_output, per_input = (weight[0], *ones), (1, *weight[1:2], *ones[1:])
    row = role == "dora_scale" and len(shape) > 1 and shape[0] == 1
    wanted = per_input if row and not (len(shape) == 4 and shape[1] != per_input[1]) else per_output
    if len(shape) > 4 or [n for n in shape if n != 1] != [n for n in wanted if n != 1]:
        raise ValueError(f"has a DoRA magnitude {list(shape)} for a weight {list(weight)}")
    return wanted


def changed(weight: Tensor, kind: Kind, tensors: Tensors, factor: float, strength: float) -> Tensor:
    """A new tensor: `weight`, float32, under an adapter of this kind. factor: s; strength: 0 off, 1 as trained."""
    shape = magnitude_shape({role: tuple(t.shape) for role, t in tensors.items()}, tuple(weight.shape))
    if kind is LORA and shape is None and "mid" not in tensors:  # the usual case, without a delta of its own
        up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
        return torch.addmm(weight.flatten(1), up, down, alpha=strength * factor).reshape(weight.shape)
    delta = kind.delta(tensors).reshape(weight.shape)
    if kind is SET:
        return weight + strength * (delta - weight)
    if shape is None:
        return torch.add(weight, delta, alpha=strength * factor)
    magnitude = tensors["magnitude"] if "magnitude" in tensors else tensors["dora_scale"]
    return weight + strength * (decomposed(weight + factor * delta, magnitude.reshape(shape)) - weight)


def decomposed(merged: Tensor, magnitude: Tensor) -> Tensor:
    """magnitude * merged / norm: over all that the magnitude does not tell apart, outputs or inputs.

    The norm is that of the merged weight, as in training (LyCORIS, PEFT variants.py, OneTrainer); a row of zeros stays.
    """
    others = [d for d in range(merged.ndim) if magnitude.shape[d] == 1]
    norm = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
    return magnitude * merged / norm.clamp_min(torch.finfo(norm.dtype).tiny)


# ---- products of factors -------------------------------------------------------------------------


def _product_shape(shapes: Shapes, a: str, b: str, core: str) -> Shape:
    first, second, middle = _needed(shapes, a), _needed(shapes, b), shapes.get(core)
    if middle is None:
        _must(len(first) == len(second) == 2 and first[1] == second[0], shapes)
        return (first[0], second[1])
    _must(len(first) == len(second) == 2 and len(middle) == 4 and middle[:2] == (first[0], second[0]), shapes)
    return (first[1], second[1], *middle[2:])


def _product(t: Tensors, a: str, b: str, core: str) -> Tensor:
    """a @ b, or with a core the Tucker product (LyCORIS functional/general.py, rebuild_tucker)."""
    if core in t:
        return torch.einsum("ijkl,io,jc->ockl", t[core], t[a], t[b])
    return t[a] @ t[b]


def _needed(shapes: Shapes, role: str) -> Shape:
    if role not in shapes:
        raise ValueError(f"has no {role} beside {', '.join(shapes)}")
    return shapes[role]


def _must(fits_together: bool, shapes: Shapes) -> None:
    if not fits_together:
        told = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items() if len(shape) > 1)
        raise ValueError(f"has factors that do not multiply: {told}")
