"""Weights that come and go with the module that runs."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from played_gpu import Gpu
from torch import Tensor, nn

from mmdit.memory import devices, paged, streaming
from mmdit.memory.paged import Paged, Pages


class Read:
    """A source of weights of 64 bytes that a function reads."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self.read = read

    def __call__(self, name: str) -> Tensor:
        return self.read(name)

    def nbytes(self, _: str) -> int:
        return 64


def test_a_stream_begins_anew_after_a_break() -> None:
    """Three layers, broken off in the second: the third's weights, on their way then, are not taken for the first's."""
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).requires_grad_(False)
    stored = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    source: Any = Read(stored.__getitem__)

    def bind(name: str, tensor: Tensor | None) -> None:
        layers.get_submodule(name.split(".")[0])._parameters["weight"] = tensor  # type: ignore[assignment]

    units = [streaming.Unit(layer, (f"{i}.weight",)) for i, layer in enumerate(layers)]
    x = torch.randn(2, 4)
    expected = layers(x)
    stream = streaming.Stream(units, source, bind, torch.device("cpu"), rounds=True)
    assert torch.equal(layers(x), expected)
    hook = layers[1].register_forward_pre_hook(lambda *_: pytest.fail("broken off"))
    with pytest.raises(pytest.fail.Exception):
        layers(x)
    hook.remove()
    assert torch.equal(layers(x), expected)
    stream.close()
    assert all(layer.weight is None for layer in layers)


@pytest.mark.parametrize("block", range(5))
@pytest.mark.parametrize("late", [False, True], ids=["before its weights are read", "after"])
def test_a_break_in_any_layer_harms_nothing_on_a_gpu(block: int, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next round's copies wait for what the broken one's layer may still read; nothing is waited for in vain."""
    gpu = Gpu(10**9)
    gpu.play(monkeypatch)
    layers, breaks = Layers(monkeypatch), []
    x = torch.randn(2, 8)
    expected = layers.outputs(x)

    def off(*_: object) -> None:
        if breaks:
            pytest.fail("broken off")

    layer = layers.net[block]
    if late:
        layer.register_forward_hook(off)  # before the stream's own, so the layer is not left
    stream = layers.stream(rounds=True, pages=Pages(GPU))
    if not late:
        layer.register_forward_pre_hook(off)
    layers.outputs(x)
    breaks.append(True)
    with pytest.raises(pytest.fail.Exception):
        layers.outputs(x)
    breaks.clear()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(layers.outputs(x), expected))
    stream.close()
    assert not gpu.harm


def test_weights_stay_for_what_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up, and back again as where each layer is computed again: its weights are there until the next one's turn.

    On the way back the next to come is the layer before, so nothing is brought in vain but at the two ends.
    """
    gpu, brought = Gpu(10**9), list[int]()
    gpu.play(monkeypatch)
    layers, x = Layers(monkeypatch), torch.randn(2, 8)
    expected = layers.outputs(x)
    stream = layers.stream(rounds=True, pages=Pages(GPU))
    real = stream._carrier.start
    monkeypatch.setattr(stream._carrier, "start", lambda unit: [brought.append(unit), real(unit)][1])
    for again in range(2):
        with torch.enable_grad():
            for i in [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]:
                assert torch.equal(layers.net[i](x), expected[i])
                assert stream._ahead is not None
                stream._ahead.tensors.result()  # what comes next is there: it is in none of this layer's memory
                assert torch.equal(layers.net[i].weight + 0, layers.stored[f"{i}.weight"])
                assert not again or [layer.weight is None for layer in layers.net].count(False) == 1
        assert torch.equal(layers.net[0](x), expected[0])
    assert brought[:12] == [0, 1, 2, 3, 4, 0, 4, 3, 2, 1, 0, 1]
    stream.close()
    assert not gpu.harm and all(layer.weight is None for layer in layers.net)


def test_what_failed_on_its_way_to_a_broken_round_is_not_the_next_ones_error() -> None:
    """The third layer's weights cannot be read while the second runs; the next round begins with the first."""
    net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).requires_grad_(False)
    stored, fails = {name: tensor.clone() for name, tensor in net.state_dict().items()}, []

    def source(name: str) -> Tensor:
        if fails and name == "2.weight":
            raise OSError("gone")
        return stored[name]

    def bind(name: str, tensor: Tensor | None) -> None:
        net.get_submodule(name.split(".")[0])._parameters["weight"] = tensor  # type: ignore[assignment]

    units, x = [streaming.Unit(layer, (f"{i}.weight",)) for i, layer in enumerate(net)], torch.randn(2, 4)
    expected, given = net(x), Read(source)
    stream = streaming.Stream(units, given, bind, torch.device("cpu"), rounds=True)  # type: ignore[arg-type]
    fails.append(True)
    handle = net[1].register_forward_pre_hook(lambda *_: pytest.fail("broken off"))
    with pytest.raises(pytest.fail.Exception):
        net(x)
    handle.remove()
    fails.clear()
    assert torch.equal(net(x), expected)
    stream.close()


