"""Memory plans: every one draws the same picture, and takes what was predicted."""

import re
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import relative_error
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from toys import toy_folder

from benchmarks.memory import TARGETS, full_size
from mmdit.config import SD35_MEDIUM
from mmdit.driver.pipeline import Pipeline
from mmdit.errors import SettingsError
from mmdit.memory import streaming
from mmdit.memory.empty import on_meta
from mmdit.memory.meter import FusedAttention, Meter, peak_bytes
from mmdit.memory.plan import Job, Planner, budget_of
from mmdit.memory.residency import Mode, Network, Residency
from mmdit.memory.streaming import Paged
from mmdit.model import MMDiT
from mmdit.prepared import Prepared

PROMPT = "a horse and a bear on a green background!"
SIZE = {"width": 96, "height": 64, "steps": 3, "t5_length": 20}


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


@pytest.mark.parametrize(("stored", "dtype"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "bf16"), ("bf16", "fp32")])
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
    monkeypatch.setattr(streaming, "unlock", lambda: None)
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


class Queue:
    """Stands for a GPU's queues and events, whose order does not matter where all is done at once."""

    def __init__(self, *_: object) -> None: ...

    def record(self) -> None: ...

    synchronize = record

    def wait_event(self, _: object) -> None: ...


class Here:
    """Stands for torch with a GPU, in the host's memory."""

    cuda: Any = SimpleNamespace(
        Stream=Queue, Event=Queue, current_stream=lambda _: Queue(), stream=lambda _: nullcontext(), synchronize=Queue
    )
    _C: Any = SimpleNamespace(_host_emptyCache=Queue)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: int, pin_memory: bool = False, **more: Any) -> Tensor:  # noqa: ARG002
        return torch.empty(*size, **more)


@pytest.mark.parametrize("quantise", ["none", "fp8"])
def test_places_and_pages_of_a_gpu_hold_the_right_weights(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, quantise: str
) -> None:
    """The carrier of a GPU on the host's memory, also after a round that was broken off."""
    pipeline = Pipeline.load(folders["bf16"], dtype="bf16", device="cpu", quantise=quantise)
    expected = drawn(pipeline)
    monkeypatch.setattr(Network, "lies", lambda *_: False)  # nothing is used where it lies in the file
    monkeypatch.setattr(streaming, "torch", Here())
    monkeypatch.setattr(streaming, "carrier", Paged)
    plan = replace(pipeline.plan, modes=RUNGS[-1])
    pipeline.plan_for = lambda _: plan
    assert equal(drawn(pipeline), expected)
    hook = pipeline.transformer.joint_blocks[1].register_forward_pre_hook(lambda *_: pytest.fail("broken off"))
    with pytest.raises(pytest.fail.Exception):
        drawn(pipeline)
    hook.remove()
    assert equal(drawn(pipeline), expected)


# ---- predictions ---------------------------------------------------------------------------------


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
    networks = full_size(torch.device("meta"))
    yield networks
    for network in networks.values():
        network.leave()


def measured(
    full: dict[str, Network], modes: dict[str, Mode], job: Job, batch: int, kept: int = 0
) -> dict[str, int]:  # fmt: skip
    """The peak of each stage, of the real code."""
    meta, peaks = torch.device("meta"), {}
    residency, model = Residency(full), full["transformer"].module

    def encode() -> None:
        for name in ("clip_l", "clip_g", "t5"):
            full[name].module(torch.zeros(job.texts, job.t5_length if name == "t5" else 77, dtype=torch.long))

    def denoise() -> None:
        residency.use("transformer")
        context = torch.empty(job.texts, 77 + job.t5_length, 4096, dtype=torch.bfloat16, device=meta)
        pooled = torch.empty(job.texts, 2048, dtype=torch.bfloat16, device=meta)
        prepared = Prepared(model, context, pooled, torch.linspace(1, 0.1, job.steps).tolist())
        for sigma in (1.0, 0.1):
            x = torch.empty(batch, 16, job.rows, job.columns, device=meta)
            rows = [text for text in range(job.texts) for _ in range(batch)]
            prepared(torch.cat([x] * job.texts).bfloat16(), sigma, rows).float()

    for stage in (encode, denoise):
        with torch.no_grad(), FusedAttention(), Meter() as meter:
            residency.arrange(modes, kept)
            stage()
        peaks[stage.__name__] = meter.peak
        for network in full.values():
            network.leave()
    return peaks


