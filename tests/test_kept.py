"""Blocks that stay while others come and go: which, how many, what they take, and the same picture."""

# ruff: noqa: F811  fixtures are imported

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from played_gpu import Gpu
from sweeps import sampled
from test_memory import RUNGS, drawn, equal, full, planner  # noqa: F401
from test_plans import measured
from torch import Tensor
from toys import toy_folder

from benchmarks import memory, random_checkpoint
from mmdit.config import SD35_MEDIUM, TOY
from mmdit.driver.pipeline import Pipeline
from mmdit.memory import devices
from mmdit.memory.plan import Job
from mmdit.memory.planner import Planner
from mmdit.memory.residency import Mode, Network, spread
from mmdit.memory.streaming import Unit
from weights import Source

JOB = Job(8, 12, 1, 3, 2, 20)
DEPTH = 7  # of the toy here: blocks 0 to 2 with a second attention, block 6 without an output for the texts
STREAMED = RUNGS[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of seven blocks, in float16."""
    with pytest.MonkeyPatch.context() as patch:
        toy = replace(TOY, depth=DEPTH, dual_attention_blocks=(0, 1, 2))
        patch.setitem(random_checkpoint.MODELS, "toy", toy)
        return toy_folder(tmp_path_factory.mktemp("kept"), dtype="fp16")


def streamed(pipeline: Pipeline, kept: int) -> None:
    """Everything comes block by block from now on, but for so many blocks of the transformer."""
    plan = replace(pipeline.plan, modes=STREAMED, kept=kept)
    pipeline.plan_for = lambda _: plan  # type: ignore[method-assign]


# ---- which ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "going"),
    [
        (0, [0, 1, 2, 3, 4, 5, 6]),
        (1, [0, 1, 2, 3, 4, 5]),
        (2, [0, 1, 2, 4, 5]),
        (3, [0, 1, 3, 5]),
        (4, [0, 2, 4]),
        (5, [0, 3]),
        (6, [0]),
        (7, []),
    ],
)
def test_those_kept_lie_evenly_among_the_others(kept: int, going: list[int]) -> None:
    """Written out for seven: from one that comes to the next, round and round, it is equally far, or one further."""
    blocks: list[Any] = list(range(7))
    assert spread(blocks, kept) == going
    ways = [(b - a - 1) % 7 for a, b in zip(going, [*going[1:], *going[:1]])]
    assert max(ways, default=0) - min(ways, default=0) <= 1


# ---- the same picture ----------------------------------------------------------------------------


@pytest.mark.parametrize("load", sampled([{"dtype": "fp32"}, {}, {"dtype": "bf16"}, {"quantise": "int8"}], 3))
def test_any_number_kept_draws_the_same(folder: Path, load: dict[str, str]) -> None:
    """All tensors of a run, bit for bit, as with everything there; one number after the other."""
    pipeline = Pipeline.load(folder, device="cpu", **{"dtype": "fp16", **load})
    pipeline.plan_for = lambda _: replace(pipeline.plan, modes=RUNGS[0])  # type: ignore[method-assign]
    expected = drawn(pipeline)
    for kept in (3, 0, 6, 1, 5):
        streamed(pipeline, kept)
        assert equal(drawn(pipeline), expected), kept
        assert all(t.is_meta for t in pipeline.transformer.state_dict().values())


def there(pipeline: Pipeline) -> list[int]:
    """The blocks whose matrices are on the device."""
    blocks = pipeline.residency.networks["transformer"].blocks
    return [i for i, unit in enumerate(blocks) if not unit.module.get_parameter("x_block.attn.qkv.weight").is_meta]


@torch.no_grad()
def test_another_number_while_they_are_there(folder: Path) -> None:
    """Those kept are there before, between and after evaluations, and all leave."""
    pipeline = Pipeline.load(folder, dtype="bf16", device="cpu")
    cond, x = pipeline.encode(["a horse"], 20), pipeline.noise(96, 64, [0])
    expected = pipeline.velocity(cond)(x, torch.tensor(0.7))
    for kept, stay in ((2, [3, 6]), (5, [1, 2, 4, 5, 6]), (0, []), (3, [2, 4, 6])):
        pipeline.follow(replace(pipeline.plan, modes=STREAMED, kept=kept), JOB)
        velocity = pipeline.velocity(cond)
        for _ in range(2):
            assert there(pipeline) == stay
            assert torch.equal(velocity(x, torch.tensor(0.7)), expected)
        assert there(pipeline) == stay
    pipeline.residency.use(None)
    assert there(pipeline) == []
    pipeline.follow(replace(pipeline.plan, modes=RUNGS[0], kept=3), JOB)
    assert there(pipeline) == list(range(DEPTH))
    stayed = pipeline.transformer.x_embedder.proj.weight
    pipeline.follow(replace(pipeline.plan, modes=RUNGS[0], kept=0), JOB)
    assert pipeline.transformer.x_embedder.proj.weight is stayed  # which a number kept of nothing does not fetch anew


@torch.no_grad()
def test_after_a_round_that_was_broken_off(folder: Path) -> None:
    """In a block that stays, and in one that comes: what was on its way is not taken for another block's."""
    pipeline = Pipeline.load(folder, dtype="bf16", device="cpu")
    pipeline.follow(replace(pipeline.plan, modes=STREAMED, kept=3), JOB)
    velocity, x = pipeline.velocity(pipeline.encode(["a horse"], 20)), pipeline.noise(96, 64, [0])
    expected = velocity(x, torch.tensor(0.7))
    for block in (2, 3):
        hook = pipeline.transformer.joint_blocks[block].register_forward_pre_hook(lambda *_: pytest.fail("broken off"))
        with pytest.raises(pytest.fail.Exception):
            velocity(x, torch.tensor(0.7))
        hook.remove()
        assert torch.equal(velocity(x, torch.tensor(0.7)), expected)


@pytest.mark.parametrize("kept", [0, 3])
def test_what_is_kept_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """The others at every step; on a CPU what is used where it lies in the file is bound once, and not kept or sent."""
    counts: Counter[str] = Counter()
    read = Source.__call__

    def count(self: Source, name: str) -> Tensor:
        counts[name] += 1
        return read(self, name)

    pipeline = Pipeline.load(folder, dtype="bf16", device="cpu")
    streamed(pipeline, kept)
    monkeypatch.setattr(Source, "__call__", count)
    drawn(pipeline)
    going = [0, 1, 3, 5] if kept else range(DEPTH)
    # The first of the next round is on its way when the last step ends.
    reads = {i: (4 if i == 0 else 3) if i in going else 1 for i in range(DEPTH)}
    assert {i: counts[f"joint_blocks.{i}.x_block.attn.qkv.weight"] for i in range(DEPTH)} == reads
    network = pipeline.residency.networks["transformer"]
    monkeypatch.setattr(network.source, "is_mapped", lambda _: True)
    assert network.apart(Mode.STREAMED, kept) == network.before


# ---- what they take ------------------------------------------------------------------------------


WIDTH, DUAL = 1536, SD35_MEDIUM.dual_attention_blocks
SECOND, BLOCK, LAST = 2 * 28 * WIDTH**2, 2 * 24 * WIDTH**2, 2 * 15 * WIDTH**2
"""Bytes of the matrices of a block in bfloat16, adaLN left out: for each of pictures and texts projections of 3 + 1
and MLPs of 4 + 4 squares; with a second attention 3 + 1 more, for the texts of the last block only the first 3."""


def sizes(depth: int, second: tuple[int, ...]) -> list[int]:
    return [SECOND if i in second else BLOCK for i in range(depth - 1)] + [LAST]


@pytest.mark.parametrize(
    ("depth", "second", "kept"),
    [
        *(pytest.param(24, DUAL, kept, marks=pytest.mark.sweep) for kept in (1, 23)),
        (24, DUAL, 11),
        *(pytest.param(7, (0, 1, 2), kept, marks=[] if kept == 3 else pytest.mark.sweep) for kept in (1, 3, 6)),
        *sampled([(7, (3,), 2), (5, (), 2), (1, (), 0)], 3),  # the first is kept: the places are smaller then
    ],
)
@pytest.mark.parametrize(
    ("width", "height", "count", "cfg"), [(512, 512, 1, 4.5), pytest.param(512, 768, 3, 1, marks=pytest.mark.sweep)]
)
def test_predictions_are_what_is_measured(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, depth: int, second: tuple[int, ...], kept: int,
    width: int, height: int, count: int, cfg: float,
) -> None:  # fmt: skip
    """Within 10 %, at full size and other depths, and more than with none kept by just what lies there."""
    config = replace(SD35_MEDIUM, depth=depth, dual_attention_blocks=second)
    monkeypatch.setitem(memory.CONFIGS, "transformer", config)
    full: dict[str, Network] = request.getfixturevalue("full")
    job = Job(height // 8, width // 8, count, 28, 1 if cfg == 1 else 2, 256)
    planner: Planner = request.getfixturevalue("planner")
    plan = planner.predict(STREAMED, job, count, 10**12, kept=kept)
    peak = measured(full, STREAMED, job, count, kept, stages=("denoise",))["denoise"]
    assert abs(plan.peaks["denoise"] / peak - 1) <= 0.1, (plan.peaks["denoise"], peak)
    bare, each = planner.predict(STREAMED, job, count, 10**12), sizes(depth, second)
    going = [i for i in range(depth) if i * kept // depth == (i + 1) * kept // depth]
    places = 2 * max(each[i] for i in going) - 2 * max(each)
    lies = sum(size for i, size in enumerate(each) if i not in going)
    assert plan.peaks == {**bare.peaks, "denoise": bare.peaks["denoise"] + lies + places}


def test_two_places_and_what_stays_by_hand(planner: Planner) -> None:
    """Eleven of 24 kept are six with a second attention, four without, and the last."""
    job = Job(64, 64, 1, 28, 2, 256)
    none, some, staged = (
        planner.predict(modes, job, 1, 10**12, kept=kept).peaks["denoise"]
        for modes, kept in ((STREAMED, 0), (STREAMED, 11), (RUNGS[2], 0))
    )
    assert some - none == 5 * SECOND + 5 * BLOCK + LAST
    assert staged - none == 13 * SECOND + 10 * BLOCK + LAST - 2 * SECOND


# ---- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gb", [0.9, 1.3, 2.0, 2.5, 3.0])
def test_as_many_are_kept_as_fit(planner: Planner, gb: float) -> None:
    """One more would not; encoding and decoding are those of the plan that keeps none."""
    job, budget = Job(64, 64, 1, 28, 2, 256), int(gb * 1e9)
    plan = planner.plan(job, budget)
    assert plan.modes == STREAMED and 0 < plan.kept < 24 and plan.blocks == 24
    assert plan.peak <= budget
    one, none = (planner.predict(STREAMED, job, 1, budget, kept=kept) for kept in (plan.kept + 1, 0))
    assert one.peaks["denoise"] > budget
    assert none == replace(plan, kept=0, stages={**plan.stages, "denoise": none.stages["denoise"]})
    assert f"transformer comes block by block, {plan.kept} of 24 blocks stay; " in str(plan)


def test_fewer_blocks_that_come_are_worth_more_than_large_batches(planner: Planner) -> None:
    """Four pictures of 1440x1440: as many at a time as fit, until fewer at a time bring fewer blocks in all."""
    job, found = Job(180, 180, 4, 28, 2, 256), []
    for gb in (1.5, 2.0, 3.3, 3.42, 3.65):
        budget = int(gb * 1e9)
        plan = planner.plan(job, budget)
        every = [planner.keeping(STREAMED, job, batch, budget, budget) for batch in (4, 2, 1)]
        fit = [other for other in every if other.peak <= budget]
        come = [(24 - other.kept) * (4 // other.batch) for other in fit]
        assert plan == fit[come.index(min(come))]
        found.append((plan.batch, plan.batch == fit[0].batch))
    assert found == [(1, True), (2, True), (4, True), (2, False), (1, False)]


def test_less_is_fewer_kept(planner: Planner) -> None:
    """From a transformer that is there while it denoises down to two blocks at a time, by a quarter each time."""
    job = Job(128, 128, 1, 28, 2, 256)
    plan, kept = planner.plan(job, int(3.5e9)), []
    assert plan.modes == RUNGS[2]
    while (less := planner.smaller(job, plan, "denoise")) is not None:
        assert less.modes == STREAMED
        assert less.peaks["denoise"] <= 0.75 * plan.peaks["denoise"] or less.kept == 0
        kept.append(less.kept)
        plan = less
    assert len(kept) > 3
    assert kept == sorted(set(kept), reverse=True) and kept[-1] == 0


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode", "loading"])
@pytest.mark.parametrize("gb", sampled([0.9, 2.0, 3.0, 7.0, 20.0], 5))
def test_no_stage_takes_more_after_memory_ran_out_in_one(planner: Planner, gb: float, stage: str) -> None:
    """Of four pictures of 1024x1024; blocks that stayed still do where it was not the loop that took too much."""
    job = Job(128, 128, 4, 28, 2, 256)
    plan = planner.plan(job, int(gb * 1e9))
    stayed = planner.costs.staying(plan.modes)
    if stage == "loading" and not stayed:
        return
    less = planner.smaller(job, plan, stage)
    if less is None:
        assert stage == "encode" and plan.peaks[stage] <= 0.9e9
        return
    assert less.peak <= plan.peak and less.peaks[stage] < plan.peaks[stage]
    assert less.strip is None or less.strip >= 16
    if stage in ("encode", "decode") and less.modes == plan.modes:
        assert (less.kept, less.batch) == (plan.kept, plan.batch)
    if stage == "loading":
        assert planner.costs.staying(less.modes) < stayed


@pytest.mark.parametrize("gb", sampled([9.0, 20.0], 2))
def test_what_could_not_be_loaded_is_not_to_stay_later(planner: Planner, gb: float) -> None:
    """At 2048x2048, where a decode takes more than all weights that would stay."""
    job = Job(256, 256, 1, 28, 2, 256)
    plan = planner.plan(job, int(gb * 1e9))
    stayed = planner.costs.staying(plan.modes)
    assert stayed > 4e9
    assert planner.smaller(job, plan, "loading") is not None
    plan = planner.plan(job, int(gb * 1e9))
    for stage in ("encode", "denoise", "decode"):
        less = planner.smaller(job, plan, stage)
        assert less is None or planner.costs.staying(less.modes) < stayed


def test_on_a_cpu_only_what_is_converted(folder: Path) -> None:
    """As many are kept as fit of blocks that need memory; of those that need none there is nothing to keep."""
    pipeline = Pipeline.load(folder, dtype="bf16", device="cpu")
    planner, job = pipeline.planner, JOB
    network, staged, none = pipeline.residency.networks["transformer"], RUNGS[2], planner.predict(STREAMED, job, 1, 0)
    most = planner.predict(staged, job, 1, 0).peaks["denoise"] - 1
    plan = planner.keeping(STREAMED, job, 1, most, most)
    assert (plan.blocks, plan.peaks["denoise"] <= most) == (DEPTH, True)
    assert 0 < plan.kept < DEPTH - 1
    assert planner.keeping(STREAMED, job, 1, most, none.peaks["denoise"] - 1).kept == 0
    own, planner._beside = planner._beside, 0  # of the process, beside which the toy's blocks are nothing
    last = list(planner.plans(job, most - own))[-1]
    assert last.kept > 0 and last.peaks["denoise"] <= 0.95 * (most - own)  # the C library keeps a little
    for unit in network.blocks[:3]:  # as adapters put their own weights in the places of the file's
        for name in unit.names:
            network.source.put(name, network.source(name))
    assert planner.keeping(STREAMED, job, 1, 10**12, 10**12).blocks == DEPTH - 3
    assert network.going(0) == network.blocks[3:]


# ---- on a GPU ------------------------------------------------------------------------------------


def test_page_locked_memory_is_for_those_that_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The carrier of a GPU on the host's memory: three of seven kept, memory for each of four; the same picture."""
    pipeline = Pipeline.load(folder, dtype="bf16", device="cpu")
    expected = drawn(pipeline)
    gpu = Gpu()
    gpu.play(monkeypatch)
    monkeypatch.setattr(devices, "available_bytes", lambda: None)
    streamed(pipeline, 3)
    assert equal(drawn(pipeline), expected)
    network = pipeline.residency.networks["transformer"]
    size = {unit: sum(-(-network.source.nbytes(n) // 256) * 256 for n in unit.names) for unit in network.blocks}
    going: list[Unit] = [network.blocks[i] for i in (0, 1, 3, 5)]
    asked = [size[unit] for unit in going]
    assert [gpu.asked[i : i + 4] for i in range(len(gpu.asked))].count(asked) == 1
    reads, read = Counter[str](), Source.__call__
    monkeypatch.setattr(Source, "__call__", lambda self, name: reads.update([name]) or read(self, name))
    assert equal(drawn(pipeline), expected)
    assert [gpu.asked[i : i + 4] for i in range(len(gpu.asked))].count(asked) == 1
    assert not any(reads[name] for unit in going for name in unit.names)
