"""Every way a checkpoint can be wrong is refused in one line that says what is wrong."""

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from manifests import NATIVE_MARK, SMALL, meta
from safetensors.torch import save_file

from benchmarks.random_checkpoint import write_checkpoint
from mmdit.config import TOY
from mmdit.model import MMDiT
from weights import CheckpointError, fill, open_checkpoint


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy as folder/, sharded/ and file.safetensors. Not to be written to."""
    root = tmp_path_factory.mktemp("toys")
    write_checkpoint(root / "folder", defaults={"width": 64}, t5=False, **SMALL)
    write_checkpoint(root / "sharded", max_shard_bytes=200_000, clips=False, t5=False)
    write_checkpoint(root / "file.safetensors", layout="single-file", clips=False, t5=False)
    return root


@pytest.fixture
def folder(toys: Path, tmp_path: Path) -> Path:
    """A copy of the toy folder to break."""
    return Path(shutil.copytree(toys / "folder", tmp_path / "model"))


def refusal(path: Path, component: str | None = None) -> str:
    """The message with which opening (and asking for a component) is refused; always one printable line."""
    with pytest.raises(CheckpointError) as caught:
        _use(path, component)
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    return message


def _use(path: Path, component: str | None) -> None:
    checkpoint = open_checkpoint(path)
    if component is not None:
        checkpoint.component(component)


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one_tensor(name: str, path: Path) -> Path:
    save_file({name: torch.zeros(2, 2)}, path)
    return path


def test_fill_lists_what_does_not_fit_before_reading(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names of the file, the native ones beside them."""
    component = open_checkpoint(toys / "folder").component("transformer")
    monkeypatch.setattr(component, "read", None)
    bigger = replace(TOY, depth=4, pooled_size=256, qk_norm=False)
    with pytest.raises(CheckpointError) as caught:
        fill(meta(MMDiT, bigger), component)
    message = str(caught.value)
    assert message.isprintable()
    assert str(toys / "folder" / "transformer") in message
    assert "40 missing: transformer_blocks.1.attn.to_add_out.weight (here joint_blocks.1.context_block." in message
    assert "10 unexpected: " in message
    patches = "time_text_embed.text_embedder.linear_1.weight (here y_embedder.mlp.0.weight) [128, 192]"
    assert f"3 of the wrong shape: {patches} should be [128, 256], " in message
    assert message.count("here joint_blocks.") == 5 + 5 + 2


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.safetensors")
    assert "no model_index.json; expected a diffusers folder" in refusal(tmp_path)
    contents = {
        b"PK\x03\x04" + b"\0" * 60: "pickles are never opened",
        b"\x80\x02" + b"\0" * 60: "pickles are never opened",
        b"GGUF" + b"\0" * 60: "GGUF version 0",
        b"version https://git-lfs.github.com/spec/v1\n": "Git LFS pointer",
        b"": "0 bytes",
        b"hello": "5 bytes",
        b"a plain text file": "not a safetensors file",
        struct.pack("<Q", 1 << 60) + b"{": "claims a header",
    }
    for content, expected in contents.items():
        (tmp_path / "file").write_bytes(content)
        assert expected in refusal(tmp_path / "file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "not a regular file" in refusal(tmp_path / "pipe")


def test_broken_headers(toys: Path, tmp_path: Path) -> None:
    whole = (toys / "file.safetensors").read_bytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[:-100])
    assert f"truncated: header promises {len(whole)} bytes, file has {len(whole) - 100}" in refusal(path)
    path.write_bytes(whole[:100])
    assert "truncated: header alone promises" in refusal(path)
    path.write_bytes(whole + b"x")
    assert "bytes after the last tensor" in refusal(path)
    assert "header is not JSON" in refusal(raw_file(path, b"{" + b"[" * 100_000))
    good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    changes = [{"shape": shape} for shape in ([2], "x", [-1], None)]
    changes += [{"data_offsets": [0]}, {"data_offsets": [4, 0]}, {"dtype": 3}]
    for change in changes:
        assert "bad entry for a\\nb" in refusal(raw_file(path, {"a\nb": good | change}, b"\0" * 4))
    assert "bad entry" in refusal(raw_file(path, {"a": 1}))
    after = {"pos_embed": good | {"data_offsets": [8, 12]}}
    assert "pos_embed begins at 8, expected 4" in refusal(raw_file(path, {NATIVE_MARK: good, **after}, b"\0" * 12))
    assert "b begins at 0, expected 4" in refusal(raw_file(path, {"a": good, "b": good}, b"\0" * 4))
    twice = json.dumps({"a": good})[:-1] + "," + json.dumps({"a": good})[1:]
    assert "'a' is there twice" in refusal(raw_file(path, twice.encode(), b"\0" * 4))


