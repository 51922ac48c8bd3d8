"""A toy model to put adapters on, and adapter files to put on it."""

import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from reference import randomize
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.random_checkpoint import toy_clips, toy_t5
from mmdit.config import TOY
from mmdit.model import MMDiT
from text_encoders.clip import CLIPTextEncoder
from text_encoders.t5 import T5Encoder
from weights.adapters import Adapters, Report

WIDTH = TOY.hidden_size
QKV = "joint_blocks.0.x_block.attn.qkv"
FC1 = "joint_blocks.0.x_block.mlp.fc1"
LAST = "joint_blocks.1.context_block.adaLN_modulation.1"


class Toy:
    """A transformer and three text encoders with random weights, which adapters can be written for and added to."""

    def __init__(self, folder: Path, *parts: str, dtype: torch.dtype = torch.float32) -> None:
        """folder: where adapters are written; parts: components to have, all four if none is named."""
        self.folder = folder
        clip_l, clip_g = toy_clips(TOY.pooled_size, 96)
        kinds = {
            "transformer": (MMDiT, TOY),
            "clip_l": (CLIPTextEncoder, clip_l),
            "clip_g": (CLIPTextEncoder, clip_g),
            "t5": (T5Encoder, toy_t5(TOY.context_size, 80)),
        }
        self.modules = {name: filled(*kinds[name], dtype) for name in parts or kinds}
        self.before = {place: values.clone() for place, values in self.now().items()}
        self.adapters = Adapters(self.modules)

    def now(self) -> dict[tuple[str, str], Tensor]:
        return {(part, name): t for part, m in self.modules.items() for name, t in m.state_dict().items()}

    def weight(self, name: str, part: str = "transformer") -> Tensor:
        return self.now()[part, name]

    def original(self, name: str, part: str = "transformer") -> Tensor:
        """The values from before any adapter, in float64."""
        return self.before[part, name].double()

    def write(self, tensors: Mapping[str, Tensor], name: str = "a", metadata: dict[str, str] | None = None) -> Path:
        path = self.folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path, metadata)
        return path

    def add(self, tensors: Mapping[str, Tensor], scale: float = 1.0, name: str = "a", **metadata: str) -> Report:
        return self.adapters.add(self.write(tensors, name, metadata or None), scale)

    def changed(self) -> dict[tuple[str, str], Tensor]:
        """How the weights differ from what they were, in float64: those that do."""
        difference = {place: t.double() - self.before[place].double() for place, t in self.now().items()}
        return {place: d for place, d in difference.items() if bool(d.any())}


def filled(kind: type[nn.Module], config: object, dtype: torch.dtype) -> nn.Module:
    """A module of its own whose tensors are shared with all others of the kind: nothing may write into them."""
    with torch.device("meta"):
        module = kind(config)
    for name, tensor in values(kind, config, dtype).items():
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)
        if leaf in place._parameters:
            place._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            place._buffers[leaf] = tensor
    return module.eval()


@lru_cache(maxsize=16)
def values(kind: type[nn.Module], config: object, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) for name, t in randomize(kind(config), 0).state_dict().items()}


def noise(*shape: int, seed: str = "") -> Tensor:
    """Random numbers, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}{shape}".encode()))
    return torch.randn(shape, generator=generator) * 0.3


def lora(
    module: str, out: int, inputs: int, rank: int = 4, alpha: float | None = None, seed: str = ""
) -> dict[str, Tensor]:
    """A linear LoRA in kohya's spelling."""
    tensors = {
        f"{module}.lora_down.weight": noise(rank, inputs, seed=f"down{module}{seed}"),
        f"{module}.lora_up.weight": noise(out, rank, seed=f"up{module}{seed}"),
    }
    return tensors if alpha is None else {**tensors, f"{module}.alpha": torch.tensor(alpha)}


def delta(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """up @ down of such a LoRA, in float64, without its scale."""
    return tensors[f"{module}.lora_up.weight"].double() @ tensors[f"{module}.lora_down.weight"].double()


def close(ours: Tensor, expected: Tensor) -> bool:
    """Equal but for float32's rounding."""
    return ours.shape == expected.shape and torch.allclose(ours.double(), expected.double(), rtol=1e-5, atol=2e-6)
