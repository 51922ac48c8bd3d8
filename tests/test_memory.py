"""Memory plans: every one draws the same picture, and takes what was predicted."""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from played_gpu import Gpu
from reference import relative_error
from sweeps import sampled
from torch import Tensor
from toys import toy_folder

from benchmarks import memory
from mmdit.config import MMDiTConfig
from mmdit.driver.pipeline import Pipeline
from mmdit.memory import paged, streaming
from mmdit.memory.activations import Activations
from mmdit.memory.plan import Job
from mmdit.memory.planner import Planner
from mmdit.memory.residency import Mode, Network, Residency

META = torch.device("meta")
PROMPT = "a horse and a bear on a green background!"
SIZE = {"width": 48, "height": 32, "steps": 3, "t5_length": 20}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy in every dtype."""
    root = tmp_path_factory.mktemp("memory")
    return {dtype: toy_folder(root, dtype, dtype=dtype) for dtype in ("fp32", "bf16", "fp16")}


RUNGS = [
    dict.fromkeys(("clip_l", "clip_g", "t5", "transformer", "vae"), Mode.RESIDENT),
    dict.fromkeys(("clip_l", "clip_g", "t5"), Mode.STREAMED) | dict.fromkeys(("transformer", "vae"), Mode.RESIDENT),
    dict.fromkeys(("clip_l", "clip_g", "t5"), Mode.STREAMED) | dict.fromkeys(("transformer", "vae"), Mode.STAGED),
    dict.fromkeys(("clip_l", "clip_g", "t5", "transformer"), Mode.STREAMED) | {"vae": Mode.STAGED},
]


def drawn(pipeline: Pipeline, **keywords: Any) -> dict[str, Tensor]:
    trace: dict[str, Tensor] = {}
    pipeline.run(replace(pipeline.settings, **{"prompt": PROMPT, "negative": "a pig", **SIZE, **keywords}), trace)
    return trace


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- the same picture ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "dtype"), sampled([("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "bf16"), ("bf16", "fp32")], 2)
)
def test_every_way_of_being_there_draws_the_same(folders: dict[str, Path], stored: str, dtype: str) -> None:
    """All tensors of a run, bit for bit; twice over, so that what came and went comes again."""
    pipeline = Pipeline.load(folders[stored], dtype=dtype, device="cpu")
    expected = drawn(pipeline)
    for modes in RUNGS:
        pipeline.plan_for = lambda _, m=modes: replace(pipeline.plan, modes=m)
        for _ in range(2):
            assert equal(drawn(pipeline), expected), modes
            for name, network in pipeline.residency.networks.items():
                here = modes[name] is Mode.RESIDENT
                assert all(t.is_meta != here for t in network.module.state_dict().values()), name


def test_batches_and_strips_draw_the_same_within_rounding(folders: dict[str, Path]) -> None:
    pipeline = Pipeline.load(folders["fp32"], dtype="fp32", device="cpu")
    expected = drawn(pipeline, count=5)
    plan = replace(pipeline.plan, batch=2, strip=3)
    pipeline.plan_for = lambda _: plan
    found = drawn(pipeline, count=5)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        error = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-9)
        assert error <= (2e-3 if name == "image" else 1e-5), name


@torch.no_grad()
def test_a_broken_off_round_does_not_harm_the_next(folders: dict[str, Path]) -> None:
    """The next block's weights, on their way when the first breaks off, are not taken for the first's."""
    pipeline = Pipeline.load(folders["bf16"], dtype="bf16", device="cpu")
    plan = replace(pipeline.plan, modes=RUNGS[-1])
    pipeline.follow(plan, Job(8, 12, 1, 3, 2, 20))
    velocity = pipeline.velocity(pipeline.encode([PROMPT], 20))
    x, sigma = pipeline.noise(96, 64, [0]), torch.tensor(0.7)
    expected = velocity(x, sigma)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = pipeline.transformer.joint_blocks[0].x_block.norm1.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        velocity(x, sigma)
    hook.remove()
    assert torch.equal(velocity(x, sigma), expected)


def test_adapters_are_in_every_plan(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    tensors = {
        "transformer.transformer_blocks.0.ff.net.2.lora_A.weight": torch.randn(3, 512, generator=draw),
        "transformer.transformer_blocks.0.ff.net.2.lora_B.weight": torch.randn(128, 3, generator=draw),
        "transformer.transformer_blocks.0.norm1.linear.lora_A.weight": torch.randn(2, 128, generator=draw),
        "transformer.transformer_blocks.0.norm1.linear.lora_B.weight": torch.randn(1152, 2, generator=draw),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    pipeline = Pipeline.load(folders["bf16"], dtype="bf16", device="cpu")
    plain = drawn(pipeline)
    name = pipeline.adapters.add(tmp_path / "a.safetensors", 0.1).name
    expected = drawn(pipeline)
    assert not equal(plain, expected)
    plan = replace(pipeline.plan, modes=RUNGS[-1])
    pipeline.plan_for = lambda _: plan
    assert equal(drawn(pipeline), expected)
    pipeline.adapters.remove(name)
    assert equal(drawn(pipeline), plain)
    pipeline.adapters.add(tmp_path / "a.safetensors", 0.1)
    assert equal(drawn(pipeline), expected)


def test_a_stage_is_tried_again_by_the_next_smaller_plan(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, from the step that failed; the picture is the same."""
    pipeline = Pipeline.load(folders["fp32"], dtype="fp32", device="cpu")
    expected = drawn(pipeline, count=4)
    flow, calls, held = pipeline.transformer.flow, [], []

    def scarce(*args: Any) -> Tensor:
        calls.append(pipeline.plan)
        if len(calls) == 2:
            large = torch.empty(1000)
            held.extend(weakref.ref(t) for t in (large, args[0]))
            raise torch.OutOfMemoryError
        assert all(tensor() is None for tensor in held), "memory of the first attempt"
        return flow(*args)

    monkeypatch.setattr(pipeline.transformer, "flow", scarce)
    monkeypatch.setattr(paged, "unlock", lambda _: None)
    pages = pipeline.residency.networks["transformer"].pages
    pages.memory[("left",)] = torch.empty(1)
    with pytest.warns(UserWarning, match=r"^denoise: memory ran out; trying again with less: "):
        found = drawn(pipeline, count=4)
    assert not pages.memory  # it may have been the host's memory that ran out
    assert int((found["image"].int() - expected["image"].int()).abs().max()) <= 1
    assert relative_error(found["latents.2"], expected["latents.2"]) <= 1e-5
    assert (calls[0].batch, calls[-1].batch) == (4, 2)
    assert len(calls) == 2 + 2 * (SIZE["steps"] - 1)
    assert calls[-1].peaks["denoise"] < calls[0].peaks["denoise"]


