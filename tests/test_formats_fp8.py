"""fp8: every code's value written out, scales in both styles, every scale that is not understood refused by name."""

import json
import math
from pathlib import Path

import pytest
import torch
from forms import E4M3, E5M2, scaled, unscaled
from layouts import Tensors, check_tensors, toy_parts, write
from manifests import golden, manifest
from said import fp8_value

from mmdit.driver.building import build
from weights import CheckpointError, Component, fill, open_checkpoint


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    return toy_parts(tmp_path_factory.mktemp("toy") / "folder")


def component(file: Path) -> Component:
    return open_checkpoint(file).component("transformer")


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        component(file)
    message = str(caught.value)
    assert str(file) in message
    assert message.isprintable()
    return message


# ---- the number formats --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale", [None, 0.0123456789])
def test_all_codes(toy: dict[str, Tensors], tmp_path: Path, dtype: torch.dtype, scale: float | None) -> None:
    """256 bytes: plain as they are, scaled as the one float32 product."""
    assert [fp8_value(c, 4) for c in (0x01, 0x07, 0x08, 0x38, 0x7E, 0xB8)] == [2**-9, 7 * 2**-9, 2**-6, 1, 448, -1]
    assert [fp8_value(c, 5) for c in (0x01, 0x04, 0x3C, 0x7B, 0x7C)] == [2**-16, 2**-14, 1, 57344, math.inf]
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    key = "y_embedder.mlp.2.weight"
    tensors = {**toy["transformer"], key: codes.view(16, 16)}
    if scale is not None:
        tensors["y_embedder.mlp.2.scale_weight"] = torch.tensor(scale)
    got = component(write(tmp_path / "file", tensors)).read(key)
    expected = torch.tensor([fp8_value(c, 4 if dtype == E4M3 else 5) for c in range(256)], dtype=torch.float32)
    if scale is not None:
        expected = expected * torch.tensor(scale, dtype=torch.float32)
    assert got.dtype == (torch.float16 if scale is None else torch.float32)
    assert torch.equal(got.float().flatten().nan_to_num(7e7), expected.nan_to_num(7e7))


def test_a_product_is_rounded_once(toy: dict[str, Tensors], tmp_path: Path) -> None:
    """1.5 * (1 + 2^-8) in float32 is 1.505859375, bfloat16 1.5078125; rounding the scale first gives 1.5."""
    scale = 1 + 2**-8
    layer, width = "context_embedder", toy["transformer"]["context_embedder.weight"].shape
    tensors = {**toy["transformer"], f"{layer}.weight": torch.full(width, 1.5).to(E4M3),
               f"{layer}.weight_scale": torch.tensor(scale)}  # fmt: skip
    part = component(write(tmp_path / "file", tensors))
    module = fill(build(part), part, dtype=torch.bfloat16)
    assert float(module.context_embedder.weight[0, 0]) == 1.5078125
    assert float(torch.tensor(1.5).bfloat16() * torch.tensor(scale).bfloat16()) == 1.5
    assert part.dtypes[f"{layer}.weight"] == torch.float32


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_model_all_in_plain_fp8(toy: dict[str, Tensors], tmp_path: Path, dtype: torch.dtype) -> None:
    """Biases, norms, embeddings and the position table too, as published T5 files have them."""
    for part in ("transformer", "t5", "clip_g", "vae"):
        stored = {name: tensor.to(dtype) for name, tensor in toy[part].items()}
        file = write(tmp_path / "file", stored)
        base = file if part == "transformer" else write(tmp_path / "base", toy["transformer"])
        loaded = open_checkpoint(base, {} if part == "transformer" else {part: file}).component(part)
        check_tensors(loaded, {name: tensor.half() for name, tensor in stored.items()})


# ---- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["older", "notes", "metadata", "bare"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scales_in_every_style(
    toy: dict[str, Tensors], tmp_path: Path, style: str, dtype: torch.dtype, prefix: str
) -> None:
    """One set of weights; biases in fp8 have no scale and are cast."""
    stored, metadata = scaled(toy["transformer"], style, dtype, prefix)
    part = component(write(tmp_path / "file", stored, metadata))
    check_tensors(part, unscaled(stored, prefix))
    fill(build(part), part, dtype=torch.bfloat16)


def test_metadata_may_name_layers_without_the_prefix(toy: dict[str, Tensors], tmp_path: Path) -> None:
    stored, _ = scaled(toy["transformer"], "metadata", prefix="model.diffusion_model.")
    _, metadata = scaled(toy["transformer"], "metadata")
    check_tensors(component(write(tmp_path / "f", stored, metadata)), unscaled(stored, "model.diffusion_model."))


def test_bytes_in_a_u8_container(toy: dict[str, Tensors], tmp_path: Path) -> None:
    stored, _ = scaled(toy["transformer"], "notes")
    held = {key: tensor.view(torch.uint8) if tensor.dtype == E4M3 and key.endswith("weight") else tensor
            for key, tensor in stored.items()}  # fmt: skip
    check_tensors(component(write(tmp_path / "file", held)), unscaled(stored))


