"""From settings to networks: schedules that are not SD3's, devices, and the names that messages give to tensors."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from manifests import SMALL
from safetensors.torch import load_file, save_file

from benchmarks.random_checkpoint import write_checkpoint
from mmdit.driver.building import build
from mmdit.driver.loading import device_of, part_dtype, shift_of
from mmdit.driver.settings import Settings
from mmdit.model import MMDiT
from text_encoders import CLIPTextEncoder, T5Encoder
from vae import Autoencoder
from weights import Checkpoint, CheckpointError, fill, open_checkpoint
from weights.kinds import COMPONENTS

FOLDERS = {"transformer": "transformer/diffusion_pytorch_model", "vae": "vae/diffusion_pytorch_model",
           "clip_g": "text_encoder_2/model", "t5": "text_encoder_3/model"}  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy as folder/ and file.safetensors. Not to be written to."""
    root = tmp_path_factory.mktemp("toys")
    write_checkpoint(root / "folder", **SMALL)
    write_checkpoint(root / "file.safetensors", layout="single-file", **SMALL)
    return root


# ---- schedules -----------------------------------------------------------------------------------


def scheduled(scheduler: dict[str, Any] | None) -> float:
    return shift_of(Checkpoint(path=Path("model"), components=(), scheduler=scheduler, _open=lambda name: {}[name]))


# All that diffusers 0.42 writes for the schedule of SD3.
SD3 = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.42.0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 2.5,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def test_the_usual_schedule_in_full_is_a_shift() -> None:
    assert scheduled(SD3) == 2.5
    assert scheduled({"shift": 2.0}) == 2.0
    assert scheduled(None) == 3.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_class_name", "FlowMatchHeunDiscreteScheduler"),
        ("num_train_timesteps", 500),
        ("invert_sigmas", True),
        ("shift_terminal", 0.02),
        ("stochastic_sampling", True),
        ("use_dynamic_shifting", True),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("use_flow_sigmas", True),
    ],
)
def test_another_schedule_is_refused(name: str, value: object) -> None:
    """Each of these changes the noise levels, or the step from one to the next."""
    with pytest.raises(CheckpointError, match=f"^model: scheduler: {name} is not supported") as told:
        scheduled({**SD3, name: value})
    assert repr(value) in str(told.value)


# ---- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_has_its_number(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current one; a device without a number differs from that of every tensor on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_of(Settings(device=asked)) == torch.device("cuda:3")


def test_metal_has_its_number_and_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of(Settings(device="mps")) == torch.device("mps:0")
    assert device_of(Settings(device="cpu")) == torch.empty(0).device


def test_what_float16_cannot_hold_computes_in_another_format() -> None:
    """T5 in bfloat16, and the autoencoder in float32: in float16 its activations may overflow."""
    assert {name: part_dtype(name, torch.float16) for name in COMPONENTS} == {
        "transformer": torch.float16,
        "vae": torch.float32,
        "clip_l": torch.float16,
        "clip_g": torch.float16,
        "t5": torch.bfloat16,
    }
    for dtype in (torch.bfloat16, torch.float32):
        assert {part_dtype(name, dtype) for name in COMPONENTS} == {dtype}


# ---- names in messages ---------------------------------------------------------------------------


def without(file: Path, *names: str) -> Path:
    """The file written again without these tensors."""
    tensors = load_file(file)
    for name in names:
        del tensors[name]
    save_file(tensors, file)
    return file


# (component, tensors that a folder lacks, how a message calls them).
TAKEN_OUT = [
    ("transformer", "pos_embed.proj.weight", "lacks pos_embed.proj.weight (here x_embedder.proj.weight)"),
    ("transformer", "transformer_blocks.1.attn.to_k.bias",
     "1 missing: transformer_blocks.1.attn.to_k.bias (here joint_blocks.1.x_block.attn.qkv.bias); "
     "2 unexpected: transformer_blocks.1.attn.to_q.bias, transformer_blocks.1.attn.to_v.bias"),
    ("transformer", "norm_out.linear.bias",
     "1 missing: norm_out.linear.bias (here final_layer.adaLN_modulation.1.bias)"),
    ("vae", "decoder.up_blocks.0.resnets.0.conv1.bias",
     "1 missing: decoder.up_blocks.0.resnets.0.conv1.bias (here decoder.up.3.block.0.conv1.bias)"),
    ("clip_g", "text_model.embeddings.token_embedding.weight", "lacks text_model.embeddings.token_embedding.weight"),
    ("t5", "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
]  # fmt: skip
KINDS = {"transformer": MMDiT, "vae": Autoencoder, "clip_g": CLIPTextEncoder, "t5": T5Encoder}


@pytest.mark.parametrize(("part", "name", "told"), TAKEN_OUT)
def test_a_missing_tensor_has_the_name_of_the_file(toys: Path, tmp_path: Path, part: str, name: str, told: str) -> None:
    """In a folder, beside the native one where that is another; with config.json and without."""
    folder = Path(shutil.copytree(toys / "folder", tmp_path / "folder"))
    without(folder / f"{FOLDERS[part]}.safetensors", name)
    (folder / f"{FOLDERS[part]}").with_name("config.json").unlink()
    component = open_checkpoint(folder).component(part)
    with pytest.raises(CheckpointError) as caught:
        fill(build(component), component)
    assert told in str(caught.value)


def test_the_prefix_of_a_single_file_is_in_the_message(toys: Path, tmp_path: Path) -> None:
    names = ["model.diffusion_model.t_embedder.mlp.0.bias", "text_encoders.t5xxl.transformer.shared.weight"]
    file = without(Path(shutil.copy(toys / "file.safetensors", tmp_path)), *names,
                   "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight")  # fmt: skip
    for part, name in zip(("transformer", "t5"), names):
        component = open_checkpoint(file).component(part)
        with pytest.raises(CheckpointError) as caught:
            fill(build(component), component)
        assert name in str(caught.value)
        assert "(here" not in str(caught.value)


def test_shapes_that_do_not_go_together_have_the_names_of_the_file(toys: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toys / "folder", tmp_path / "folder"))
    file = folder / f"{FOLDERS['transformer']}.safetensors"
    block = "transformer_blocks.0."
    changed = {f"{block}attn.to_k.weight": torch.zeros(4, 4), f"{block}ff.net.2.bias": torch.zeros(3)}
    save_file(load_file(file) | changed, file)
    names = " + ".join(f"{block}attn.to_{letter}.weight" for letter in "qkv")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).component("transformer")
    assert f"{names} (here joint_blocks.0.x_block.attn.qkv.weight): cannot stack [128, 128] [4, 4]" in str(caught.value)
    save_file(load_file(file) | {f"{block}attn.to_k.weight": torch.zeros(128, 128)}, file)
    component = open_checkpoint(folder).component("transformer")
    with pytest.raises(CheckpointError) as caught:
        fill(build(component), component)
    told = f"1 of the wrong shape: {block}ff.net.2.bias (here joint_blocks.0.x_block.mlp.fc2.bias) [3] should be [128]"
    assert told in str(caught.value)
