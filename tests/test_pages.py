"""Page-locked memory of a network's blocks, from one visit of the device to the next."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event as Gate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from played_gpu import Gpu
from test_streaming import SLOW
from torch import Tensor, nn

from mmdit.common.layout import Layout
from mmdit.memory import devices, paged
from mmdit.memory.devices import locked_bytes
from mmdit.memory.paged import Paged, Pages
from mmdit.memory.residency import Mode, Network, Residency
from mmdit.memory.streaming import Stream
from weights import Source

WIDTH = 8
EACH, TAKEN = 2 * 4 * WIDTH**2 + 256, 1024  # bytes of a block, and what they take page-locked
EVERY = [f"joint_blocks.{i}.{k}.weight" for i in range(5) for k in (0, 1, 2)]


class Blocks(nn.Module):
    """Five blocks of three matrices each, the last of which is smaller."""

    layout = Layout(blocks="joint_blocks", loop=True)

    def __init__(self) -> None:
        super().__init__()
        sizes = ((WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 4))
        self.joint_blocks = nn.ModuleList(nn.Sequential(*(nn.Linear(*s, bias=False) for s in sizes)) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.joint_blocks:
            x = torch.cat([x[:, 4:], block(x)], 1)
        return x


class File:
    """Stands for a file of tensors; counts what is read of it, and may fail or wait."""

    path, name = Path("file"), "transformer"

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self.reads: list[str] = []
        self.fails: str | None = None
        self.gate: Gate | None = None
        self.waits = Gate()

    def read(self, name: str) -> Tensor:
        if self.gate is not None:
            self.waits.set()
            assert self.gate.wait(10)
        self.reads.append(name)
        if name == self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.tensors[name]

    def is_stored(self, *_: object) -> bool:
        return False


class Watched(Pages):
    """Pages that are given back and overwritten only when no copy out of them is on its way."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(torch.device("cpu"))
        self.gpu = gpu

    def release(self) -> None:
        assert self.gpu.copied()
        super().release()


class Visited:
    """A network whose blocks come and go in rounds, through page-locked memory, and its file."""

    def __init__(self, host: Gpu) -> None:
        self.host = host
        self.plain = Blocks().requires_grad_(False)
        self.file: Any = File({name: tensor.clone() for name, tensor in self.plain.state_dict().items()})
        with torch.device("meta"):
            module = Blocks()
        self.network = Network("transformer", module, Source(module, self.file), torch.device("cpu"))
        self.network.pages = Watched(host)
        self.residency = Residency({"transformer": self.network})
        self.arrange(Mode.STREAMED)
        self.x = torch.randn(2, WIDTH)

    @property
    def pages(self) -> Pages:
        return self.network.pages

    def arrange(self, mode: Mode, kept: int = 0) -> None:
        self.residency.arrange({"transformer": mode}, kept)

    def visit(self) -> list[str]:
        """Compute twice on the device, by the weights as they are now; returns what was read for that."""
        self.file.reads.clear()
        for _ in range(2):
            assert torch.equal(self.network.module(self.x), self.plain(self.x))
        self.residency.use(None)
        return list(self.file.reads)

    def put(self, name: str, tensor: Tensor | None) -> None:
        self.network.put(name, tensor)
        self.plain.get_submodule(name.rpartition(".")[0])._parameters["weight"] = nn.Parameter(
            self.file.tensors[name] if tensor is None else tensor, requires_grad=False
        )


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> Iterator[Visited]:
    host = Gpu(10**9)
    host.play(monkeypatch)
    monkeypatch.setattr(devices, "available_bytes", lambda: None)
    monkeypatch.setattr(Network, "lies", lambda *_: False)  # nothing is used where it lies in the file
    paged.tell_slow.cache_clear()
    found = Visited(host)
    yield found
    found.residency.use(None)
    paged.tell_slow.cache_clear()
    assert not host.harm


# ---- from visit to visit -------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "going"), [(0, [0, 1, 2, 3, 4]), (2, [0, 1, 3])])
def test_a_second_visit_reads_only_what_stays(visited: Visited, kept: int, going: list[int]) -> None:
    """Each block that comes and goes has memory of its own, once."""
    visited.arrange(Mode.STREAMED, kept)
    assert sorted(visited.visit()) == EVERY
    stays = [name for name in EVERY if int(name.split(".")[1]) not in going]
    for _ in range(2):
        assert visited.visit() == stays
    assert visited.host.asked == [EACH] * len(going)
    assert visited.host.taken == TAKEN * len(going)