@pytest.mark.parametrize("name", ["t5xxl.fp8_e4m3fn_scaled_389", "t5xxl.fp8_comfy_quant_style"])
def test_published_scaled_t5(toy: dict[str, Tensors], tmp_path: Path, name: str) -> None:
    """All names and dtypes of the published file, small; 168 layers have a scale."""
    words = {"F16": torch.float16, "F32": torch.float32, "F8_E4M3": E4M3}
    note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    tensors = {}
    for i, (key, it) in enumerate(manifest(f"{name}.dtypes").items()):
        shape = tuple(n // 64 if n >= 64 else n for n in it["shape"])
        tensors[key] = note if it["dtype"] == "U8" else torch.full(shape, 1.0 + i % 5).to(words[it["dtype"]])
    base = write(tmp_path / "base", toy["transformer"])
    loaded = open_checkpoint(base, {"t5": write(tmp_path / "t5", tensors)}).component("t5")
    assert set(loaded.shapes) == set(golden()["t5"])
    assert sum(dtype == torch.float32 for dtype in loaded.dtypes.values()) == 168
    check_tensors(loaded, {k: v for k, v in unscaled(tensors).items() if k in loaded.shapes})


def note(**content: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


FP8_WEIGHT = torch.ones(16, 16).to(E4M3)
LAYER = "final_layer.linear"
REFUSED: dict[str, tuple[Tensors, str]] = {
    "nvfp4": (
        {".comfy_quant": note(format="nvfp4"), ".weight_scale": torch.ones(())},
        "quantised as 'nvfp4'; known are",
    ),
    "mxfp8": ({".comfy_quant": note(format="mxfp8")}, "quantised as 'mxfp8'"),
    "int8": ({".comfy_quant": note(format="int8_blockwise", group_size=128)}, "quantised as 'int8_blockwise'"),
    "awq": ({".comfy_quant": note(format="awq_w4a16")}, "quantised as 'awq_w4a16'"),
    "no format": ({".comfy_quant": note(form="x")}, "quantised as None"),
    "no object": ({".comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "quantised as None"),
    "no JSON": ({".comfy_quant": torch.tensor(list(b"{x"), dtype=torch.uint8)}, "comfy_quant: not JSON"),
    "no bytes": ({".comfy_quant": torch.ones(3)}, "expected a few U8 bytes"),
    "an option": ({".comfy_quant": note(format="float8_e4m3fn", convrot=True)}, "the unknown option 'convrot'"),
    "no scale": ({".comfy_quant": note(format="float8_e4m3fn")}, "its weight_scale is missing"),
    "other fp8": ({".comfy_quant": note(format="float8_e5m2"), ".weight_scale": torch.ones(())}, "which is right"),
    "second scale": ({".weight_scale_2": torch.ones(())}, "weight_scale_2: weights quantised in a way that is not"),
    "block scales": ({".weight_scale": torch.ones(4, 4)}, "has the shape [4, 4]: scales of rows or blocks"),
    "row scales": ({".weight_scale": torch.ones(16)}, "has the shape [16]: scales of rows or blocks"),
    "integer scale": ({".weight_scale": torch.ones((), dtype=torch.int32)}, "a scale must be F32, F16 or BF16"),
    "both styles": ({".weight_scale": torch.ones(()), ".scale_weight": torch.ones(())}, "its layer has two scales"),
    "not fp8": ({".weight": torch.ones(16, 16), ".scale_weight": torch.ones(())}, "should scale an fp8 weight;"),
    "gptq": ({".qweight": torch.ones(4), ".qzeros": torch.ones(4)}, "not known: use an fp16"),
    "nunchaku": ({".wscales": torch.ones(4)}, "wscales: weights quantised"),
    "unknown": ({".scale": torch.ones(())}, "scale: weights quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(toy: dict[str, Tensors], tmp_path: Path, case: str) -> None:
    """With the file, the layer and the format."""
    change, message = REFUSED[case]
    named = {LAYER + end: tensor for end, tensor in ({".weight": FP8_WEIGHT} | change).items()}
    told = refusal(write(tmp_path / "file", {**toy["transformer"], **named}))
    assert message in told
    assert LAYER in told


def test_a_scale_without_its_weight_and_without_sense(toy: dict[str, Tensors], tmp_path: Path) -> None:
    file = write(tmp_path / "file", {**toy["transformer"], "nothing.scale_weight": torch.ones(())})
    assert "nothing.scale_weight should scale an fp8 weight; there is no such weight" in refusal(file)
    for factor in (math.nan, math.inf):
        named = {f"{LAYER}.weight": FP8_WEIGHT, f"{LAYER}.scale_weight": torch.tensor(factor)}
        part = component(write(file, {**toy["transformer"], **named}))
        with pytest.raises(CheckpointError, match=r"the scale of .* is (nan|inf): expected a finite number"):
            part.read(f"{LAYER}.weight")
    for text in ("{", "[]", "{}", '{"layers": 3}'):
        file = write(tmp_path / "file", toy["transformer"], {"_quantization_metadata": text})
        assert "_quantization_metadata is not" in refusal(file)
