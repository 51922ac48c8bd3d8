"""Loading: the name map against facts, and two layouts that give the same tensors."""

import io
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from manifests import NATIVE_MARK, SMALL, golden, manifest, meta, shapes
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.random_checkpoint import draw, main, write_checkpoint
from mmdit.config import SD35_MEDIUM, TOY
from mmdit.driver.building import build
from mmdit.model import MMDiT
from text_encoders.clip import CLIP_G, CLIP_L, CLIPTextEncoder
from text_encoders.t5 import T5_XXL, T5Encoder
from vae.autoencoder import SD3_VAE, Autoencoder
from weights import CheckpointError, Component, fill, open_checkpoint, published
from weights.header import read_header
from weights.keymap import TRANSFORMER, VAE, Entry, converted_shape, revert, to_diffusers, to_native
from weights.write import Item, write_safetensors

PARTS = ("transformer", "vae", "clip_l", "clip_g", "t5")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same toy three times: folder/, sharded/, file.safetensors. Not to be written to."""
    root = tmp_path_factory.mktemp("toys")
    write_checkpoint(root / "folder", defaults={"width": 64}, **SMALL)
    write_checkpoint(root / "sharded", max_shard_bytes=200_000, **SMALL)
    write_checkpoint(root / "file.safetensors", layout="single-file", **SMALL)
    return root


@pytest.fixture
def folder(toys: Path, tmp_path: Path) -> Path:
    """A copy of the toy folder to break."""
    return Path(shutil.copytree(toys / "folder", tmp_path / "model"))


# ---- names ---------------------------------------------------------------------------------------


def test_modules_have_exactly_the_published_names_and_shapes() -> None:
    modules = {
        "transformer": meta(MMDiT, SD35_MEDIUM),
        "vae": meta(Autoencoder, SD3_VAE),
        "clip_l": meta(CLIPTextEncoder, CLIP_L),
        "clip_g": meta(CLIPTextEncoder, CLIP_G),
        "t5": meta(T5Encoder, T5_XXL),
    }
    for part, expected in golden().items():
        assert {name: tuple(t.shape) for name, t in modules[part].state_dict().items()} == expected, part


@pytest.mark.parametrize(
    "model", ["sd35_medium.transformer", "sd3_medium.transformer", "sd35_large.transformer", "vae"]
)
def test_keymap_is_the_published_map_both_ways(model: str) -> None:
    expected = {}
    for row in manifest(f"map.{model}"):
        sources = row["diffusers"] if isinstance(row["diffusers"], list) else [row["diffusers"]]
        expected[row["stability"]] = Entry(tuple(sources), row["op"].removesuffix("_to_linear"))
    table = VAE if model == "vae" else TRANSFORMER
    assert to_native([name for entry in expected.values() for name in entry.sources], table) == expected
    for name, entry in to_diffusers(expected, table).items():
        forward = expected[entry.sources[0]]
        assert (forward.sources[entry.part], forward.op) == (name, entry.op)


@pytest.mark.parametrize(
    ("diffusers", "native"),
    [
        ("sd35_medium.diffusers.transformer", "sd35_medium.stability.mmdit"),
        ("sd3_medium.diffusers.transformer", "sd3_medium.stability.mmdit"),
        ("sd35_large.diffusers.transformer", "sd35_large.stability.mmdit"),
        ("diffusers.vae", "vae.stability"),
    ],
)
def test_keymap_turns_the_diffusers_manifest_into_the_native_one(diffusers: str, native: str) -> None:
    source = shapes(diffusers)
    entries = to_native(source, VAE if "vae" in native else TRANSFORMER)
    got = {name: converted_shape(op, [source[s] for s in names]) for name, (names, op, _) in entries.items()}
    assert got == shapes(native)


def test_unknown_and_incomplete_names_stay_visible() -> None:
    entries = to_native(["transformer_blocks.0.attn.to_q.weight", "stray"], TRANSFORMER)
    assert set(entries) == {"transformer_blocks.0.attn.to_q.weight", "stray"}


def test_old_vae_attention_names_are_known() -> None:
    name = "encoder.mid_block.attentions.0.query.weight"
    assert to_native([name], VAE) == {"encoder.mid.attn_1.q.weight": Entry((name,), "conv1x1")}


# ---- layouts -------------------------------------------------------------------------------------


def test_folder_shards_and_single_file_give_identical_tensors(toys: Path) -> None:
    folder, sharded, single = (open_checkpoint(toys / p) for p in ("folder", "sharded", "file.safetensors"))
    assert (toys / "sharded/text_encoder_3/model.safetensors.index.json").exists()
    assert (toys / "sharded/transformer/diffusion_pytorch_model.safetensors.index.json").exists()
    for part in PARTS:
        expected = single.component(part)
        for other in (folder.component(part), sharded.component(part)):
            extra = {"text_projection.weight"} if part == "clip_l" else set()
            assert set(other.shapes) == set(expected.shapes) | extra
            for name, shape in expected.shapes.items():
                assert other.shapes[name] == shape == tuple(other.read(name).shape)
                assert torch.equal(other.read(name), expected.read(name)), name


def test_values_depend_on_seed_and_not_on_dtype(toys: Path, tmp_path: Path) -> None:
    half = open_checkpoint(write_checkpoint(tmp_path / "half", dtype="bf16", clips=False, t5=False))
    full = open_checkpoint(toys / "folder").component("transformer")
    assert half.components == ("transformer", "vae")
    for name in full.shapes:
        assert torch.equal(half.component("transformer").read(name), full.read(name).bfloat16())
    assert not torch.equal(draw(0, "vae", "a.weight", (4, 4)), draw(1, "vae", "a.weight", (4, 4)))


def test_filled_transformer_is_the_same_from_both_layouts(toys: Path) -> None:
    first = fill(meta(MMDiT, TOY), open_checkpoint(toys / "folder").component("transformer"))
    second = fill(meta(MMDiT, TOY), open_checkpoint(toys / "file.safetensors").component("transformer"))
    state = first.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.state_dict().items())
    assert not first.training
    assert not any(p.requires_grad for p in first.parameters())


def test_fill_converts_dtype(toys: Path) -> None:
    component = open_checkpoint(toys / "folder").component("transformer")
    filled = fill(meta(MMDiT, TOY), component, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in filled.state_dict().values()} == {torch.bfloat16}


def test_what_a_folder_says_about_itself(toys: Path) -> None:
    checkpoint = open_checkpoint(str(toys / "folder"))
    assert checkpoint.components == PARTS
    assert checkpoint.defaults == {"width": 64}
    assert checkpoint.scheduler is not None
    assert checkpoint.scheduler["shift"] == 3.0
    assert checkpoint.tokenizers is None
    config = checkpoint.config("transformer")
    assert config == checkpoint.component("transformer").config
    assert config is not None
    assert config["dual_attention_layers"] == [0]
    single = open_checkpoint(toys / "file.safetensors")
    assert (single.tokenizers, single.scheduler, single.defaults, single.config("vae")) == (
        None,
        None,
        {},
        None,
    )


def test_t5_may_be_left_out(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    assert not open_checkpoint(folder).has("t5")
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "text_encoder_3")
    assert not open_checkpoint(folder).has("t5")
    with pytest.raises(CheckpointError, match=r"has no t5 \(has transformer, vae, clip_l, clip_g\)"):
        open_checkpoint(folder).component("t5")


def test_names_other_tools_write_are_understood(toys: Path, tmp_path: Path) -> None:
    tensors = load_file(toys / "file.safetensors")
    clip, t5 = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."
    changed = {key.replace(clip + "text_model.", clip): tensor for key, tensor in tensors.items()}
    changed[t5 + "encoder.embed_tokens.weight"] = changed.pop(t5 + "shared.weight")
    changed["first_stage_model.encoder.mid.attn_1.q.weight"] = tensors[
        "first_stage_model.encoder.mid.attn_1.q.weight"
    ].flatten(1)
    for key in (clip + "text_projection.weight", "text_encoders.clip_l.logit_scale", "model_ema.decay",
                clip + "text_model.embeddings.position_ids"):  # fmt: skip
        changed[key] = torch.zeros(1)
    save_file(changed, tmp_path / "other.safetensors")
    other, plain = open_checkpoint(tmp_path / "other.safetensors"), open_checkpoint(toys / "file.safetensors")
    for part in PARTS:
        assert other.component(part).shapes == plain.component(part).shapes
        for name in plain.component(part).shapes:
            assert torch.equal(other.component(part).read(name), plain.component(part).read(name))

    save_file({"x." + NATIVE_MARK: torch.zeros(3, 1), "who.knows": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match=r"ignoring 1 unknown tensors, the first is who\.knows"):
        assert open_checkpoint(tmp_path / "x.safetensors").component("transformer").shapes == {NATIVE_MARK: (3, 1)}
    save_file({NATIVE_MARK: torch.zeros(3, 1), "pos_embed": torch.zeros(1)}, tmp_path / "bare.safetensors")
    bare = open_checkpoint(tmp_path / "bare.safetensors").component("transformer")
    assert set(bare.shapes) == {NATIVE_MARK, "pos_embed"}


# ---- other implementations -----------------------------------------------------------------------


def test_conversion_agrees_with_diffusers(toys: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    native = open_checkpoint(toys / "file.safetensors").component("transformer")
    theirs = convert_sd3_transformer_checkpoint_to_diffusers({name: native.read(name) for name in native.shapes})
    ours = to_diffusers(native.shapes, TRANSFORMER)
    assert set(ours) == set(theirs)
    for name, entry in ours.items():
        assert torch.equal(revert(entry, native.read(entry.sources[0])), theirs[name]), name


def test_diffusers_loads_the_folder(toys: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    none = {"tokenizer": None, "tokenizer_2": None, "tokenizer_3": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusion3Pipeline.from_pretrained(toys / "folder", **none)
    checkpoint = open_checkpoint(toys / "folder")
    for part, table in (("transformer", TRANSFORMER), ("vae", VAE)):
        theirs = getattr(pipeline, part).state_dict()
        component = checkpoint.component(part)
        for name, entry in to_diffusers(component.shapes, table).items():
            assert torch.equal(theirs[name], revert(entry, component.read(entry.sources[0]))), name
    for part, module in (("clip_g", pipeline.text_encoder_2), ("t5", pipeline.text_encoder_3)):
        component = checkpoint.component(part)
        ours = sorted(float(component.read(name).double().sum()) for name in component.shapes)
        theirs = sorted(float(p.detach().double().sum()) for p in module.parameters())
        assert ours == theirs


def test_t5_is_sharded_as_published() -> None:
    sizes = [2 * torch.Size(shape).numel() for shape in shapes("diffusers.text_encoder_3").values()]
    assert [len(shard) for shard in published.split(sizes, sizes, published.SHARD_BYTES["model"])] == [
        113,
        106,
    ]


@pytest.mark.parametrize("model", ["sd35_medium", "sd3_medium", "sd35_large"])
def test_transformer_config_is_the_published_one(model: str) -> None:
    name = model.replace("sd35_", "sd3.5-").replace("sd3_", "sd3-")
    expected = manifest("configs")[f"transformer/config.json@{name}"]
    any_version = {"_diffusers_version": ""}
    ours = published.transformer_config(shapes(f"{model}.stability.mmdit"))
    assert ours | any_version == expected | any_version


def test_writer_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (tmp_path / "words" / name).mkdir(parents=True)
    arguments = ["--layout", "diffusers", "--dtype", "fp16", "--tokenizers", str(tmp_path / "words")]
    monkeypatch.setattr("sys.argv", ["random_checkpoint", str(tmp_path / "out"), *arguments])
    main()
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.tokenizers == tmp_path / "out"
    assert set(checkpoint.component("vae").dtypes.values()) == {torch.float16}
    with pytest.raises(ValueError, match="'sdxl' is not one of"):
        write_checkpoint(tmp_path / "no", model="sdxl")


# ---- laziness ------------------------------------------------------------------------------------


def test_unused_t5_is_never_opened(folder: Path) -> None:
    for file in (folder / "text_encoder_3").iterdir():
        file.write_bytes(b"\x80\x04garbage")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.has("t5")
    for part in PARTS[:-1]:
        assert checkpoint.component(part).shapes
    fill(meta(MMDiT, TOY), checkpoint.component("transformer"))
    with pytest.raises(CheckpointError, match="pickles are never opened"):
        checkpoint.component("t5")


def test_opening_reads_headers_only(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every part, in one file, in a folder and in shards: as many bytes as the headers have, and no tensor."""
    read: dict[Path, int] = {}

    class Counted(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            content = super().read(size)
            path = Path(str(self.name))
            read[path] = read.get(path, 0) + len(content)
            return content

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", **more: Counted(path) if mode == "rb" else
                        opened(path, mode, **more))  # fmt: skip
    monkeypatch.setattr("weights.component.open_file", lambda path: pytest.fail(f"{path} was opened for its tensors"))
    for name in ("file.safetensors", "folder", "sharded"):
        checkpoint = open_checkpoint(toys / name)
        for part in PARTS:
            assert checkpoint.component(part).shapes
            build(checkpoint.component(part))
    files = {path: count for path, count in read.items() if path.suffix == ".safetensors"}
    for path, count in files.items():
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert count % header in (0, 4), path  # once or more, and four bytes that tell GGUF
        assert count < path.stat().st_size
    assert len(files) > 8


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_bfloat16_file_is_the_model(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Filled from the map without a copy, but for what the layout stores in another form."""
    toy = write_checkpoint(tmp_path / "toy", dtype="bf16", **SMALL)
    single = write_checkpoint(tmp_path / "file", layout="single-file", dtype="bf16", **SMALL)
    for path in (toy, single):
        checkpoint = open_checkpoint(path)
        for part in PARTS:
            component = checkpoint.component(part)
            state = fill(build(component), component, dtype).state_dict()
            copied = {name for name, t in state.items() if t.data_ptr() != component.read(name).data_ptr()}
            made = {name for name in copied if name.endswith(("qkv.weight", "qkv.bias")) or "adaLN_modulation" in name}
            assert copied == (made if path == toy and part == "transformer" else set()), part


def test_copied_tensors_are_views_of_the_file(toys: Path) -> None:
    component = open_checkpoint(toys / "folder").component("transformer")
    assert component.read("pos_embed").data_ptr() == component.read("pos_embed").data_ptr()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_filling_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    big = {"weight": torch.zeros(8192, 8192, dtype=torch.bfloat16), "bias": torch.zeros(8192, dtype=torch.bfloat16)}
    save_file(big, tmp_path / "big.safetensors")
    del big

    def own_memory() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024

    tensors = read_header(tmp_path / "big.safetensors")
    component = Component("big", tmp_path, tensors, {name: Entry((name,), "copy") for name in tensors})
    with torch.device("meta"):
        module = nn.Linear(8192, 8192)
    before = own_memory()
    assert float(fill(module, component).weight.sum()) == 0.0
    assert own_memory() - before < 32, "MiB, of a tensor of 128"


# ---- writing -------------------------------------------------------------------------------------


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    """As safetensors' own writer has it: widest numbers first, else in the order given."""
    dtypes = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "BF16": torch.bfloat16}
    tensors = {f"{i} {word}": torch.arange(3 + i).to(dtype) for i in (0, 2) for word, dtype in dtypes.items()}
    file = tmp_path / "file"
    write_safetensors(file, [Item(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], tensors.values())
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__")
    begins = {name: start + entry["data_offsets"][0] for name, entry in header.items()}
    expected = ["0 F32", "2 F32", "0 BF16", "2 BF16", "0 F8_E4M3", "2 F8_E4M3"]
    assert sorted(begins, key=lambda name: begins[name]) == expected
    assert all(begin % tensors[name].itemsize == 0 for name, begin in begins.items())
    found = load_file(file)
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in tensors.items())
