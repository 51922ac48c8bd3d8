"""GGUF: every type against the package's own decoding, every naming, and damaged headers refused within bounds."""

import shutil
import struct
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from forms import decoded, llama_cpp, mixed, write_gguf
from gguf import GGMLQuantizationType as Type
from layouts import PARTS, Tensors, check_tensors, joined, toy_parts, write
from manifests import golden, manifest
from safetensors.torch import load_file

from benchmarks import quantise
from benchmarks.emoji.tokenizers import write_tokenizers
from benchmarks.quantise import coded
from benchmarks.random_checkpoint import write_checkpoint
from mmdit import Pipeline
from mmdit.driver.building import build
from weights import CheckpointError, fill, open_checkpoint
from weights.gguf import GGUFFile
from weights.keymap import TRANSFORMER, revert, to_diffusers
from weights.published import PREFIXES

DECODED = [t for t in Type if t.name.startswith(("Q", "IQ", "TQ", "MXFP", "NVFP", "BF16", "F16", "F32"))]
DECODED = [t for t in DECODED if t.name not in ("Q8_1", "Q8_K", "Q1_0")]  # which the package cannot decode
MARK = "joint_blocks.0.context_block.attn.qkv.weight"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    return toy_parts(tmp_path_factory.mktemp("toy") / "folder")


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    return message


