"""Plans: what each stage is predicted to take is what it takes, and the fastest that keeps to a budget is chosen."""

# ruff: noqa: F811  fixtures are imported

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import sampled
from test_memory import META, RUNGS, folders, full, planner  # noqa: F401
from torch.distributed._tools.mem_tracker import MemTracker
from toys import toy_folder

from benchmarks.memory import TARGETS, Unread, full_size
from mmdit.common.errors import SettingsError
from mmdit.config import SD35_MEDIUM
from mmdit.driver.pipeline import Pipeline
from mmdit.memory import costs, devices
from mmdit.memory.empty import on_meta
from mmdit.memory.meter import FusedAttention, Meter, peak_bytes
from mmdit.memory.plan import Bytes, Job
from mmdit.memory.planner import Planner
from mmdit.memory.residency import ROLES, Mode, Network, Residency
from mmdit.model import MMDiT
from mmdit.prepared import Prepared

# ---- predictions ---------------------------------------------------------------------------------


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
            prepared = Prepared(full["transformer"].module, context, pooled, levels)
            x = torch.empty(batch, 16, job.rows, job.columns, device=META)
            rows = [text for text in range(job.texts) for _ in range(batch)]
            prepared(torch.cat([x] * job.texts).bfloat16(), 1.0, rows).float()
        found["transformer"] = meter.peak
    return found


@pytest.mark.parametrize(
    ("side", "count", "texts", "steps"), sampled([(32, 3, 1, 200), (64, 1, 2, 28), (180, 1, 2, 28)], 3)
)
def test_computations_take_what_is_predicted(
    full: dict[str, Network], planner: Planner, side: int, count: int, texts: int, steps: int
) -> None:
    """Within 10 %, each network at full size and weights left out; that of 200 levels' table too."""
    job = Job(side, side, count, steps, texts, 256)
    found, activations = computed(full, job, count), planner.costs.activations
    for name in ("clip_l", "clip_g", "t5"):
        assert activations.encoding(name, job) == pytest.approx(found[name], rel=0.1), name
    taken = activations.table("transformer", job, count) + activations.denoising("transformer", job, count)
    assert taken == pytest.approx(found["transformer"], rel=0.1)


def test_a_stage_takes_its_parts(full: dict[str, Network], planner: Planner) -> None:
    """In full size, everything coming and going, by arithmetic: T5's blocks are the largest of those that encode."""
    job = Job(64, 64, 1, 28, 2, 256)
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
    full: dict[str, Network], modes: dict[str, Mode], job: Job, batch: int, kept: int = 0,
    stages: Sequence[str] = ("encode", "denoise"),
) -> dict[str, int]:  # fmt: skip
    """The peak of each stage, of the real code."""
    peaks = {}
    residency, model = Residency(full), full["transformer"].module

    def encode() -> None:
        for name in ("clip_l", "clip_g", "t5"):
            full[name].module(torch.zeros(job.texts, job.t5_length if name == "t5" else 77, dtype=torch.long))

    def denoise() -> None:
        residency.use("transformer")
        context = torch.empty(job.texts, 77 + job.t5_length, 4096, dtype=torch.bfloat16, device=META)
        pooled = torch.empty(job.texts, 2048, dtype=torch.bfloat16, device=META)
        prepared = Prepared(model, context, pooled, torch.linspace(1, 0.1, job.steps).tolist())
        for sigma in (1.0, 0.1):
            x = torch.empty(batch, 16, job.rows, job.columns, device=META)
            rows = [text for text in range(job.texts) for _ in range(batch)]
            prepared(torch.cat([x] * job.texts).bfloat16(), sigma, rows).float()

    for stage in stages:
        with torch.no_grad(), FusedAttention(), Meter() as meter:
            residency.arrange(modes, kept)
            {"encode": encode, "denoise": denoise}[stage]()
        peaks[stage] = meter.peak
        for network in full.values():
            network.leave()
    return peaks


MANY = pytest.mark.sweep