def test_what_no_published_file_has(tmp_path: Path) -> None:
    """Long names, many tensors, many sides, deep and large JSON, metadata that is no text."""
    path = tmp_path / "x.safetensors"
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    assert "bad entry for xxx" in refusal(raw_file(path, {"x" * 1001: empty}))
    assert len(refusal(raw_file(path, {"x" * 1_000_000: empty}))) < 4100 + len(str(path))
    assert "bad entry" in refusal(raw_file(path, {"x": empty | {"shape": [0] * 9}}))
    assert "bad entry" in refusal(raw_file(path, {"x": empty | {"shape": [0, 1 << 63]}}))
    assert "100001 tensors, at most 100000" in refusal(raw_file(path, {str(i): empty for i in range(100_001)}))
    assert "more than 1000000 values" in refusal(raw_file(path, b"{" + b"[]," * 1_000_000))
    assert "nested deeper than 20" in refusal(raw_file(path, b'{"a":' + b"[" * 20 + b"]" * 20 + b"}"))
    assert "NaN is no number" in refusal(raw_file(path, b'{"a":NaN}'))
    for metadata in ({"a": 1}, ["a"], "a"):
        assert "__metadata__ is not {name: text}" in refusal(raw_file(path, {"__metadata__": metadata}))
    (tmp_path / "model_index.json").write_bytes(b" " * 16_000_001)
    assert "16000001 bytes of JSON, at most 16000000" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "a FLUX model"),
        ("model.diffusion_model.input_blocks.0.0.weight", "SD1, SD2 or SDXL"),
        ("transformer.x.lora_A.weight", "an adapter"),
        (
            "text_model.encoder.layers.0.self_attn.q_proj.weight",
            "a CLIP text encoder alone; give a file or folder with the transformer",
        ),
        ("something.else", "no model that is known (its first tensor is something.else)"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path: Path, key: str, expected: str) -> None:
    assert expected in refusal(one_tensor(key, tmp_path / "x.safetensors"))


def test_dtypes_that_are_not_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({NATIVE_MARK: torch.zeros(3, 1, dtype=torch.int64)}, path)
    assert "is I64; weights must be one of" in refusal(path, "transformer")


def test_shards_that_cannot_be_trusted(toys: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(toys / "sharded", tmp_path / "model"))
    index = root / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    good = json.loads(index.read_text())
    key, shard = next(iter(good["weight_map"].items()))

    def broken(weight_map: object) -> str:
        index.write_text(json.dumps({"weight_map": weight_map}))
        return refusal(root, "transformer")

    for name in ("../secret.safetensors", "/etc/passwd", "..", "", "a\\b.safetensors", "c:x"):
        assert "not a plain file name" in broken({key: name})
    assert "lists the shard absent.safetensors, which is missing" in broken({key: "absent.safetensors"})
    assert f"nowhere should be in {shard}" in broken({"nowhere": shard})
    assert 'expected "weight_map"' in broken([1])
    assert 'expected "weight_map"' in broken({key: 1})
    index.write_text("{")
    assert "not valid JSON" in refusal(root, "transformer")
    index.unlink()
    assert "no diffusion_pytorch_model.safetensors" in refusal(root, "transformer")
    (root / "transformer" / "diffusion_pytorch_model.bin").touch()
    assert "only diffusion_pytorch_model.bin: pickles are never opened" in refusal(root, "transformer")


def test_broken_folders(folder: Path) -> None:
    for name in ("mmdit.json", "scheduler/scheduler_config.json", "model_index.json"):
        text = (folder / name).read_text()
        (folder / name).write_text("[1]")
        assert "expected a JSON object, found list" in refusal(folder)
        (folder / name).write_text("{" + text)
        assert "not valid JSON" in refusal(folder)
        (folder / name).write_text(text)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "made for FluxPipeline" in refusal(folder)


def test_names_outside_the_list(toys: Path) -> None:
    with pytest.raises(ValueError, match="no component 'clip_h': one of transformer"):
        open_checkpoint(toys / "folder").component("clip_h")