@pytest.mark.parametrize("rung", range(4))
@pytest.mark.parametrize(
    ("width", "height", "count", "cfg"), [(512, 512, 1, 4.5), (1440, 1440, 1, 4.5), (512, 768, 3, 1)]
)
def test_predictions_are_what_is_measured(
    full: dict[str, Network], rung: int, width: int, height: int, count: int, cfg: float
) -> None:
    """Within 10 %, stage by stage, at full size."""
    job = Job(height // 8, width // 8, count, 28, 1 if cfg == 1 else 2, 256)
    planner = Planner(full, torch.device("meta"), torch.bfloat16)
    modes = RUNGS[rung]
    assert modes == planner.ladder()[rung]
    plan = planner.predict(modes, job, count, 10**12)
    found = measured(full, modes, job, count)
    for stage, peak in found.items():
        assert abs(plan.peaks[stage] / peak - 1) <= 0.1, (stage, plan.peaks[stage], peak)


def test_on_a_cpu_what_would_need_memory_comes_and_goes(folders: dict[str, Path]) -> None:
    """Weights that can be used where they lie in the file stay, others are converted when they are needed."""
    mapped = Pipeline.load(folders["bf16"], dtype="bf16", device="cpu").plan.modes
    converted = Pipeline.load(folders["fp16"], dtype="bf16", device="cpu").plan.modes
    assert {mapped[name] for name in ("clip_l", "clip_g", "t5")} == {Mode.RESIDENT}
    assert converted == RUNGS[2]


def test_what_is_to_be_reached(full: dict[str, Network]) -> None:
    """The whole model, T5 included, with guidance, in bfloat16: what stays while it denoises, and what streams."""
    planner = Planner(full, torch.device("meta"), torch.bfloat16)
    rungs = {"staged": planner.ladder()[2], "streamed": planner.ladder()[3]}
    for target in TARGETS:
        for way, most in (("staged", target.staged), ("streamed", target.streamed)):
            job = Job(target.height // 8, target.width // 8, 1, 28, 2, 256)
            assert planner.predict(rungs[way], job, 1, int(most)).peak <= most, (target, way)


@pytest.mark.parametrize("size", [(16, 16), (64, 96), (180, 180)])
@pytest.mark.parametrize(("count", "texts"), [(1, 2), (7, 1)])
def test_rough_plans_are_bounds_from_above(
    full: dict[str, Network], size: tuple[int, int], count: int, texts: int
) -> None:
    """And are taken only where they fit."""
    planner, job = Planner(full, torch.device("meta"), torch.bfloat16), Job(*size, count, 28, texts, 256)
    rough, exact = (planner.plan(job, 10**12, exact=exact) for exact in (False, True))
    assert rough.modes == exact.modes
    for stage, peak in exact.peaks.items():
        assert peak <= rough.peaks[stage] <= 2 * peak, stage
    between = (rough.peak + exact.peak) // 2
    assert planner.plan(job, between, exact=False).peaks != rough.peaks


def test_a_larger_budget_gives_a_faster_plan(full: dict[str, Network]) -> None:
    """Which keeps to it; and one that is too small is told what would do."""
    planner, job = Planner(full, torch.device("meta"), torch.bfloat16), Job(128, 128, 4, 28, 2, 256)
    budgets = [int(gb * 1e9) for gb in (2, 4, 8, 40)]
    plans = [planner.plan(job, budget) for budget in budgets]
    assert all(plan.peak <= budget for plan, budget in zip(plans, budgets))
    assert [plan.modes for plan in plans] == planner.ladder()[::-1]
    assert [plan.batch for plan in plans][-1] == 4
    words = "memory: 500 MB do not suffice for 1024x1024: the smallest plan takes 830 MB, to encode"
    with pytest.raises(SettingsError, match=f"^{re.escape(words)}$"):
        planner.plan(job, 500_000_000)


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GB", 4 * 10**9), ("1.5GiB", 3 * 2**29), ("900 mb", 9 * 10**8), ("512M", 512 * 10**6), (".5T", 5 * 10**11)],
)
def test_budgets(text: str, count: int) -> None:
    assert budget_of(text, torch.device("cpu")) == count


@pytest.mark.parametrize("text", ["", "4", "GB", "-4GB", "4 apples", "1e3MB", "nanGB"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^memory is .*: expected a size such as 4GB or 900MB, or auto$"):
        budget_of(text, torch.device("cpu"))


def test_auto_is_less_than_is_free() -> None:
    """On Linux, of what the system says is available."""
    available = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    assert 0 < budget_of("auto", torch.device("cpu")) < 1024 * int(available[0].split()[1]) + 10**9


def test_the_meter_counts_what_lives() -> None:
    """By arithmetic: two tensors at a time of three; views and inputs take nothing."""
    given = torch.empty(1000, device="meta")

    def compute() -> None:
        a = torch.empty(100, device="meta") + 1  # the first of the two goes
        b = a.view(10, 10).t()
        del a
        c = given[:100] * 2
        del b
        assert c.shape == (100,)

    assert peak_bytes(compute) == 800


def test_the_meter_agrees_with_torchs_own_tracker() -> None:
    """On a transformer's forward pass, weights left out."""
    model = on_meta(MMDiT, replace(SD35_MEDIUM, depth=3, dual_attention_blocks=(1,)), torch.bfloat16)
    shapes = ((2, 16, 64, 48), (2,), (2, 333, 4096), (2, 2048))
    given = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with torch.no_grad(), FusedAttention(), MemTracker() as tracker:
        tracker.track_external(model.requires_grad_(True), *given)  # it hooks on gradients
        start = tracker.get_tracker_snapshot("current")[torch.device("meta")]["Total"]
        model(*given)
        found = tracker.get_tracker_snapshot("peak")[torch.device("meta")]["Total"] - start
    assert abs(peak_bytes(model, *given) / found - 1) <= 0.01
