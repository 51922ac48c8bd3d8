"""Low-rank adapters beside frozen linear layers, to be trained: W x + s B A x (Hu et al. 2021, arXiv 2106.09685).

They are hooks on the layers of a built model. Nothing is put into the model or copied from it, so weights may come and
go, lie in a file or in 8 bits; and one model is both, with adapters and without:

    lora = Lora(model, targets(model, JOINT_ATTENTION), rank=16)
    model(...)          # with
    with lora.off():
        model(...)      # without

q, k and v, one matrix here, have two matrices each, as in diffusers: so are the names in the file, which PEFT's loader,
diffusers' and this project's read.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.common.errors import SettingsError
from mmdit.finetune.state import seeded
from weights.keymap import TRANSFORMER, to_diffusers
from weights.write import Item, write_safetensors

JOINT_ATTENTION = r"joint_blocks\.\d+\.(x|context)_block\.attn\.(qkv|proj)"  # all of both streams; no attn2


class Target(NamedTuple):
    """A linear layer that is adapted."""

    module: str  # its name in the model
    parts: tuple[str, ...]  # diffusers' names of the layers that its rows are, from the first


def targets(model: nn.Module, pattern: str) -> list[Target]:
    """The linear layers whose names match. Raises SettingsError where there are none."""
    found = [
        name for name, module in model.named_modules() if re.fullmatch(pattern, name) and isinstance(module, nn.Linear)
    ]
    if not found:
        raise SettingsError("the model has none of the layers that are adapted")
    parts: dict[str, dict[int, str]] = {name: {} for name in found}
    for weight, entry in to_diffusers([f"{name}.weight" for name in found], TRANSFORMER).items():
        assert entry.op in ("copy", "split3"), entry.op
        parts[entry.sources[0].removesuffix(".weight")][entry.part] = weight.removesuffix(".weight")
    return [Target(name, tuple(own[i] for i in sorted(own))) for name, own in parts.items()]


def taken(model: nn.Module, targets: Sequence[Target], rank: int) -> int:
    """Bytes on the device of the adapters of these layers while they are trained.

    In float32: the matrices, their gradients, and Adam's two means of each.
    """
    layers: list[Any] = [(target, model.get_submodule(target.module)) for target in targets]
    return 4 * 4 * rank * sum(len(target.parts) * layer.in_features + layer.out_features for target, layer in layers)


class Lora:
    """Adapters of some layers of a model, float32, which change nothing until they are trained."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        rank: int,
        strength: float = 1.0,
        device: torch.device | None = None,
        seed: int = 0,
    ) -> None:
        """strength: s above, alpha / rank. device: where the model computes, the CPU if not said.

        A is drawn as Kaiming has it, B is zero, as in PEFT.
        """
        self.strength, self.on = strength, True
        self.matrices: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}  # A (rank, in) and B (out, rank), by part
        self._handles = []
        for target in targets:
            layer: Any = model.get_submodule(target.module)
            rows = layer.out_features // len(target.parts)
            for part in target.parts:
                a = torch.rand(rank, layer.in_features, generator=seeded(seed, part))
                a = (2 * a - 1) / math.sqrt(layer.in_features)
                b = torch.zeros(rows, rank)
                self.matrices[part] = (nn.Parameter(a.to(device=device)), nn.Parameter(b.to(device=device)))
            own = [self.matrices[part] for part in target.parts]
            self._handles.append(layer.register_forward_hook(lambda _, given, out, own=own: self._add(own, given, out)))

    def _add(self, own: Sequence[tuple[Tensor, Tensor]], given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not self.on:
            return out
        x = given[0]
        parts = [F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) for a, b in own]
        return out + self.strength * (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])

    @contextmanager
    def off(self) -> Iterator[None]:
        """Meanwhile the model is as it was. What gradients go back through has to be gone back through inside, too."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def close(self) -> None:
        """Leave the model as it was, for good."""
        for handle in self._handles:
            handle.remove()

    def parameters(self) -> list[nn.Parameter]:
        return [matrix for pair in self.matrices.values() for matrix in pair]

    def state(self) -> dict[str, Tensor]:
        """The matrices as they are, by diffusers' names, to go on from."""
        return {
            f"{part}.lora_{kind}": m.detach() for part, pair in self.matrices.items() for kind, m in zip("AB", pair)
        }

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """What `state` gave, of a model and rank as these are."""
        assert state.keys() == self.state().keys()
        for part, pair in self.matrices.items():
            for kind, matrix in zip("AB", pair):
                matrix.copy_(state[f"{part}.lora_{kind}"])

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        """The file that others read: diffusers' names, float32, no alpha, since B has the strength in it."""
        tensors: dict[str, Tensor] = {}
        for part, (a, b) in self.matrices.items():
            tensors[f"transformer.{part}.lora_A.weight"] = a.detach().cpu()
            tensors[f"transformer.{part}.lora_B.weight"] = self.strength * b.detach().cpu()
        items = [Item(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_safetensors(path, items, tensors.values(), metadata)