def test_weights_that_are_put_between_visits_arrive(visited: Visited) -> None:
    """And the file's when they are taken out; blocks without them are not read again."""
    visited.visit()
    name = "joint_blocks.2.1.weight"
    for weight in (torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH), None):
        visited.put(name, weight)
        there = [f"joint_blocks.2.{k}.weight" for k in (0, 1, 2)]
        assert visited.visit() == [each for each in there if each != name or weight is None]
        assert visited.visit() == []
    assert visited.host.asked == [EACH] * 5


def test_a_weight_that_is_put_while_its_block_is_on_its_way(visited: Visited, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read then is waited for, and read again."""
    close, wanted, gate = Stream.close, "joint_blocks.1.0.weight", Gate()
    visited.visit()
    visited.pages.forget(wanted)
    visited.network.enter()
    visited.file.gate = gate
    visited.network.module.joint_blocks[0](visited.x)  # the next is on its way
    assert visited.file.waits.wait(10)
    monkeypatch.setattr(Stream, "close", lambda stream: gate.set() or close(stream))
    visited.put(wanted, torch.randn(WIDTH, WIDTH))
    visited.file.gate = None
    visited.visit()
    assert visited.visit() == []


@pytest.mark.parametrize("mode", [Mode.STAGED, Mode.RESIDENT])
def test_another_arrangement_gives_the_memory_back(visited: Visited, mode: Mode) -> None:
    """To the system; the same one leaves it."""
    visited.visit()
    visited.arrange(Mode.STREAMED)
    assert (visited.host.taken, visited.visit()) == (5 * TAKEN, [])
    visited.network.enter()
    visited.arrange(mode)
    assert (visited.host.taken, visited.pages.memory, visited.pages.read) == (0, {}, set())
    visited.visit()
    visited.arrange(Mode.STREAMED)
    assert sorted(visited.visit()) == EVERY


def test_other_blocks_that_stay_between_visits(visited: Visited) -> None:
    """As a list's texts are encoded under a plan of their own: only a visit finds out whether the same blocks come."""
    visited.visit()
    visited.arrange(Mode.STREAMED, 1)
    visited.arrange(Mode.STREAMED)
    assert visited.visit() == []
    visited.arrange(Mode.STREAMED, 1)
    visited.visit()
    assert visited.host.taken == 4 * TAKEN


def test_memory_that_runs_out_at_loading(visited: Visited) -> None:
    """Blocks of another network have theirs no longer."""
    with torch.device("meta"):
        module = nn.ModuleDict({"encoder": nn.Linear(1, 1, bias=False), "decoder": nn.Linear(1, 1, bias=False)})
    file: Any = File({name: torch.ones(1, 1) for name in module.state_dict()})
    networks = {
        "transformer": visited.network,
        "vae": Network("vae", module, Source(module, file), torch.device("cpu")),
    }
    residency, modes = Residency(networks), {"transformer": Mode.STREAMED, "vae": Mode.STAGED}
    residency.arrange(modes)
    visited.visit()
    residency.arrange(modes)
    assert visited.visit() == []
    visited.network.enter()
    visited.network.module(visited.x)
    file.fails = "decoder.weight"
    with pytest.raises(torch.OutOfMemoryError):
        residency.arrange({**modes, "vae": Mode.RESIDENT})
    assert (visited.host.taken, visited.pages.memory, visited.pages.read) == (0, {}, set())
    assert sorted(visited.visit()) == EVERY


def test_a_block_that_was_read_in_part_is_read_again(visited: Visited) -> None:
    """In the next visit, from its first tensor on."""
    visited.file.fails = "joint_blocks.2.1.weight"
    with pytest.raises(torch.OutOfMemoryError):
        visited.network.module(visited.x)
    visited.residency.use(None)
    assert len(visited.pages.read) == 2
    visited.file.fails = None
    assert visited.visit() == EVERY[6:]
    assert visited.visit() == []


def test_one_carrier_at_a_time(visited: Visited) -> None:
    """Until the first is closed; what it took is not dropped meanwhile."""
    here, pages, units = torch.device("cpu"), Watched(visited.host), visited.network.blocks
    source, names = visited.network.source, [unit.names for unit in units]
    first = Paged(names, source, here, pages)
    with pytest.raises(AssertionError, match="two carriers"):
        Paged(names, source, here, pages)
    with pytest.raises(AssertionError, match="on their way"):
        pages.drop()
    first.close()
    Paged(names[:2], source, here, pages).close()


def test_other_blocks_than_before(visited: Visited) -> None:
    """They get memory of their own, and what was there for others goes first."""
    host, names = visited.host, [unit.names for unit in visited.network.blocks]
    pages = Pages(torch.device("cpu"))
    assert pages.hold(dict.fromkeys(names[:3], EACH))
    pages.read.update(names[:3])
    assert pages.hold(dict.fromkeys(names[2::-1], EACH))
    assert (len(host.asked), len(pages.read)) == (3, 3)
    host.most = 4 * TAKEN
    assert pages.hold(dict.fromkeys(names[:4], EACH))
    assert (len(host.asked), host.taken, pages.read) == (7, 4 * TAKEN, set())
    assert pages.hold(dict.fromkeys(names[:2], EACH))
    assert (len(host.asked), host.taken) == (9, 2 * TAKEN)


# ---- how much ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (2, 2), (3, 4), (256, 256), (257, 512), (132 * 10**6, 2**27)])
def test_what_page_locked_memory_takes(size: int, taken: int) -> None:
    assert locked_bytes(size) == taken


@pytest.mark.parametrize(
    ("free", "fits"), [(10 * TAKEN, True), (10 * TAKEN - 1, False), (10 * EACH, False), (0, False), (None, True)]
)
def test_half_of_what_is_free_and_no_more(
    visited: Visited, monkeypatch: pytest.MonkeyPatch, free: int | None, fits: bool
) -> None:
    """Where all blocks would take more there are two places from the start, and nobody is warned."""
    monkeypatch.setattr(devices, "available_bytes", lambda: free)
    visited.visit()
    assert visited.host.asked == [EACH] * (5 if fits else 2)
    assert visited.host.cached == [TAKEN] * (0 if fits else 2)  # places are not kept from visit to visit
    assert len(visited.visit()) == (0 if fits else 11 * 3)  # two rounds, and the first block of a third


def test_what_others_left_page_locked_goes_back_before_it_is_seen_how_much_is_free(
    visited: Visited, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the two places of a text encoder."""
    host = visited.host
    host.taken += 2**20
    host.cached.append(2**20)
    monkeypatch.setattr(devices, "available_bytes", lambda: 10 * TAKEN - host.taken)
    visited.visit()
    assert host.asked == [EACH] * 5


def test_page_locking_that_fails_at_the_fourth_block(visited: Visited) -> None:
    """At every visit it is tried again, and said once; as soon as there is enough, each has its own."""
    visited.host.most = 4 * TAKEN - 1
    with pytest.warns(UserWarning, match=SLOW) as warned:
        visited.visit()
    visited.visit()
    assert len(warned) == 1
    assert visited.host.asked == [EACH] * 12
    assert visited.pages.memory == {}
    visited.host.most = 10 * TAKEN
    assert sorted(visited.visit()) == EVERY
    assert visited.visit() == []


@pytest.mark.parametrize("device", [torch.device("cuda", 1), torch.device("cpu")])
def test_strips_give_their_memory_back(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all that is page-locked and not in use, when nothing is to be computed for now; wherever the networks are."""
    with torch.device("meta"):
        module = nn.ModuleDict({"encoder": nn.Linear(1, 1, bias=False), "decoder": nn.Linear(1, 1, bias=False)})
    file: Any = File({name: torch.ones(1, 1) for name in module.state_dict()})
    host, kept = Gpu(), Network("vae", module, Source(module, file), device)
    host.play(monkeypatch)
    kept.here = True  # for good
    host.empty(1000, pin_memory=True)  # which is cached as soon as nobody has it
    residency = Residency({"vae": kept})
    residency.use("vae")
    assert host.taken == 1024
    residency.use(None)
    assert host.taken == (0 if device.type == "cuda" else 1024)


def test_without_what_empties_the_cache(visited: Visited) -> None:
    """Older PyTorch has no name for it; a GPU that has failed has an error."""

    def failed() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for namespace in (SimpleNamespace(), SimpleNamespace(_host_emptyCache=failed)):
        visited.host._C = namespace
        visited.visit()
        visited.pages.drop()
        assert visited.pages.memory == {}
