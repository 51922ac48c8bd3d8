"""Where the weights are: on the device for good, for as long as their network is used, or while their block runs.

A network's module exists from the start, empty; what `Network.enter` puts into it, `leave` takes out again. Two kinds
of weights are treated apart: tables of which a run needs a few rows stay on the host, and the transformer's adaLN
layers, a third of its weights, are used before the first step for all steps at once and need not be there in the loop.
"""

import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmdit.common.errors import SettingsError
from mmdit.common.layout import Layout
from mmdit.memory.devices import give_back, unlock
from mmdit.memory.paged import Pages
from mmdit.memory.streaming import Stream, Unit
from weights import Source


class Mode(StrEnum):
    """How a network is on the device."""

    RESIDENT = "resident"  # from loading on, all but its table
    STAGED = "staged"  # while it is used, without what is needed only before the loop
    STREAMED = "streamed"  # while it is used, and of its blocks only the one that runs and the next, and those kept


class Role(StrEnum):
    """What a network does for a picture; the value is the stage in which it does that."""

    ENCODES_TEXT = "encode"
    ENCODES_PICTURE = "init"
    DENOISES = "denoise"
    DECODES = "decode"

    @property
    def in_turns(self) -> bool:
        """Whether networks of this role run one after another; else they are on the device together."""
        return self is not Role.DENOISES


ROLES = {
    "clip_l": Role.ENCODES_TEXT,
    "clip_g": Role.ENCODES_TEXT,
    "t5": Role.ENCODES_TEXT,
    "transformer": Role.DENOISES,
    "control": Role.DENOISES,
    "vae": Role.DECODES,
}


def role_of(name: str) -> Role:
    """The role of a network; the names of several alike end in a space and a number."""
    return ROLES[name.partition(" ")[0]]


def of_role(role: Role, names: Iterable[str]) -> list[str]:
    """Those of these networks that have the role; the one that decodes pictures encodes them too."""
    own = Role.DECODES if role is Role.ENCODES_PICTURE else role
    return [name for name in names if role_of(name) is own]


class Network:
    """One of the model's networks: a module, the source of its weights, and how they come to the device.

    `Adapters` may be given one in a module's place.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        source: Source,
        device: torch.device,
    ) -> None:
        """module: built on "meta"; it is frozen and put into eval mode. device: where it is to compute."""
        self.module: Any = module.requires_grad_(False).eval()
        for tensor, empty in module.state_dict(keep_vars=True).items():
            empty.data = empty.data.to(source.dtype(tensor))
        self.name, self.source, self.device = name, source, device
        self.mode, self.kept = Mode.RESIDENT, 0  # blocks that stay while the others come and go
        self.shapes = {name: shape for name, shape in source.shapes.items() if not name.endswith("weight_scale")}
        self.original = source.original
        self.layout: Layout = getattr(module, "layout", Layout())
        self.role = role_of(name)
        self.before, self.blocks = units(module, self.layout)
        self._empty = module.state_dict(keep_vars=True)
        seen: set[int] = set()  # a module may stand in several places: its tensors have the first of their names
        self.names = [n for n, t in self._empty.items() if not (id(t) in seen or seen.add(id(t)))]
        self._owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in self._empty}
        self._versions = {name: tensor._version for name, tensor in self._empty.items()}
        self.here = self.editable = False
        self.pages = Pages(device)  # of the blocks that come in rounds, from visit to visit
        self._streams: list[Stream] = []
        for table in self.layout.tables:
            owner = module.get_submodule(table.rpartition(".")[0])
            if isinstance(owner, nn.Embedding):
                owner.register_forward_hook(lambda _, __, rows: rows.to(device))

    def enter(self, progress: Callable[[int], object] = int) -> None:
        """Bring the weights to the device as `mode` says; nothing where they are there.

        progress: called with the size in bytes of each tensor that has come.
        """
        if self.here:
            return
        self._check_unchanged()
        self.here = True  # from the first tensor on, so that `leave` takes out what came before a failure
        try:
            self._bring(progress)
        except BaseException:
            self.leave()  # or what came in part would be taken for the whole
            raise

    def _bring(self, progress: Callable[[int], object]) -> None:
        apart = self.apart(self.mode, self.kept)
        later = {name for unit in apart for name in unit.names}
        for name in self.names:
            if name not in later:
                self._bind(name, self._placed(name))
                progress(self.source.nbytes(name))
        before = [unit for unit in apart if unit in self.before]
        blocks = [unit for unit in apart if unit in self.blocks]
        for run, loop in ((before, False), (blocks, self.layout.loop)):
            if run:
                self._streams.append(Stream(run, self.source, self._bind, self.device, loop, self.pages))

    def settle(self) -> None:
        """Bring all weights to the device for good, as parameters that are the module's own and may be changed."""
        self.mode = Mode.RESIDENT
        self.enter()
        for name, tensor in self.module.state_dict().items():
            if name in self.names:
                self._bind(name, tensor.to(self.device, copy=True))
        self.editable = True

    def _check_unchanged(self) -> None:
        """Raise SettingsError where the module was changed while its weights were away."""
        modules = dict(self.module.named_modules(remove_duplicate=False))
        for name, owner in self._owners.items():
            path = name.rpartition(".")[0]
            if modules.get(path) is not owner:
                what = f"{path} is another module"
            elif self._empty[name]._version != self._versions[name]:
                what = f"{name} was written to while its values were not there"
            else:
                continue
            raise SettingsError(
                f"the {self.name} was changed after it was loaded ({what}): load it with editable=True to change it"
            )

    def leave(self) -> None:
        """Free the device of them; nothing where they are not there, or are to stay as they are now."""
        if not self.here or self.editable:
            return
        for stream in self._streams:
            stream.close()
        self._streams.clear()
        for name in self.names:
            self._bind(name, None)
        self.here = False
        give_back(self.device)

    def apart(self, mode: Mode, kept: int = 0) -> list[Unit]:
        """The units that come to the device only while they run; kept: blocks that stay though others come and go."""
        if mode is Mode.STREAMED:
            return [*self.before, *self.going(kept)]
        return self.before if mode is Mode.STAGED else []

    def going(self, kept: int) -> list[Unit]:
        """The blocks that come and go where so many stay beside those that take no memory of the device."""
        return spread([unit for unit in self.blocks if self.cost(*unit.names)], kept)

    def cost(self, *names: str) -> int:
        """Bytes that these tensors, as they were loaded, take of the device's memory."""
        return sum(self.source.nbytes(name) for name in names if not self.lies(name))

    def lies(self, name: str) -> bool:
        """Whether a tensor is used where it lies already, in the file or under adapters."""
        there = self.source.is_put(name) or (self.source.is_mapped(name) and not self.layout.channels_last)
        return there and self.device.type == "cpu"

    def put(self, name: str, tensor: Tensor | None) -> None:
        """Compute with this weight, on the CPU, from now on; None: with the original."""
        if self.editable:
            raise SettingsError("lora: the adapters of an editable model are given when it is loaded")
        stays = self.here and self.mode is Mode.RESIDENT
        if not stays:
            self.leave()  # first: a block may be on its way
        self.source.put(name, tensor)
        if not stays:
            self.pages.forget(name)
            return
        for each in (name, f"{name}_scale"):
            if each in self.source.shapes:
                self._bind(each, self._placed(each))

    def _placed(self, name: str) -> Tensor:
        tensor = self.source(name)
        if self.layout.channels_last and tensor.ndim == 4 and tensor.itemsize == 2:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor if name in self.layout.tables else tensor.to(self.device)

    def _bind(self, name: str, tensor: Tensor | None) -> None:
        module, empty, leaf = self._owners[name], self._empty[name], name.rpartition(".")[2]
        if isinstance(empty, nn.Parameter):
            module._parameters[leaf] = empty if tensor is None else nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = empty if tensor is None else tensor


