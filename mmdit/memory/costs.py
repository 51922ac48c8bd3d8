"""What a stage takes of the device's memory, part by part: weights, counted; computations, from `activations`.

On a CPU memory means what a process has of its own; weights that are used where they lie in the mapped file cost
nothing.
"""

from collections.abc import Callable, Mapping

import torch

from mmdit.memory.activations import Activations
from mmdit.memory.devices import lockable_bytes, locked_bytes, taken_bytes
from mmdit.memory.plan import Bytes, Job
from mmdit.memory.residency import Mode, Network, Role, of_role
from mmdit.memory.streaming import Unit

# Bytes that matrix products and their like take for themselves; on a CPU also modules loaded at their first use, and
# what the C library keeps of memory that was freed in pieces.
_WORKSPACE = {"cuda": 40_000_000, "cpu": 120_000_000}
_THREAD = 15_000_000  # bytes of each of the CPU's threads beyond two, for the scores of a head


class Costs:
    """Of one model's networks on one device."""

    def __init__(self, networks: Mapping[str, Network], device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of the latents, as the networks that denoise are given them."""
        self.activations = Activations(networks, device, dtype)
        self._networks, self._device = networks, device

    # ---- weights ---------------------------------------------------------------------------------

    def weights(self, name: str, mode: Mode, kept: int = 0) -> int:
        """Bytes of what lies on the device as long as the network is there."""
        network = self._networks[name]
        if network.editable:
            return sum(tensor.nbytes for tensor in (*network.module.parameters(), *network.module.buffers()))
        apart = {n for unit in network.apart(mode, kept) for n in unit.names}
        if self._device.type != "cpu":
            apart.update(network.layout.tables)
        return network.cost(*(n for n in network.names if n not in apart))

    def staying(self, modes: Mapping[str, Mode]) -> int:
        """Bytes of the weights that are on the device for good."""
        return sum(self.weights(name, mode) for name, mode in modes.items() if mode is Mode.RESIDENT)

    def size(self, name: str) -> int:
        """Bytes of all weights of a network, wherever they lie."""
        return sum(map(self._networks[name].source.nbytes, self._networks[name].names))

    def adapted(self) -> int:
        """Bytes of weights under adapters that are the device's: they lie on the host, whatever the plan."""
        if self._device.type != "cpu":
            return 0
        return sum(network.source.put_bytes for network in self._networks.values())

    def beside(self) -> int:
        """Bytes that this process has on the device beside the model's weights, or will have."""
        here = {name: network for name, network in self._networks.items() if network.here}
        ours = sum(self.weights(name, network.mode, network.kept) for name, network in here.items()) + self.adapted()
        ours += sum(self._passing(network, network.apart(network.mode, network.kept)) for network in here.values())
        threads = max(0, torch.get_num_threads() - 2) if self._device.type == "cpu" else 0
        return _WORKSPACE.get(self._device.type, 0) + _THREAD * threads + max(0, taken_bytes(self._device) - ours)

    # ---- stages ----------------------------------------------------------------------------------

    def encoding(self, modes: Mapping[str, Mode], job: Job, rough: bool) -> Bytes:
        """For the texts of one picture; what stays is left out. rough: a bound from above, without measuring."""
        work = self.activations.encoding_bound if rough else self.activations.encoding
        names = of_role(Role.ENCODES_TEXT, modes)
        return _all_of(Role.ENCODES_TEXT, [self._visit(name, modes[name], 0, 0, work(name, job)) for name in names])

    def denoising(self, modes: Mapping[str, Mode], kept: int, job: Job, batch: int, rough: bool) -> Bytes:
        """For `batch` pictures at a time. kept: blocks that stay of those that would come and go."""
        found = []
        for name in of_role(Role.DENOISES, modes):
            table, work = self._denoising(name, job, batch, rough)
            found.append(self._visit(name, modes[name], kept, table, table + work))
        return _all_of(Role.DENOISES, found)

    def _denoising(self, name: str, job: Job, batch: int, rough: bool) -> tuple[int, int]:
        """Bytes of what is told to the blocks, and of a step; of an edit that needs real numbers, the bounds."""
        if not rough:
            try:
                return self.activations.table(name, job, batch), self.activations.denoising(name, job, batch)
            except RuntimeError:
                if not self._networks[name].editable:
                    raise
        return self.activations.table_bound(name, job, batch), self.activations.denoising_bound(name, job, batch)

    def decoding(self, modes: Mapping[str, Mode], job: Job, budget: int) -> tuple[int | None, Bytes]:
        """For one picture in the highest strips with which that keeps to the budget, and their height; None: whole."""
        return self._in_strips(Role.DECODES, self.activations.decoding, modes, job, budget)

    def encoding_picture(self, modes: Mapping[str, Mode], job: Job, budget: int) -> tuple[int | None, Bytes]:
        """The same for the picture that another begins with."""
        return self._in_strips(Role.ENCODES_PICTURE, self.activations.encoding_picture, modes, job, budget)

    def _in_strips(
        self,
        role: Role,
        work: Callable[[str, Job, int], tuple[int | None, int]],
        modes: Mapping[str, Mode],
        job: Job,
        budget: int,
    ) -> tuple[int | None, Bytes]:
        (name,) = of_role(role, modes)
        coming = self._visit(name, modes[name], 0, 0, 0)
        strip, working = work(name, job, budget - coming.peak)
        return strip, coming._replace(working=working)

    def locked(self, modes: Mapping[str, Mode], kept: int, job: Job, strip: int | None) -> int:
        """Bytes of the host's memory that strips lie in page-locked; 0 where there are too few to lock for that.

        Blocks that come and go come first: they wait in page-locked memory from visit to visit, if all find room.
        """
        if self._device.type != "cuda" or strip is None:
            return 0
        held = sum(network.pages.locked for network in self._networks.values())
        room, blocks = lockable_bytes(held), 0
        for name in of_role(Role.DENOISES, modes):
            network = self._networks[name]
            going = network.going(kept) if modes[name] is Mode.STREAMED else []
            blocks += sum(locked_bytes(network.cost(*unit.names)) for unit in going)
        (name,) = of_role(Role.DECODES, modes)
        strips = self.activations.locked(name, job)
        return strips if strips + (blocks if blocks <= room else 0) <= room else 0

    def _visit(self, name: str, mode: Mode, kept: int, before: int, working: int) -> Bytes:
        """A network's part of a stage. before: bytes that are computed before its loop; working: those in it."""
        network = self._networks[name]
        coming = 0 if mode is Mode.RESIDENT else self.weights(name, mode, kept)
        apart = network.apart(mode, kept)
        first = self._passing(network, [unit for unit in apart if unit in network.before])
        loop = self._passing(network, [unit for unit in apart if unit not in network.before])
        moments = Bytes(0, 0, coming, first, before), Bytes(0, 0, coming, loop, working)
        return max(moments, key=lambda moment: moment.peak)

    def _passing(self, network: Network, units: list[Unit]) -> int:
        """Bytes of two of the units, as many as are there at a time."""
        return 2 * max((network.cost(*unit.names) for unit in units), default=0)


def _all_of(role: Role, networks: list[Bytes]) -> Bytes:
    """What the networks of a role take: the most that one of them does, or where they work together, all of them."""
    if role.in_turns:
        return max(networks, key=lambda network: network.peak, default=Bytes())
    return Bytes(*map(sum, zip(*networks)))