# ---- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_every_type_is_what_the_package_makes_of_it(tmp_path: Path, kind: Type) -> None:
    """Random bytes, several blocks a row; long enough to be decoded in pieces."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    width = max(block, 32) * 2
    codes = np.random.default_rng(0).integers(0, 256, (7, width // block * size), dtype=np.uint8)
    if kind in (Type.F32, Type.F16):
        codes = codes.view(np.float32 if kind == Type.F32 else np.float16)
    file = GGUFFile(write_gguf(tmp_path / "file", {"before": (np.ones(3, np.float32), Type.F32), "x": (codes, kind)}))
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(codes, kind))
    assert file.tensors["x"].shape == tuple(expected.shape) == (7, width)
    for chunk in (1 << 22, 3 * width, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("weights.gguf._CHUNK", chunk)
            got = file.get_tensor("x")
        assert str(got.dtype) == "torch." + {Type.F16: "float16", Type.BF16: "bfloat16"}.get(kind, "float32")
        assert torch.equal(got.float().nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
def test_tensors_begin_at_multiples_of_the_alignment(tmp_path: Path, alignment: int) -> None:
    """That the file states, where it is not 32; of tensors whose sizes are no multiples of it."""
    stored = {str(n): (np.arange(n, dtype=np.float32) + n, Type.F32) for n in (3, 17, 1030, 5)}
    file = GGUFFile(write_gguf(tmp_path / "file", stored, alignment=alignment))
    for name, (numbers, _) in stored.items():
        assert file.get_tensor(name).tolist() == numbers.tolist()


def test_two_types_written_out(tmp_path: Path) -> None:
    """Q8_0: half-precision scale, 32 bytes; Q4_0: scale, 16 bytes whose low nibbles come first, each less 8."""
    eight = struct.pack("<e", 0.5) + bytes(range(16)) + bytes(range(240, 256))
    four = struct.pack("<e", 2.0) + bytes(16 * (15 - i) + i for i in range(16))
    stored = {"eight": (np.frombuffer(eight, np.uint8)[None], Type.Q8_0),
              "four": (np.frombuffer(four, np.uint8)[None], Type.Q4_0)}  # fmt: skip
    file = GGUFFile(write_gguf(tmp_path / "file", stored))
    assert file.get_tensor("eight").tolist() == [[i / 2 for i in range(16)] + [-i / 2 for i in range(16, 0, -1)]]
    assert file.get_tensor("four").tolist() == [[2.0 * (i - 8) for i in range(16)] + [2.0 * (7 - i) for i in range(16)]]


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_types_agree_with_diffusers(tmp_path: Path, kind: str) -> None:
    """Its decoding is torch's, not the package's."""
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    codes = np.random.default_rng(1).integers(0, 64, (4, 2 * size), dtype=np.uint8)
    if Type[kind] not in utils.dequantize_functions:
        pytest.skip(f"diffusers does not decode {kind}")
    ours = GGUFFile(write_gguf(tmp_path / "file", {"x": (codes, Type[kind])})).get_tensor("x")
    blocks = torch.from_numpy(codes).reshape(-1, size)
    theirs = utils.dequantize_functions[Type[kind]](blocks, block, size, torch.float32).reshape(4, -1)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [Type.Q8_1, Type.Q8_K, Type.I8, Type.I32])
def test_types_that_are_no_weights_are_refused(tmp_path: Path, kind: Type) -> None:
    size = gguf.GGML_QUANT_SIZES[kind][1]
    number = {Type.I8: np.int8, Type.I32: np.int32}.get(kind, np.uint8)
    codes = np.zeros((1, 4 if number != np.uint8 else size), number)
    told = refusal(write_gguf(tmp_path / "file", {MARK: (codes, kind)}))
    assert f"{MARK}: {kind.name} is a GGUF type that cannot be decoded" in told


def test_plain_types_are_views_of_the_file(toy: dict[str, Tensors], tmp_path: Path) -> None:
    component = open_checkpoint(write_gguf(tmp_path / "f", mixed(toy["transformer"]))).component("transformer")
    assert component.read("pos_embed").data_ptr() == component.read("pos_embed").data_ptr()
    component.read("pos_embed").zero_()  # not allowed, and does no harm to the file
    again = open_checkpoint(tmp_path / "f").component("transformer")
    assert bool(again.read("pos_embed").any())


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("rest", [Type.F16, Type.F32, Type.BF16])
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.BF16])
def test_transformers(toy: dict[str, Tensors], tmp_path: Path, prefix: str, rest: Type, kind: Type) -> None:
    """city96's naming and stable-diffusion.cpp's, told as GGUF under any name; a bfloat16 model comes of it."""
    stored = mixed(toy["transformer"], kind, rest)
    tensors = {prefix + name: it for name, it in stored.items()}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "file.safetensors", tensors))
    assert checkpoint.components == ("transformer",)
    component = checkpoint.component("transformer")
    expected = decoded(stored)
    check_tensors(component, expected)
    module = fill(build(component), component, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in module.state_dict().items())


def test_diffusers_reads_the_same_file(toy: dict[str, Tensors], tmp_path: Path) -> None:
    """Its single-file loader; it decodes Q8_0 into float16, one rounding from ours."""
    pytest.importorskip("accelerate", reason="diffusers reads GGUF with it")
    from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    toy_parts(tmp_path / "folder")
    path = write_gguf(tmp_path / "file.gguf", mixed(toy["transformer"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = SD3Transformer2DModel.from_single_file(
            str(path), config=str(tmp_path / "folder"), subfolder="transformer", local_files_only=True,
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        ).state_dict()  # fmt: skip
    component = open_checkpoint(path).component("transformer")
    entries = to_diffusers(component.shapes, TRANSFORMER)
    assert set(entries) == set(theirs)
    for name, entry in entries.items():
        ours = revert(entry, component.read(entry.sources[0]))
        assert torch.equal(dequantize_gguf_tensor(theirs[name]).half(), ours.half()), name


def test_position_tables(toy: dict[str, Tensors], tmp_path: Path) -> None:
    """With its leading one, without, and reshaped with the true shape beside it."""
    table = toy["transformer"]["pos_embed"].half()
    for shape, shapes in ((table.shape, {}), (table.shape[1:], {}), ((64, -1), {"pos_embed": list(table.shape)})):
        stored = mixed(toy["transformer"]) | {"pos_embed": (table.reshape(shape).numpy(), Type.F16)}
        file = write_gguf(tmp_path / "file", stored, shapes=shapes)
        got = open_checkpoint(file).component("transformer").read("pos_embed")
        assert torch.equal(got, table)
    file = write_gguf(tmp_path / "file", stored, shapes={"pos_embed": [3, 5]})
    assert "which cannot come from [3, 5]" in refusal(file)


def test_published_transformer(tmp_path: Path) -> None:
    """All 665 names, 263 of them quantised, with sides small enough to write."""
    listed = manifest("gguf.sd35_medium")["quantised_tensors"]
    names = golden()["transformer"]
    assert len(listed) == 263
    stored = {}
    for name, shape in names.items():
        sides = [n // 48 if n >= 48 else n for n in shape]
        stored[name] = (coded(torch.ones(sides), kind := Type.Q8_0 if name in listed else Type.F16), kind)
    component = open_checkpoint(write_gguf(tmp_path / "file", stored)).component("transformer")
    assert set(component.shapes) == set(names)
    assert sum(dtype == torch.float32 for dtype in component.dtypes.values()) == 263


def test_all_parts_with_prefixes(toy: dict[str, Tensors], tmp_path: Path) -> None:
    """As stable-diffusion.cpp converts an all-in-one file."""
    stored = mixed(joined(toy))
    checkpoint = open_checkpoint(write_gguf(tmp_path / "file", stored))
    assert checkpoint.components == PARTS
    for part in PARTS:
        expected = decoded({name: stored[PREFIXES[part] + name] for name in toy[part]})
        check_tensors(checkpoint.component(part), expected)


@pytest.mark.parametrize("part", ["transformer", "t5"])
def test_quantised_tensor_by_tensor(toy: dict[str, Tensors], tmp_path: Path, part: str) -> None:
    """By the program that makes files of any size: what the package makes of each tensor, in the published types."""
    base = open_checkpoint(write(tmp_path / "base", joined(toy)))
    quantise.quantise(base.component(part), tmp_path / "file", Type.Q8_0)
    kinds = {name: quantise.kind_of(name, tuple(tensor.shape), Type.Q8_0) for name, tensor in toy[part].items()}
    assert set(kinds.values()) == {Type.Q8_0, Type.BF16, Type.F32}
    expected = decoded({name: (coded(tensor, kinds[name]), kinds[name]) for name, tensor in toy[part].items()})
    parts = {"t5": tmp_path / "file"} if part == "t5" else {}
    check_tensors(open_checkpoint(tmp_path / ("base" if parts else "file"), parts).component(part), expected)


@pytest.mark.parametrize("naming", ["llama.cpp", "transformers"])
def test_t5(toy: dict[str, Tensors], tmp_path: Path, naming: str) -> None:
    tensors = llama_cpp(toy["t5"]) if naming == "llama.cpp" else toy["t5"]
    stored = mixed(tensors, Type.Q5_0)
    assert sum(kind == Type.Q5_0 for _, kind in stored.values()) == 14
    file = write_gguf(tmp_path / "t5", stored, arch="t5encoder")
    base = write(tmp_path / "base", toy["transformer"])
    component = open_checkpoint(base, {"t5": file}).component("t5")
    check_tensors(component, {name: decoded(stored)[key] for name, key in zip(toy["t5"], tensors)})
    fill(build(component), component, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="a T5 text encoder; expected a VAE"):
        open_checkpoint(base, {"vae": file}).component("vae")


def test_published_t5_names(toy: dict[str, Tensors], tmp_path: Path) -> None:
    tensors = llama_cpp({name: torch.ones(1, 2) for name in golden()["t5"]})
    assert {"enc.blk.23.ffn_down.weight", "enc.blk.0.attn_rel_b.weight", "token_embd.weight"} < set(tensors)
    file = write_gguf(tmp_path / "t5", mixed(tensors, Type.F32))
    base = write(tmp_path / "base", toy["transformer"])
    assert set(open_checkpoint(base, {"t5": file}).component("t5").shapes) == set(golden()["t5"])


def test_a_picture_from_gguf_is_the_same_picture(tmp_path: Path) -> None:
    """Everything in one GGUF file, float32, against the folder of the same weights: every pixel."""
    write_tokenizers(tmp_path / "words", captions=500)
    sizes = {"clip_vocab": 1024, "t5_vocab": 512}
    folder = write_checkpoint(tmp_path / "folder", tokenizers=tmp_path / "words", **sizes)
    single = write_checkpoint(tmp_path / "single", layout="single-file", **sizes)
    file = write_gguf(tmp_path / "file", mixed(load_file(single), Type.F32, Type.F32))
    size = {"width": 64, "height": 64, "steps": 2, "cfg": 4.5}
    load = {"tokenizers": tmp_path / "words", "dtype": "fp32", "device": "cpu"}
    first, second = (Pipeline.load(model, **load)("a horse", **size)[0] for model in (folder, file))
    assert first.tobytes() == second.tobytes()


# ---- what is wrong -------------------------------------------------------------------------------


def test_without_the_package(toy: dict[str, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "file", mixed(toy["transformer"]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "a GGUF file, which needs the package gguf: pip install 'mmdit[gguf]'" in refusal(file)


def test_other_models_and_other_places(tmp_path: Path) -> None:
    flux = write_gguf(tmp_path / "flux", {"double_blocks.0.img_attn.qkv.weight": (np.ones(2, np.float32), Type.F32)})
    assert "a FLUX model" in refusal(flux)
    folder = tmp_path / "folder"
    toy_parts(folder)
    shutil.copy(flux, folder / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"a GGUF file where a \.safetensors file belongs"):
        open_checkpoint(folder).component("vae")


def header(
    *, version: int = 3, count: int = 1, pairs: int = 0, kv: bytes = b"", shape: tuple[int, ...] = (32, 2),
    kind: int = 0, offset: int = 0, name: bytes = MARK.encode(), data: int = 256,
) -> bytes:  # fmt: skip
    """A GGUF file of one tensor, each number as it is told."""
    raw = b"GGUF" + struct.pack("<IQQ", version, count, pairs) + kv
    raw += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    raw += struct.pack("<IQ", kind, offset)
    return raw + b"\0" * (-len(raw) % 32) + b"\0" * data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HUGE = 1 << 62
BROKEN = {
    "version 1": (header(version=1), "GGUF version 1; known are 2 and 3"),
    "big-endian": (header(version=3 << 24), "a big-endian file?"),
    "tensors": (header(count=99_999), "truncated: the header goes on"),
    "pairs": (header(pairs=99_999), "truncated: the header goes on"),
    "many tensors": (header(count=HUGE), "at most 100000 of each are read"),
    "many pairs": (header(pairs=HUGE), "at most 100000 of each are read"),
    "long name": (header(name=b"x" * 1001), "a name of 1001 characters"),
    "long key": (header(pairs=1, kv=struct.pack("<Q", HUGE)), "truncated: the header goes on"),
    "long text": (header(pairs=1, kv=text("k") + struct.pack("<IQ", 8, HUGE)), "truncated: the header goes on"),
    "long array": (header(pairs=1, kv=text("k") + struct.pack("<IIQ", 9, 4, HUGE)), "truncated: the header goes on"),
    "texts": (header(pairs=1, kv=text("k") + struct.pack("<IIQ", 9, 8, 999)), "truncated: the header goes on"),
    "many texts": (header(pairs=1, kv=text("k") + struct.pack("<IIQ", 9, 8, HUGE)), "at most 1000000 are read"),
    "array of arrays": (header(pairs=1, kv=text("k") + struct.pack("<IIQ", 9, 9, 1)), "of the unknown type 9"),
    "unknown value": (header(pairs=1, kv=text("k") + struct.pack("<I", 13)), "a value of the unknown type 13"),
    "alignment 3": (header(pairs=1, kv=text("general.alignment") + struct.pack("<II", 4, 3)), "alignment is 3"),
    "alignment text": (header(pairs=1, kv=text("general.alignment") + struct.pack("<I", 8) + text("x")), "is 'x'"),
    "dimensions": (header(shape=(1,) * 9), "9 dimensions: the header is damaged"),
    "huge shape": (header(shape=(HUGE, HUGE)), "truncated: joint_blocks"),
    "offset": (header(offset=32), "begins at 32, expected 0"),
    "short": (header(data=255), "truncated: joint_blocks"),
    "row": (header(kind=8, shape=(31, 2)), "Q8_0 comes in blocks of 32, a row of 31"),
    "type": (header(kind=4), "of the unknown GGUF type 4"),
    "name": (header(name=b"\xff\xfe"), "a text is not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_headers(tmp_path: Path, case: str) -> None:
    """In one line, at once and without the memory that the header promises."""
    content, message = BROKEN[case]
    path = tmp_path / "file"
    path.write_bytes(header())
    assert open_checkpoint(path).components == ("transformer",)
    path.write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    assert message in refusal(path)
    assert time.perf_counter() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