@pytest.mark.parametrize(
    ("width", "height", "count", "cfg", "rung"),
    [
        *(pytest.param(512, 512, 1, 4.5, rung, marks=[] if rung > 1 else MANY) for rung in range(4)),
        *(pytest.param(512, 768, 3, 1, rung, marks=[] if rung == 3 else MANY) for rung in range(4)),
        *(pytest.param(1440, 1440, 1, 4.5, rung, marks=MANY) for rung in range(4)),
    ],
)
def test_predictions_are_what_is_measured(
    full: dict[str, Network], planner: Planner, width: int, height: int, count: int, cfg: float, rung: int
) -> None:
    """Within 10 %, stage by stage, at full size."""
    job = Job(height // 8, width // 8, count, 28, 1 if cfg == 1 else 2, 256)
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


def test_a_real_run_on_a_cpu_takes_what_is_predicted(tmp_path: Path) -> None:
    """In a process of its own, every stage: no more, and hardly less than without what libraries may take.

    The C library returns what is freed at once, so that a run takes what the one before took.
    """
    folder = toy_folder(tmp_path, dtype="fp32")
    run = [sys.executable, str(Path(__file__).with_name("drawn_alone.py")), str(folder)]
    given = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=given)
    for stage, (took, parts) in json.loads(done.stdout).items():
        assert 0.9 * (sum(parts) - 120_000_000) <= took <= sum(parts), (stage, took, parts)
    assert {stage: sum(parts[1:]) > 100e6 for stage, (_, parts) in json.loads(done.stdout).items()} == {
        "encode": False, "denoise": True, "init": True, "decode": True,
    }  # fmt: skip


def test_what_is_to_be_reached(planner: Planner) -> None:
    """The whole model, T5 included, with guidance, in bfloat16: what stays while it denoises, and what streams."""
    rungs = {"staged": planner.ladder()[2], "streamed": planner.ladder()[3]}
    for target in TARGETS:
        for way, most in (("staged", target.staged), ("streamed", target.streamed)):
            job = Job(target.height // 8, target.width // 8, 1, 28, 2, 256)
            assert planner.predict(rungs[way], job, 1, int(most)).peak <= most, (target, way)


@pytest.mark.parametrize("size", [(16, 24), pytest.param((64, 96), marks=MANY), (180, 180)])
@pytest.mark.parametrize(("count", "texts"), [(1, 2), (7, 1)])
@pytest.mark.parametrize("attention", sampled(["math", "auto"], 2))
def test_rough_plans_are_bounds_from_above(
    planner: Planner, size: tuple[int, int], count: int, texts: int, attention: str
) -> None:
    """And are taken only where they fit."""
    job = Job(*size, count, 28, texts, 256, attention=attention)
    rough, exact = (planner.plan(job, 10**12, exact=exact) for exact in (False, True))
    assert rough.modes == exact.modes
    for stage, peak in exact.peaks.items():
        assert peak <= rough.peaks[stage] <= 2 * peak, stage
    between = (rough.peak + exact.peak) // 2
    assert planner.plan(job, between, exact=False).peaks != rough.peaks


def test_tables_of_scores_count(planner: Planner) -> None:
    """At 1024x1024, two at a time in float32, of 24 heads and two texts: 4096 tokens and 333 of text."""
    activations, job = planner.costs.activations, Job(128, 128, 1, 28, 2, 256)
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


def test_a_larger_budget_gives_a_faster_plan(planner: Planner) -> None:
    """Which keeps to it; and one that is too small is told what would do."""
    job = Job(128, 128, 4, 28, 2, 256)
    budgets = [int(gb * 1e9) for gb in (2, 4, 8, 40)]
    plans = [planner.plan(job, budget) for budget in budgets]
    assert all(plan.peak <= budget for plan, budget in zip(plans, budgets))
    assert [plan.modes for plan in plans] == planner.ladder()[::-1]
    assert [plan.batch for plan in plans][-1] == 4
    words = "memory: 500 MB do not suffice for 1024x1024: the smallest plan takes 830 MB, to encode"
    with pytest.raises(SettingsError, match=f"^{re.escape(words)}$"):
        planner.plan(job, 500_000_000)


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
        start = tracker.get_tracker_snapshot("current")[META]["Total"]
        model(*given)
        found = tracker.get_tracker_snapshot("peak")[META]["Total"] - start
    assert abs(peak_bytes(model, *given) / found - 1) <= 0.01


# ---- networks that are not there yet -------------------------------------------------------------


def test_two_networks_that_denoise_are_there_together(
    full: dict[str, Network], planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a control net and the transformer will: their weights add up, and neither leaves for the other."""
    monkeypatch.setitem(ROLES, "control", ROLES["transformer"])
    half = on_meta(MMDiT, replace(SD35_MEDIUM, depth=12, dual_attention_blocks=(0,)), torch.bfloat16)
    source: Any = Unread(half)
    both = {**full, "control": Network("control", half, source, META)}
    job, two, one = Job(64, 64, 1, 28, 2, 256), Planner(both, META, torch.bfloat16), planner
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
