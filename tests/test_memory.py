"""Memory plans: every one draws the same picture, and takes what was predicted."""

import re
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from played_gpu import Gpu
from reference import relative_error
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from toys import toy_folder

from benchmarks.memory import TARGETS, Unread, full_size
from mmdit.config import SD35_MEDIUM
from mmdit.driver.pipeline import Pipeline
from mmdit.errors import SettingsError
from mmdit.memory import costs, devices, paged, streaming
from mmdit.memory.budget import budget_of
from mmdit.memory.empty import on_meta
from mmdit.memory.meter import FusedAttention, Meter, peak_bytes
from mmdit.memory.plan import Bytes, Job
from mmdit.memory.planner import Planner
from mmdit.memory.residency import LAYOUTS, Mode, Network, Residency
from mmdit.model import MMDiT
from mmdit.prepared import Prepared

META = torch.device("meta")
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
    """Once, from its beginning; the picture is the same."""
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
    assert len(calls) == 2 + 2 * SIZE["steps"]
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


def computed(full: dict[str, Network], job: Job, batch: int) -> dict[str, int]:
    """The peak of each computation, of the real code, without weights."""
    found, residency = {}, Residency(full)
    residency.arrange(dict.fromkeys(full, Mode.RESIDENT))
    with torch.no_grad(), FusedAttention():
        for name in ("clip_l", "clip_g", "t5"):
            tokens = torch.zeros(job.texts, job.t5_length if name == "t5" else 77, dtype=torch.long)
            with Meter() as meter:
                full[name].module(tokens)
            found[name] = meter.peak
        with Meter() as meter:
            context = torch.empty(job.texts, 77 + job.t5_length, 4096, dtype=torch.bfloat16, device=META)
            pooled = torch.empty(job.texts, 2048, dtype=torch.bfloat16, device=META)
            levels = torch.linspace(1, 0.1, job.steps).tolist()
            velocity = Prepared(full["transformer"].module, context, pooled, batch, levels)
            x = torch.empty(batch, 16, job.rows, job.columns, device=META)
            velocity(torch.cat([x] * job.texts).bfloat16(), torch.tensor(1.0)).float()
        found["transformer"] = meter.peak
    return found


@pytest.mark.parametrize(("side", "count", "texts", "steps"), [(64, 1, 2, 28), (180, 1, 2, 28), (32, 3, 1, 200)])
def test_computations_take_what_is_predicted(
    full: dict[str, Network], side: int, count: int, texts: int, steps: int
) -> None:
    """Within 10 %, each network at full size and weights left out; that of 200 levels' table too."""
    job = Job(side, side, count, steps, texts, 256)
    found, activations = computed(full, job, count), Planner(full, META, torch.bfloat16).costs.activations
    for name in ("clip_l", "clip_g", "t5"):
        assert activations.encoding(name, job) == pytest.approx(found[name], rel=0.1), name
    taken = activations.table("transformer", job, count) + activations.denoising("transformer", job, count)
    assert taken == pytest.approx(found["transformer"], rel=0.1)


def test_a_stage_takes_its_parts(full: dict[str, Network]) -> None:
    """In full size, everything coming and going, by arithmetic: T5's blocks are the largest of those that encode."""
    job, planner = Job(64, 64, 1, 28, 2, 256), Planner(full, META, torch.bfloat16)
    plan = planner.predict(RUNGS[-1], job, 1, 10**12)
    assert plan.peaks == {name: sum(stage) for name, stage in plan.stages.items()}
    encode, denoise = plan.stages["encode"], plan.stages["denoise"]
    assert encode.passing == 2 * 2 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
    assert denoise.passing == 2 * 2 * 28 * 1536**2
    assert (encode.staying, denoise.staying, plan.stages["loading"]) == (0, 0, Bytes())
    stay = planner.predict(RUNGS[0], job, 1, 10**12).stages
    assert stay["denoise"].working == denoise.working
    assert all((stage.coming, stage.passing) == (0, 0) for stage in stay.values())
    weights = [sum(map(n.source.nbytes, n.source.shapes)) for n in full.values()]
    tables = 2 * (49408 * (768 + 1280) + 32128 * 4096 + 384**2 * 1536)
    assert {stage.staying for stage in stay.values()} == {sum(weights) - tables}


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
        velocity = Prepared(model, context, pooled, batch, torch.linspace(1, 0.1, job.steps).tolist())
        for sigma in (1.0, 0.1):
            x = torch.empty(batch, 16, job.rows, job.columns, device=meta)
            velocity(torch.cat([x] * job.texts).bfloat16(), torch.tensor(sigma)).float()

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
@pytest.mark.parametrize("attention", ["auto", "math"])
def test_rough_plans_are_bounds_from_above(
    full: dict[str, Network], size: tuple[int, int], count: int, texts: int, attention: str
) -> None:
    """And are taken only where they fit."""
    planner, job = Planner(full, META, torch.bfloat16), Job(*size, count, 28, texts, 256, attention=attention)
    rough, exact = (planner.plan(job, 10**12, exact=exact) for exact in (False, True))
    assert rough.modes == exact.modes
    for stage, peak in exact.peaks.items():
        assert peak <= rough.peaks[stage] <= 2 * peak, stage
    between = (rough.peak + exact.peak) // 2
    assert planner.plan(job, between, exact=False).peaks != rough.peaks


