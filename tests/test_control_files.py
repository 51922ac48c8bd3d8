"""Files and folders of ControlNets: every published layout is read to the same tensors, and told for what it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from controls import (
    INPAINTING,
    INSTANTX,
    KINDS,
    STABILITY,
    control_folder,
    control_for,
    diffusers_tensors,
    json_of,
    nets,
    stability_tensors,
)
from layouts import check_tensors, on_meta, write
from safetensors.torch import save_file
from torch import Tensor

from mmdit.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from mmdit.control.network import ControlConfig, ControlNet
from mmdit.driver.building import build
from mmdit.memory.empty import on_meta as empty
from weights import CheckpointError, open_checkpoint
from weights.control import open_control
from weights.fill import fill
from weights.inspect import inspect
from weights.keymap import CONTROL, to_diffusers, to_native
from weights.published import write_json

# Of published ones: blocks, and what `python -m weights` has to say.
PUBLISHED = {
    "InstantX": (control_for(SD3_MEDIUM, depth=6), "a ControlNet (6 blocks) for SD3-Medium"),
    "inpainting": (
        control_for(SD3_MEDIUM, depth=23, extra_channels=1),
        "a ControlNet (23 blocks, with a mask) for SD3-Medium",
    ),
    "TensorArt": (control_for(SD35_MEDIUM, depth=23), "a ControlNet (23 blocks) for SD3.5-Medium"),
    "Stability": (
        control_for(SD35_LARGE, depth=19, context_size=0, pos_embed_max_size=0, qk_norm=False),
        "a ControlNet (19 blocks, without a text, canny) for SD3.5-Large",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_tensors(tmp_path: Path, kind: str) -> None:
    net = nets(KINDS[kind])[0]
    expected = net.state_dict()
    folder = control_folder(tmp_path / "folder", net)
    check_tensors(open_control(folder).component, expected)
    for name, tensors in {
        "diffusers": diffusers_tensors(net),
        "native": expected,
        "prefixed": {f"controlnet.{key}": tensor for key, tensor in expected.items()},
        "halves": {key: tensor.half() for key, tensor in diffusers_tensors(net).items()},
    }.items():
        wanted = {key: tensor.half() for key, tensor in expected.items()} if name == "halves" else expected
        opened = open_control(write(tmp_path / f"{name}.safetensors", tensors))
        check_tensors(opened.component, wanted)
        assert opened.type is None
        assert build(opened.component).config == replace(net.config, pooled_zeros=net.config.context_size > 0)
    assert build(open_control(folder).component).config == net.config
    filled = fill(build(open_control(folder).component), open_control(folder).component)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in filled.state_dict().items())


@pytest.mark.parametrize(("number", "told"), [(0, "blur"), (1, "canny"), (2, "depth"), (7, None)])
def test_stability_files_say_what_they_are_of(tmp_path: Path, number: int, told: str | None) -> None:
    net = nets(STABILITY)[0]
    opened = open_control(write(tmp_path / "x", stability_tensors(net, number)))
    assert opened.type == told
    check_tensors(opened.component, net.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_names_go_both_ways(kind: str) -> None:
    """Native to diffusers' and back, each tensor once; and diffusers' own module has just these names."""
    net, theirs = nets(KINDS[kind])
    native = set(net.state_dict())
    there = to_diffusers(native, CONTROL)
    assert set(there) == set(theirs.state_dict())
    back = to_native(there, CONTROL)
    assert set(back) == native
    for name, entry in back.items():
        assert {there[source].sources for source in entry.sources} == {(name,)}


def test_shards_of_a_folder(tmp_path: Path) -> None:
    net = nets(INSTANTX)[0]
    folder, tensors = tmp_path / "net", diffusers_tensors(net)
    folder.mkdir()
    names = sorted(tensors)
    files = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n].contiguous() for n in names if files[n] == file}, folder / file)
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    write_json(folder / "config.json", json_of(net))
    check_tensors(open_control(folder).component, net.state_dict())
    assert inspect(folder)["load"]["options"] == ["--control", str(folder)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_told(tmp_path: Path, name: str) -> None:
    config, what = PUBLISHED[name]
    net = empty(ControlNet, config)
    shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    entries = to_diffusers(shapes, CONTROL)
    tensors = on_meta({key: _shape(shapes[entry.sources[0]], entry.op) for key, entry in entries.items()})
    if name == "Stability":
        tensors = {key: _half(tensor) for key, tensor in stability_tensors(net, 1).items()}
    file = write(tmp_path / "x.safetensors", tensors)
    found = inspect(file)
    assert (found["kind"], found["what"]) == ("component", what)
    mask = ["--control-mask MASK"] if "mask" in what else []
    assert found["load"] == {
        "loads": True,
        "options": ["--control", str(file)],
        "needs": ["--control-image IMAGE", *mask],
        "reason": None,
    }
    assert [part["name"] for part in found["components"]] == ["control"]


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def _shape(shape: tuple[int, ...], op: str) -> tuple[int, ...]:
    return (shape[0] // 3, *shape[1:]) if op == "split3" else shape


# ---- refused -------------------------------------------------------------------------------------


def test_what_is_none_is_refused_for_what_it_is(tmp_path: Path) -> None:
    net = nets(INPAINTING)[0]
    file = write(tmp_path / "net.safetensors", net.state_dict())
    with pytest.raises(CheckpointError, match="a ControlNet for Stable Diffusion 3 alone; give a file or folder"):
        open_checkpoint(file)
    flux = write(tmp_path / "flux", {"controlnet_blocks.0.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="a ControlNet, not a checkpoint; this engine runs Stable Diffusion 3"):
        open_control(flux)
    other = write(tmp_path / "vae", {"decoder.mid.block_1.conv1.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="a VAE; expected a ControlNet"):
        open_control(other)
    with pytest.raises(CheckpointError, match="no such file"):
        open_control(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "control lacks|does not fit"),
        ({"num_layers": 10**6}, "1000000 layers of"),
        ({"union": True}, "config.json has union, which no ControlNet of SD3 has"),
        ({"extra_conditioning_channels": "1"}, "extra_conditioning_channels is '1'"),
        ({"num_attention_heads": 0}, "sizes without sense"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    net = nets(INSTANTX)[0]
    folder = control_folder(tmp_path / "net", net)
    write_json(folder / "config.json", json_of(net) | change)
    with pytest.raises(CheckpointError, match=message):
        fill(build(open_control(folder).component), open_control(folder).component)


def test_a_file_that_lacks_tensors_says_which(tmp_path: Path) -> None:
    tensors = diffusers_tensors(nets(INSTANTX)[0])
    del tensors["time_text_embed.text_embedder.linear_1.weight"]
    opened = open_control(write(tmp_path / "x", tensors))
    with pytest.raises(CheckpointError, match=r"control lacks time_text_embed\.text_embedder\.linear_1\.weight"):
        build(opened.component)
    assert isinstance(INSTANTX, ControlConfig)