def test_weights_come_in_inference_mode_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is a thread's own: the thread that fills the memory is not in it."""
    gpu = Gpu(10**9)
    gpu.play(monkeypatch)
    layers, x = Layers(monkeypatch), torch.randn(2, 8)
    expected = layers.outputs(x)
    stream = layers.stream(rounds=True, pages=Pages(GPU))
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(layers.outputs(x), expected))
    stream.close()


@pytest.mark.parametrize(("worth", "after"), [(1, [0, 1, 2]), (128 + 160, [1]), (128 + 160 + 192, [2]), (481, [])])
def test_what_was_converted_goes_back_to_the_system(
    worth: int, after: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a unit, the last of those that run once too, but not for less than is worth it."""
    layers, gone, done = Layers(monkeypatch), [], []
    monkeypatch.setattr(streaming, "trim", lambda: done.append(len(gone)))
    monkeypatch.setattr(streaming, "_WORTH_RETURNING", worth)
    units = layers.units[:3]
    stream = streaming.Stream(units, layers, layers.bind, torch.device("cpu"), rounds=False)  # type: ignore[arg-type]
    for unit in units:
        unit.module.register_forward_hook(lambda *_: gone.append(None))
    layers.outputs(torch.randn(2, 8))
    assert done == after
    stream.close()


# ---- page-locked memory --------------------------------------------------------------------------


class Layers:
    """Five layers of 4 to 8 rows as units, and the source of their weights, which counts what is read."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.net = nn.Sequential(*(nn.Linear(8, 4 + i, bias=False) for i in range(5))).requires_grad_(False)
        self.stored = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.stored.items()}
        self.units = [streaming.Unit(layer, (f"{i}.weight",)) for i, layer in enumerate(self.net)]
        self.reads: list[str] = []

    def __call__(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.stored[name]

    def dtype(self, _: str) -> torch.dtype:
        return torch.float32

    def nbytes(self, name: str) -> int:
        return self.stored[name].nbytes

    def bind(self, name: str, tensor: Tensor | None) -> None:
        self.net.get_submodule(name.split(".")[0])._parameters["weight"] = tensor  # type: ignore[assignment]

    def stream(self, rounds: bool, pages: Pages | None = None, device: Any = None) -> streaming.Stream:
        source: Any = self
        return streaming.Stream(self.units, source, self.bind, device or GPU, rounds, pages)

    def outputs(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.net]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    found = Gpu(10**9)
    found.play(monkeypatch)
    paged.tell_slow.cache_clear()
    yield found
    paged.tell_slow.cache_clear()
    assert not found.harm


GPU = torch.device("cuda", 1)
EACH = 256  # bytes: a layer's 128 to 256, rounded up to 256
ALL, TWO = [EACH] * 5, [EACH] * 2
SLOW = "^the host has too little page-locked memory: weights come to the GPU more slowly$"


@pytest.mark.parametrize(
    ("most", "asked", "pageable", "reads"),
    [
        (5 * EACH, ALL, [], 5),
        (5 * EACH - 1, ALL + TWO, [], 16),
        (2 * EACH, [*TWO, EACH, *TWO], [], 16),
        (2 * EACH - 1, TWO + TWO, TWO, 16),
        (0, TWO, TWO, 16),
    ],
)
def test_less_page_locked_memory_than_all_units_take(
    monkeypatch: pytest.MonkeyPatch, host: Gpu, most: int, asked: list[int], pageable: list[int], reads: int
) -> None:
    """Three rounds of five layers and the first of a fourth, of which each is read once, or anew at every turn.

    What was page-locked before the first that could not be is back when the two places are asked for, and when they
    cannot be had.
    """
    layers, pages, x = Layers(monkeypatch), Pages(GPU), torch.randn(2, 8)
    expected, host.most, all_fit = layers.outputs(x), most, reads == 5
    stream = layers.stream(rounds=True, pages=pages)
    with nullcontext() if all_fit else pytest.warns(UserWarning, match=SLOW) as warned:
        for _ in range(3):
            assert all(map(torch.equal, layers.outputs(x), expected))
        assert host.taken == (0 if pageable else 5 * EACH if all_fit else 2 * EACH)
        stream.close()
    assert warned is None or len(warned) == 1
    assert (host.asked, host.pageable) == (asked, pageable)
    assert pages.memory.keys() == pages.read == {unit.names for unit in layers.units if all_fit}
    for (name,), memory in pages.memory.items():
        assert torch.equal(memory.view(torch.float32)[: layers.stored[name].numel()], layers.stored[name].flatten())
    assert len(layers.reads) == reads
    assert layers.reads == [f"{i % 5}.weight" for i in range(reads)]
    assert all(layer.weight is None for layer in layers.net)


def test_units_that_run_once_have_two_places(monkeypatch: pytest.MonkeyPatch, host: Gpu) -> None:
    """As long as they run, and nothing in memory that is for others."""
    layers, pages, x = Layers(monkeypatch), Pages(GPU), torch.randn(2, 8)
    expected, stream = layers.outputs(x), layers.stream(rounds=False, pages=pages)
    assert all(map(torch.equal, layers.outputs(x), expected))
    assert (host.asked, host.cached) == (TWO, TWO)
    assert (host.contexts, host.places) == ({1}, [GPU, GPU])  # a thread begins with the first GPU
    stream.close()
    assert len(layers.reads) == 5 and not pages.memory and not pages.read


@pytest.mark.parametrize("rounds", [False, True])
def test_it_is_said_once(monkeypatch: pytest.MonkeyPatch, host: Gpu, rounds: bool) -> None:
    """In a process, whatever runs into it, as every picture would; units that run once have two places in any case."""
    host.most, x = 0, torch.randn(2, 8)

    def run(each: bool) -> None:
        layers = Layers(monkeypatch)
        expected, stream = layers.outputs(x), layers.stream(each)
        assert all(map(torch.equal, layers.outputs(x), expected))
        stream.close()

    with pytest.warns(UserWarning, match=SLOW):
        run(rounds)
    run(not rounds)
    run(rounds)
    assert host.pageable == TWO * 3


def test_a_break_with_places_that_are_refilled(monkeypatch: pytest.MonkeyPatch, host: Gpu) -> None:
    """The layer that was on its way is not taken for the first."""
    layers, x = Layers(monkeypatch), torch.randn(2, 8)
    expected, host.most = layers.outputs(x), 2 * EACH
    stream = layers.stream(rounds=True)
    with pytest.warns(UserWarning, match=SLOW):
        layers.net[0](x)
    layers.net[1](x)
    assert all(map(torch.equal, layers.outputs(x), expected))
    stream.close()


# ---- a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("late", ["copies", "computing"])
@pytest.mark.parametrize("room", [True, False])
def test_queues_of_a_gpu_wait_for_each_other(monkeypatch: pytest.MonkeyPatch, late: str, room: bool) -> None:
    """Three rounds, one of the queues far behind the other: without a wait, weights are not there, or no longer."""
    device, layers, cycles = torch.device("cuda", torch.cuda.current_device()), Layers(monkeypatch), 50_000_000
    monkeypatch.setattr(devices, "available_bytes", lambda: None if room else 0)
    filled = Paged._filled

    def slow(carrier: Paged, unit: int, place: int) -> Tensor:
        memory = filled(carrier, unit, place)
        with torch.cuda.stream(carrier._copies):
            torch.cuda._sleep(cycles)
        return memory

    x = torch.randn(2, 8, device=device)
    expected = [torch.nn.functional.linear(x, weight.to(device)) for weight in layers.stored.values()]
    stream = layers.stream(rounds=True, device=device)
    if late == "copies":
        monkeypatch.setattr(Paged, "_filled", slow)
    else:  # after the stream's own hooks, before the layer
        for layer in layers.net:
            layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(cycles))
    for _ in range(3):
        assert all(map(torch.equal, layers.outputs(x), expected))
    stream.close()