def units(module: nn.Module, layout: Layout) -> tuple[list[Unit], list[Unit]]:
    """The modules used before the loop, and the blocks, each with the matrices that it alone needs.

    Vectors are left out: they are too many to copy one by one and too small to matter.
    """
    before = [name for name, _ in module.named_modules() if layout.before and re.fullmatch(layout.before, name)]
    blocks = (
        [f"{layout.blocks}.{name}" for name, _ in module.get_submodule(layout.blocks).named_children()]
        if layout.blocks
        else []
    )
    large = [name for name, tensor in module.named_parameters() if tensor.ndim > 1 and not _looked_up(module, name)]
    taken: set[str] = set()
    found: list[list[Unit]] = []
    for group in (before, blocks):
        found.append([])
        for owner in group:
            names = tuple(name for name in large if name.startswith(f"{owner}.") and name not in taken)
            taken.update(names)
            found[-1].append(Unit(module.get_submodule(owner), names))
    return found[0], found[1]


def spread(blocks: list[Unit], kept: int) -> list[Unit]:
    """All but so many of them: those left out lie evenly among the rest, which come while several blocks compute."""
    count = len(blocks)
    return [block for i, block in enumerate(blocks) if i * kept // count == (i + 1) * kept // count]


def _looked_up(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Embedding)


class Residency:
    """All networks of a model: those that are not there for good take turns."""

    def __init__(self, networks: dict[str, Network]) -> None:
        self.networks = networks
        for name, network in networks.items():
            for module in (network.module, *map(network.module.get_submodule, network.layout.entries)):
                module.register_forward_pre_hook(lambda *_, name=name: self.use(name))

    def use(self, name: str | None) -> None:
        """Bring this network to the device, all others that are neither resident nor work with it having left it.

        None: nothing is to be computed for now. Then the host has its page-locked memory back too, all but `Pages`.
        """
        role = None if name is None else self.networks[name].role
        together = {n for n, network in self.networks.items() if network.role is role and not network.role.in_turns}
        for other, network in self.networks.items():
            if other != name and other not in together and network.mode is not Mode.RESIDENT:
                network.leave()
        if name is not None:
            self.networks[name].enter()
        else:
            for device in {network.device for network in self.networks.values() if network.device.type == "cuda"}:
                unlock(device)

    def arrange(self, modes: dict[str, Mode], kept: int = 0) -> None:
        """From now on, these networks are on the device in these ways; those that are to stay there come now.

        kept: blocks that stay of a network whose blocks come and go in rounds. Where that fails, all networks leave.
        """
        for name, mode in modes.items():
            network = self.networks[name]
            blocks = kept if network.layout.loop and mode is Mode.STREAMED else 0
            if (network.mode, network.kept) != (mode, blocks):
                network.leave()
                if network.mode is not mode:  # else the next visit finds out whether the same blocks come
                    network.pages.drop()
                network.mode, network.kept = mode, blocks
        stay = [network for name, network in self.networks.items() if modes[name] is Mode.RESIDENT]
        size = sum(network.source.nbytes(name) for network in stay for name in network.names if not network.here)
        if size:
            try:
                with tqdm(total=size, desc="load", unit="B", unit_scale=True, disable=None, leave=False) as bar:
                    for network in stay:
                        network.enter(bar.update)
            except BaseException:
                for network in self.networks.values():
                    network.leave()
                self.drop()
                raise

    def drop(self) -> None:
        """Free the host's memory of blocks that come and go; they have to have left."""
        for network in self.networks.values():
            network.pages.drop()
