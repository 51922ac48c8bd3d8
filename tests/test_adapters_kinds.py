"""The arithmetic of every kind of adapter, written out beside it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapters import FC1, LAST, QKV, WIDTH, Toy, close, delta, lora, noise
from torch import Tensor

CONV = "x_embedder.proj"  # [128, 16, 2, 2]
IN, OUT = WIDTH, 4 * WIDTH  # of FC1


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path, "transformer")


def of(module: str, tensors: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    """Tensors by role, in ComfyUI's spelling."""
    return {f"diffusion_model.{module}.{role}": t for role, t in {**tensors, **more}.items()}


def kron(a: Tensor, b: Tensor) -> Tensor:
    """Block (i, j) is a[i, j] * b."""
    return torch.cat([torch.cat([x * b for x in row], dim=1) for row in a])


# ---- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (2.0, 0.5), (0.0, 1.0), (7.0, 1.75)])
def test_lora_adds_up_times_down(toy: Toy, alpha: float | None, factor: float) -> None:
    tensors = lora(FC1, OUT, IN, 4, alpha)
    toy.add(tensors, 0.6)
    assert close(toy.weight(f"{FC1}.weight"), toy.original(f"{FC1}.weight") + 0.6 * factor * delta(tensors, FC1))
    assert list(toy.changed()) == [("transformer", f"{FC1}.weight")]


@pytest.mark.parametrize("alpha", [torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2.0, dtype=torch.bfloat16),
                                   torch.tensor(2.0, dtype=torch.float64), torch.tensor(2)])  # fmt: skip