def test_tables_of_scores_count(full: dict[str, Network]) -> None:
    """At 1024x1024, two at a time in float32, of 24 heads and two texts: 4096 tokens and 333 of text. Each way apart."""
    activations, job = Planner(full, META, torch.bfloat16).costs.activations, Job(128, 128, 1, 28, 2, 256)
    formula, tables = job._replace(attention="math"), 2 * 4 * 2 * 24 * (4096 + 333) ** 2
    for work in (activations.denoising, activations.denoising_bound):
        assert work("transformer", job, 1) < 0.1 * tables
        assert tables < work("transformer", formula, 1) < 1.2 * tables


def test_what_lies_on_a_cpu_whatever_the_plan(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights under adapters, once, and encoded texts that wait; on another device neither takes anything."""
    monkeypatch.setattr(costs, "taken_bytes", lambda _: 10**9)
    pipeline = Pipeline.load(folders["bf16"], dtype="bf16", device="cpu")
    networks, job, planner = pipeline.residency.networks, Job(8, 12, 1, 3, 2, 20), pipeline.planner
    before, beside = planner.predict(RUNGS[2], job, 1, 0).peaks, planner.costs.beside()
    networks["transformer"].put("joint_blocks.0.x_block.mlp.fc1.weight", torch.zeros(512, 128, dtype=torch.bfloat16))
    after = planner.predict(RUNGS[2], job, 1, 0).peaks
    assert after == {stage: peak + 2 * 512 * 128 for stage, peak in before.items()}
    assert planner.costs.beside() == beside - 2 * 512 * 128
    waits = planner.predict(RUNGS[2], job._replace(waiting=12345), 1, 0).peaks
    assert waits == {stage: peak + 12345 for stage, peak in after.items()}
    elsewhere = Planner(networks, META, torch.bfloat16)
    assert elsewhere.costs.adapted() == 0
    assert elsewhere.predict(RUNGS[2], job._replace(waiting=12345), 1, 0) == elsewhere.predict(RUNGS[2], job, 1, 0)


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


# ---- networks that are not there yet -------------------------------------------------------------


def test_two_networks_that_denoise_are_there_together(
    full: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a control net and the transformer will: their weights add up, and neither leaves for the other."""
    monkeypatch.setitem(LAYOUTS, "control", LAYOUTS["transformer"])
    half = on_meta(MMDiT, replace(SD35_MEDIUM, depth=12, dual_attention_blocks=(0,)), torch.bfloat16)
    source: Any = Unread(half)
    both = {**full, "control": Network("control", half, source, META)}
    job, two, one = Job(64, 64, 1, 28, 2, 256), Planner(both, META, torch.bfloat16), Planner(full, META, torch.bfloat16)
    alone = Planner({n: both[n] for n in both if n != "transformer"}, META, torch.bfloat16)
    for modes, others in zip(two.ladder(), one.ladder()):
        assert modes == {**others, "control": others["transformer"]}
        control = {name: mode for name, mode in modes.items() if name != "transformer"}
        parts = [p.predict(m, job, 1, 10**12).stages for p, m in ((one, others), (alone, control))]
        found = two.predict(modes, job, 1, 10**12).stages
        assert found["denoise"][2:] == tuple(map(sum, zip(*(part["denoise"][2:] for part in parts))))
        assert found["encode"][2:] == parts[0]["encode"][2:]
    residency = Residency(both)
    residency.arrange(two.ladder()[2])
    for name, there in (("t5", {"t5"}), ("transformer", {"transformer"}), ("control", {"transformer", "control"})):
        residency.use(name)
        assert {n for n, network in both.items() if network.here} == there
    residency.use("vae")
    assert {n for n, network in both.items() if network.here} == {"vae"}


# ---- a GPU ---------------------------------------------------------------------------------------


def test_strips_are_page_locked_where_the_host_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """For two maps of 256 channels at 1440x1440; blocks that wait page-locked come first, if all find room."""
    networks, device, job = full_size(torch.device("cuda")), torch.device("cuda"), Job(180, 180, 1, 28, 2, 256)
    planner, strips, blocks = Planner(networks, device, torch.bfloat16), 2 * 2**30, 24 * 2**27
    assert 2 * 256 * 1440**2 <= 2**30

    def locked(rung: int, free: int | None, strip: int | None = 60) -> int:
        monkeypatch.setattr(devices, "available_bytes", lambda: free)
        return planner.costs.locked(planner.ladder()[rung], 0, job, strip)

    assert (locked(2, None), locked(2, None, strip=None)) == (strips, 0)
    assert (locked(2, 2 * strips), locked(2, 2 * strips - 2)) == (strips, 0)
    assert (locked(3, 2 * (strips + blocks)), locked(3, 2 * (strips + blocks) - 2)) == (strips, 0)
    assert locked(3, 2 * blocks - 2) == strips  # blocks have no room, but strips have
    networks["transformer"].pages.memory[("there",)] = torch.empty(2**20, device="meta", dtype=torch.uint8)
    assert locked(2, 2 * strips - 2**20) == strips
    monkeypatch.setattr(devices, "available_bytes", lambda: None)
    plan = planner.plan(job, 1_400_000_000)
    assert plan.strip is not None and plan.locked == strips
    assert str(plan).endswith(f"in strips of {plan.strip} latent rows, 2.15 GB of the host page-locked")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kept", [0, 1])
def test_every_way_of_being_there_draws_the_same_on_a_gpu(folders: dict[str, Path], kept: int) -> None:
    """Bit for bit, twice over; by streams, which a model of this size would never get by itself."""
    pipeline = Pipeline.load(folders["bf16"], dtype="bf16", device="cuda")
    expected = drawn(pipeline)
    for modes in RUNGS:
        pipeline.plan_for = lambda _, m=modes: replace(pipeline.plan, modes=m, kept=kept)
        for _ in range(2):
            assert equal(drawn(pipeline), expected), modes