def test_a_transformer_is_called_directly_with_its_table_elsewhere(full: dict[str, Network]) -> None:
    """The table of positions stays on the host, whatever device the rest is on."""
    shapes = ((2, 16, 64, 48), (2,), (2, 333, 4096), (2, 2048))
    given = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    Residency(full)
    assert full["transformer"].module(*given).shape == (2, 16, 64, 48)


@pytest.mark.parametrize("quantise", ["none", "fp8"])
def test_places_and_pages_of_a_gpu_hold_the_right_weights(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, quantise: str
) -> None:
    """The carrier of a GPU on the host's memory, also after a round that was broken off."""
    pipeline = Pipeline.load(folders["bf16"], dtype="bf16", device="cpu", quantise=quantise)
    expected = drawn(pipeline)
    monkeypatch.setattr(Network, "lies", lambda *_: False)  # nothing is used where it lies in the file
    gpu = Gpu()
    gpu.play(monkeypatch)
    plan = replace(pipeline.plan, modes=RUNGS[-1])
    pipeline.plan_for = lambda _: plan
    assert equal(drawn(pipeline), expected)
    hook = pipeline.transformer.joint_blocks[1].register_forward_pre_hook(lambda *_: pytest.fail("broken off"))
    with pytest.raises(pytest.fail.Exception):
        drawn(pipeline)
    hook.remove()
    assert equal(drawn(pipeline), expected)
    assert len(gpu.places) > 0 and not gpu.harm


# ---- full size ------------------------------------------------------------------------------------


class AtOnce:
    """An executor without threads, which trackers of memory do not see into."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work())
        return future

    def shutdown(self) -> None: ...


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Network]]:
    """SD3.5-Medium in full size on a device apart from the CPU."""
    monkeypatch.setattr(streaming, "ThreadPoolExecutor", AtOnce)
    networks = built(memory.CONFIGS["transformer"])
    yield networks
    for network in networks.values():
        network.leave()
        network.mode, network.kept = Mode.RESIDENT, 0
        network.pages.drop()
        for module in network.module.modules():  # hooks of a `Residency`
            module._forward_pre_hooks.clear()


@pytest.fixture
def planner(full: dict[str, Network]) -> Planner:
    """A new one; what the networks take is measured once for all tests."""
    planner = Planner(full, META, torch.bfloat16)
    planner.costs.activations = activations(memory.CONFIGS["transformer"])
    return planner


@cache
def built(transformer: MMDiTConfig) -> dict[str, Network]:
    """Thousands of tensors without values, with this transformer; made once."""
    assert transformer is memory.CONFIGS["transformer"]
    return memory.full_size(META)


@cache
def activations(transformer: MMDiTConfig) -> Activations:
    return Activations(built(transformer), META, torch.bfloat16)


# ---- a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [0, 1])
def test_every_way_of_being_there_draws_the_same_on_a_gpu(folders: dict[str, Path], kept: int) -> None:
    """Bit for bit, twice over; by streams, which a model of this size would never get by itself."""
    pipeline = Pipeline.load(folders["bf16"], dtype="bf16", device="cuda")
    expected = drawn(pipeline)
    for modes in RUNGS:
        pipeline.plan_for = lambda _, m=modes: replace(pipeline.plan, modes=m, kept=kept)
        for _ in range(2):
            assert equal(drawn(pipeline), expected), modes