def test_alpha_in_every_form(toy: Toy, alpha: Tensor) -> None:
    tensors = lora(FC1, OUT, IN, 4)
    toy.add({**tensors, f"{FC1}.alpha": alpha})
    assert close(toy.changed()["transformer", f"{FC1}.weight"], 0.5 * delta(tensors, FC1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_factors_in_every_format(toy: Toy, dtype: torch.dtype) -> None:
    tensors = {key: t.to(dtype) for key, t in lora(FC1, OUT, IN).items()}
    toy.add(tensors)
    assert close(toy.changed()["transformer", f"{FC1}.weight"], delta(tensors, FC1))


def test_ranks_may_differ_by_module(toy: Toy) -> None:
    ranks = {FC1: (OUT, IN, 1), "joint_blocks.0.x_block.mlp.fc2": (IN, OUT, 9), QKV: (3 * IN, IN, 5)}
    tensors = {key: t for module, sizes in ranks.items() for key, t in lora(module, *sizes, alpha=3.0).items()}
    toy.add(tensors)
    for module, (_, _, rank) in ranks.items():
        assert close(toy.changed()["transformer", f"{module}.weight"], 3 / rank * delta(tensors, module))


def test_lora_on_a_convolution_is_two_convolutions(toy: Toy) -> None:
    down, up, latent = noise(3, 16, 2, 2), noise(WIDTH, 3, 1, 1), noise(2, 16, 4, 6)
    toy.add(of(CONV, {"lora_down.weight": down, "lora_up.weight": up}, alpha=torch.tensor(6.0)))
    change = toy.changed()["transformer", f"{CONV}.weight"]
    assert close(F.conv2d(latent.double(), change, stride=2),
                 2 * F.conv2d(F.conv2d(latent.double(), down.double(), stride=2), up.double()))  # fmt: skip


def test_lora_with_a_core_is_three_convolutions(toy: Toy) -> None:
    down, mid, up, latent = noise(3, 16, 1, 1), noise(3, 3, 2, 2), noise(WIDTH, 3, 1, 1), noise(2, 16, 4, 6)
    toy.add(of(CONV, {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, alpha=torch.tensor(1.5)))
    change = toy.changed()["transformer", f"{CONV}.weight"]
    hidden = F.conv2d(F.conv2d(latent.double(), down.double()), mid.double(), stride=2)
    assert close(F.conv2d(latent.double(), change, stride=2), 0.5 * F.conv2d(hidden, up.double()))


def test_a_linear_layer_may_be_stored_as_a_convolution(toy: Toy) -> None:
    tensors = lora(FC1, OUT, IN)
    toy.add({key: t[..., None, None] for key, t in tensors.items()})
    assert close(toy.changed()["transformer", f"{FC1}.weight"], delta(tensors, FC1))


def test_bias_of_b_has_the_scale_of_the_weight(toy: Toy) -> None:
    tensors, bias = lora(FC1, OUT, IN, 4, alpha=2.0), noise(OUT)
    toy.add({**tensors, f"{FC1}.lora_B.bias": bias}, 0.5)
    assert close(toy.changed()["transformer", f"{FC1}.weight"], 0.25 * delta(tensors, FC1))
    assert close(toy.changed()["transformer", f"{FC1}.bias"], 0.25 * bias)


# ---- LoHa ----------------------------------------------------------------------------------------


def loha(out: int, inputs: int, rank: int = 3) -> dict[str, Tensor]:
    return {
        "hada_w1_a": noise(out, rank, seed="1a"),
        "hada_w1_b": noise(rank, inputs, seed="1b"),
        "hada_w2_a": noise(out, rank, seed="2a"),
        "hada_w2_b": noise(rank, inputs, seed="2b"),
    }


def test_loha_is_the_elementwise_product_of_two(toy: Toy) -> None:
    t = loha(OUT, IN)
    toy.add(of(FC1, t, alpha=torch.tensor(6.0)), 0.5)
    one, two = t["hada_w1_a"].double() @ t["hada_w1_b"].double(), t["hada_w2_a"].double() @ t["hada_w2_b"].double()
    assert close(toy.changed()["transformer", f"{FC1}.weight"], 0.5 * 2 * one * two)


def test_loha_on_a_convolution_is_stored_flat(toy: Toy) -> None:
    t = loha(WIDTH, 16 * 4)
    toy.add(of(CONV, t))
    one, two = t["hada_w1_a"].double() @ t["hada_w1_b"].double(), t["hada_w2_a"].double() @ t["hada_w2_b"].double()
    assert close(toy.changed()["transformer", f"{CONV}.weight"], (one * two).reshape(WIDTH, 16, 2, 2))


def test_loha_with_cores(toy: Toy) -> None:
    t = {f"hada_w{i}_{s}": noise(3, n, seed=f"{i}") for i in (1, 2) for s, n in (("a", WIDTH), ("b", 16))}
    t |= {f"hada_t{i}": noise(3, 3, 2, 2, seed=f"{i}") for i in (1, 2)}
    toy.add(of(CONV, t, alpha=torch.tensor(1.0)))
    expected = torch.ones(WIDTH, 16, 2, 2, dtype=torch.float64)
    for i in (1, 2):
        a, b, core = (t[f"hada_{n}"].double() for n in (f"w{i}_a", f"w{i}_b", f"t{i}"))
        expected *= sum(
            core[x, y] * (a[x][:, None] * b[y])[..., None, None] for x in range(3) for y in range(3)
        )  # fmt: skip
    assert close(toy.changed()["transformer", f"{CONV}.weight"], expected / 3)


# ---- LoKr ----------------------------------------------------------------------------------------


def test_lokr_of_small_matrices() -> None:
    """Element (2 i + k, 2 j + l) is W1[i, j] * W2[k, l]."""
    from weights.adapters.kinds import lokr_delta

    w1 = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    rows = [[1, 0, 2, 0], [0, 1, 0, 2], [3, 0, 4, 0], [0, 3, 0, 4], [5, 0, 6, 0], [0, 5, 0, 6]]
    assert lokr_delta({"lokr_w1": w1, "lokr_w2": torch.eye(2)}).tolist() == rows


@pytest.mark.parametrize(
    ("roles", "factor"),
    [
        (("w1", "w2"), 1.0),  # both whole: alpha has no say
        (("w1", "w2_a", "w2_b"), 2.0 / 5),
        (("w1_a", "w1_b", "w2"), 2.0 / 3),
        (("w1_a", "w1_b", "w2_a", "w2_b"), 2.0 / 5),
    ],
)
def test_lokr_whole_and_in_factors(toy: Toy, roles: tuple[str, ...], factor: float) -> None:
    sizes = {"w1": (8, 4), "w1_a": (8, 3), "w1_b": (3, 4), "w2": (64, 32), "w2_a": (64, 5), "w2_b": (5, 32)}
    t = {f"lokr_{role}": noise(*sizes[role], seed=role) for role in roles}
    toy.add(of(FC1, t, alpha=torch.tensor(2.0)), 0.7)
    w1, w2 = (
        t[f"lokr_{w}"].double() if w in roles else t[f"lokr_{w}_a"].double() @ t[f"lokr_{w}_b"].double()
        for w in ("w1", "w2")
    )
    assert close(toy.changed()["transformer", f"{FC1}.weight"], 0.7 * factor * kron(w1, w2))


@pytest.mark.parametrize("form", ["whole", "flat factors", "core"])
def test_lokr_on_a_convolution(toy: Toy, form: str) -> None:
    """Over inputs and outputs, at each place of the kernel."""
    w1, rank = noise(8, 4), 3
    if form == "whole":
        w2, t = noise(16, 4, 2, 2), {}
        t["lokr_w2"] = w2
    elif form == "flat factors":
        t = {"lokr_w2_a": noise(16, rank), "lokr_w2_b": noise(rank, 4 * 4)}
        w2 = (t["lokr_w2_a"].double() @ t["lokr_w2_b"].double()).reshape(16, 4, 2, 2)
    else:
        t = {"lokr_w2_a": noise(rank, 16), "lokr_w2_b": noise(rank, 4), "lokr_t2": noise(rank, rank, 2, 2)}
        w2 = torch.stack([
            torch.stack([
                t["lokr_w2_a"].double().T @ t["lokr_t2"][:, :, y, x].double() @ t["lokr_w2_b"].double() for x in (0, 1)
            ], -1) for y in (0, 1)
        ], -2)  # fmt: skip
    toy.add(of(CONV, t, lokr_w1=w1, alpha=torch.tensor(6.0)))
    change = toy.changed()["transformer", f"{CONV}.weight"]
    for y in (0, 1):
        for x in (0, 1):
            expected = kron(w1.double(), w2[:, :, y, x].double()) * (1 if form == "whole" else 2)
            assert close(change[:, :, y, x], expected)


def test_lokr_of_the_fused_projection(toy: Toy) -> None:
    """Its blocks of rows need not end where q ends."""
    w1, w2 = noise(6, 8), noise(64, 16)
    toy.add(of(QKV, {"lokr_w1": w1, "lokr_w2": w2}))
    assert close(toy.changed()["transformer", f"{QKV}.weight"], kron(w1.double(), w2.double()))


# ---- differences ---------------------------------------------------------------------------------


def test_differences_of_weight_and_bias(toy: Toy) -> None:
    weight, bias, norm = noise(OUT, IN), noise(OUT), noise(64)
    toy.add(
        {**of(FC1, {"diff": weight, "diff_b": bias}), **of("joint_blocks.0.x_block.attn.ln_q", {"w_norm": norm})}, 0.5
    )
    assert close(toy.changed()["transformer", f"{FC1}.weight"], 0.5 * weight)
    assert close(toy.changed()["transformer", f"{FC1}.bias"], 0.5 * bias)
    assert close(toy.changed()["transformer", "joint_blocks.0.x_block.attn.ln_q.weight"], 0.5 * norm)


def test_norms_of_a_text_encoder(tmp_path: Path) -> None:
    toy, norm = Toy(tmp_path, "clip_l"), "text_model.encoder.layers.0.layer_norm1"
    weight, bias = noise(64, seed="w"), noise(64, seed="b")
    alias = "lora_te1_" + norm.replace(".", "_")
    toy.add({f"{alias}.w_norm": weight, f"{alias}.b_norm": bias})
    assert close(toy.changed()["clip_l", f"{norm}.weight"], weight)
    assert close(toy.changed()["clip_l", f"{norm}.bias"], bias)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_set_weight_replaces(toy: Toy, scale: float) -> None:
    new, old = noise(OUT, IN), toy.original(f"{FC1}.weight")
    toy.add(of(FC1, {"set_weight": new}), scale)
    assert close(toy.weight(f"{FC1}.weight"), (1 - scale) * old + scale * new.double())


# ---- DoRA ----------------------------------------------------------------------------------------


def decomposed(merged: Tensor, magnitude: Tensor, dims: tuple[int, ...]) -> Tensor:
    return magnitude.double() * merged / merged.square().sum(dims, keepdim=True).sqrt()


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize(
    ("role", "shape", "dims"),
    [
        ("lora_magnitude_vector", (OUT,), (1,)),
        ("lora_magnitude_vector.weight", (OUT,), (1,)),
        ("lora_magnitude_vector.default.weight", (OUT,), (1,)),
        ("magnitude", (OUT,), (1,)),
        ("dora_scale", (OUT, 1), (1,)),
        ("dora_scale", (OUT,), (1,)),
        ("dora_scale", (1, IN), (0,)),
    ],
)
def test_dora(toy: Toy, role: str, shape: tuple[int, ...], dims: tuple[int, ...], scale: float) -> None:
    tensors, magnitude, old = lora(FC1, OUT, IN, 4, 2.0), noise(*shape).abs() + 1, toy.original(f"{FC1}.weight")
    toy.add({**tensors, f"{FC1}.{role}": magnitude}, scale)
    wide = magnitude.reshape(OUT, 1) if dims == (1,) else magnitude
    trained = decomposed(old + 0.5 * delta(tensors, FC1), wide, dims)
    assert close(toy.weight(f"{FC1}.weight"), old + scale * (trained - old))


@pytest.mark.parametrize(
    ("role", "shape", "dims"),
    [
        ("lora_magnitude_vector", (1, WIDTH, 1, 1), (1, 2, 3)),
        ("dora_scale", (WIDTH, 1, 1, 1), (1, 2, 3)),
        ("dora_scale", (1, 16, 1, 1), (0, 2, 3)),
    ],
)
def test_dora_on_a_convolution(toy: Toy, role: str, shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    down, up, magnitude = noise(3, 16, 2, 2), noise(WIDTH, 3, 1, 1), noise(*shape).abs() + 1
    toy.add(of(CONV, {"lora_down.weight": down, "lora_up.weight": up, role: magnitude}))
    merged = toy.original(f"{CONV}.weight") + torch.einsum("or,rihw->oihw", up[..., 0, 0].double(), down.double())
    wide = magnitude.reshape(WIDTH, 1, 1, 1) if dims == (1, 2, 3) else magnitude
    assert close(toy.weight(f"{CONV}.weight"), decomposed(merged, wide, dims))


def test_dora_of_other_factors(toy: Toy) -> None:
    w1, w2, magnitude, old = noise(8, 4), noise(64, 32), noise(OUT, 1).abs() + 1, toy.original(f"{FC1}.weight")
    toy.add(of(FC1, {"lokr_w1": w1, "lokr_w2": w2, "dora_scale": magnitude}))
    assert close(toy.weight(f"{FC1}.weight"), decomposed(old + kron(w1.double(), w2.double()), magnitude, (1,)))


def test_dora_sees_the_rows_it_was_trained_on(toy: Toy) -> None:
    """Per input: over the rows of k alone where k was trained alone, over all of q, k and v where they were one."""
    old, magnitude = toy.original(f"{QKV}.weight"), noise(1, WIDTH).abs() + 1
    k = "transformer.transformer_blocks.0.attn.to_k"
    toy.add({**lora(k, WIDTH, WIDTH), f"{k}.dora_scale": magnitude}, name="k")
    new = toy.weight(f"{QKV}.weight")
    rows = slice(WIDTH, 2 * WIDTH)
    expected = old[rows] + delta(lora(k, WIDTH, WIDTH), k)
    assert close(new[rows], decomposed(expected, magnitude, (0,)))
    assert torch.equal(new[:WIDTH], toy.before["transformer", f"{QKV}.weight"][:WIDTH])
    toy.adapters.remove()

    fused = lora(QKV, 3 * WIDTH, WIDTH)
    toy.add({**fused, f"{QKV}.dora_scale": magnitude}, name="fused")
    assert close(toy.weight(f"{QKV}.weight"), decomposed(old + delta(fused, QKV), magnitude, (0,)))


@pytest.mark.parametrize("shape", [(2 * WIDTH, 1), (1, WIDTH)])
def test_dora_in_diffusers_order_of_rows(toy: Toy, shape: tuple[int, int]) -> None:
    """(scale, shift) there, (shift, scale) here: a magnitude per output goes with its row, one per input stays."""
    alias, old = "transformer.transformer_blocks.1.norm1_context.linear", toy.original(f"{LAST}.weight")
    tensors, magnitude = lora(alias, 2 * WIDTH, WIDTH), noise(*shape).abs() + 1
    toy.add({**tensors, f"{alias}.dora_scale": magnitude})
    theirs = torch.cat([old[WIDTH:], old[:WIDTH]]) + delta(tensors, alias)
    theirs = decomposed(theirs, magnitude, (1,) if shape[1] == 1 else (0,))
    assert close(toy.weight(f"{LAST}.weight"), torch.cat([theirs[WIDTH:], theirs[:WIDTH]]))


def test_dora_leaves_rows_of_zeros(toy: Toy) -> None:
    zero = -toy.original(f"{FC1}.weight").float()
    toy.add(of(FC1, {"diff": zero, "dora_scale": torch.ones(OUT, 1)}))
    assert not toy.weight(f"{FC1}.weight").any()


# ---- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of the weight and both adapters, each too small to change the weight's last bit alone."""
    toy = Toy(tmp_path, "transformer", dtype=dtype)
    old = toy.weight(f"{FC1}.weight").float()
    step = old.abs() * torch.finfo(dtype).eps * 0.3
    for name in ("one", "two"):
        toy.add(of(FC1, {"diff": step}), name=name)
    new = toy.weight(f"{FC1}.weight")
    assert new.dtype == dtype
    assert torch.equal(new, (old + step + step).to(dtype))
    assert not torch.equal(new, old.to(dtype))
    toy.adapters.remove("two")
    assert torch.equal(toy.weight(f"{FC1}.weight"), (old + step).to(dtype))
