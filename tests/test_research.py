"""Training and comparing variants: pairs, resumed runs, measurements, tables; tiny, on random latents."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from toys import OneByOne, trained_here

from benchmarks.emoji import compare, data, pace, train, training
from benchmarks.emoji.beginning import config_of, initialise, weights_of
from benchmarks.emoji.compare import Curve, interval, table
from benchmarks.emoji.networks import MMDIT
from benchmarks.emoji.run_state import number_format
from benchmarks.emoji.train import Budget, Run, parser_of
from mmdit import variants
from mmdit.variants import PLAIN

TINY = ["--width", "64", "--depth", "2", "--batch", "4", "--scenes", "400", "--size", "16", "--dtype", "float32"]
TINY += ["--pictures", "0"]


@pytest.fixture(scope="module", autouse=True)
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the place of encoded scenes, numbers of their shapes."""
    folder, g = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    shapes = {"latents": (400, 16, 2, 4), "context": (400, 6, MMDIT.context_size), "pooled": (400, MMDIT.pooled_size),
              "empty_context": (1, 6, MMDIT.context_size), "empty_pooled": (1, MMDIT.pooled_size)}  # fmt: skip
    tensors = {name: torch.randn(shape, generator=g).bfloat16() for name, shape in shapes.items()}
    save_file(tensors | {"clip": torch.tensor(3)}, folder / "scenes-16-400.safetensors")
    return folder


def run_of(out: Path, scenes: Path, *more: str, variant: Any = PLAIN) -> Run:
    args = parser_of().parse_args([*TINY, "--out", str(out), "--data", str(scenes), *more])
    args.device = "cpu"
    out.mkdir(exist_ok=True, parents=True)
    return Run(variant, args)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured often, on few scenes."""
    monkeypatch.setattr(training, "EVERY", 4)
    monkeypatch.setattr(data, "HELD_OUT", 10)


@pytest.mark.parametrize(("text", "unit", "amount"), [
    ("20min", "seconds", 1200), ("steps:3000", "steps", 3000), ("flops:1e15", "flops", 1e15),
])  # fmt: skip
def test_budgets(text: str, unit: str, amount: float) -> None:
    assert Budget.read(text) == (found := Budget(unit, amount)) and found.amount > 0


@pytest.mark.parametrize("text", ["", "min", "20", "steps:", "steps:-1", "hours:3", "flops:x", "0min"])
def test_a_budget_that_is_none_ends_in_a_line(text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(["--budget", text])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("expected 20min, steps:3000 or flops:1e15")


def test_stopped_and_resumed_equals_never_stopped(tmp_path: Path, scenes: Path) -> None:
    """Bit for bit, the log but for its times included; the signal comes in the middle."""
    drawing = ("--pictures", "2")  # on the way, in one of both
    whole, parts = run_of(tmp_path / "a", scenes), run_of(tmp_path / "b", scenes, *drawing)
    assert train.train(whole, Budget("steps", 11))
    update, steps = parts.update, []

    def interrupted() -> float:
        steps.append(parts.step)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return update()

    parts.update = interrupted
    assert not train.train(parts, Budget("steps", 11))
    assert parts.step == 6
    again = run_of(tmp_path / "b", scenes, *drawing)
    assert again.step == 6 and train.train(again, Budget("steps", 11))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
        assert torch.equal(again.average.state()[name], whole.average.state()[name]), name
    assert whole.losses.keys() == again.losses.keys() == {4, 8, 11}
    assert all(np.array_equal(whole.losses[n], again.losses[n]) for n in whole.losses)
    logs = [[json.loads(line) for line in (tmp_path / x / "log.jsonl").read_text().splitlines()] for x in "ab"]
    same = ("step", "flops", "held_out", "by_level")
    assert [[line[key] for key in same] for line in logs[0]] == [[line[key] for key in same] for line in logs[1]]


def test_pictures_as_it_goes_change_nothing_of_it(tmp_path: Path, scenes: Path) -> None:
    """Two rows, of the scenes and of drawings that differ between measurements; weights, noise and log are the same."""
    plain, drawing = run_of(tmp_path / "a", scenes), run_of(tmp_path / "b", scenes, "--pictures", "3", "--rate", "0.1")
    plain.rate, found = drawing.rate, []
    measure = drawing.measure

    def measured(loss: float) -> None:
        before = torch.get_rng_state()
        measure(loss)
        assert torch.equal(torch.get_rng_state(), before)
        with Image.open(tmp_path / "b" / "pictures.png") as image:
            found.append(np.asarray(image))

    drawing.measure = measured
    for run in (plain, drawing):
        assert train.train(run, Budget("steps", 8))
    state = drawing.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.model.state_dict().items())
    assert np.array_equal(plain.losses[8], drawing.losses[8])
    assert not (tmp_path / "a" / "pictures.png").exists() and not list((tmp_path / "b").glob(".*"))
    first, last = found
    assert first.shape == (2 * 16, 3 * 32, 3)  # latents of 2 by 4 cells
    assert np.array_equal(first[:16], last[:16]) and not np.array_equal(first[16:], last[16:])


def test_pictures_on_the_way_are_those_that_drawing_gives(tmp_path: Path, scenes: Path) -> None:
    """Of the model that a training leaves behind: by the engine's own velocity, guidance and solver."""
    from mmdit import Pipeline
    from samplers import euler, shifted_sigmas
    from text_encoders import Conditioning

    run = run_of(tmp_path / "a", scenes, "--pictures", "2", "--rate", "0.1")
    assert train.train(run, Budget("steps", 3))
    pipe = Pipeline.load(tmp_path / "a", dtype="fp32", device="cpu")
    held = run.held
    cond, uncond = (Conditioning(c.float(), p.float(), {}) for c, p in (
        (held.context[:2], held.pooled[:2]), (held.empty_context, held.empty_pooled)))  # fmt: skip
    noise = torch.randn(2, 16, 2, 4, generator=torch.Generator().manual_seed(0))
    latents = euler(pipe.velocity(cond, uncond, train.CFG, 2), noise, shifted_sigmas(train.STEPS, pipe.shift))
    assert np.abs(pipe.decode(latents).numpy().astype(int) - run.drawn().astype(int)).max() <= 4  # the demo's bfloat16


@pytest.mark.parametrize("count", ["-1", "9"])
def test_pictures_that_are_too_many_are_told(count: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(["--pictures", count])
    assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(f"{count}: expected 0 to 8")


def test_variants_of_one_seed_are_a_pair() -> None:
    """Parameters that both have begin alike, whatever else there is; another seed is another beginning."""
    rope, swiglu = (variants.load(f"benchmarks.variants.{name}") for name in ("rope", "swiglu"))
    states = []
    for variant, seed in ((PLAIN, 1), (rope, 1), (swiglu, 1), (PLAIN, 2)):
        model = variant.build(config_of(variant, 64, 3))
        initialise(model, seed)
        states.append(model.state_dict())
    base, of_rope, of_swiglu, other = states
    assert all(torch.equal(base[name], of_rope[name]) for name in of_rope)
    shared = [name for name in base if name in of_swiglu and base[name].shape == of_swiglu[name].shape]
    assert len(shared) > 30
    assert all(torch.equal(base[name], of_swiglu[name]) for name in shared)
    assert not torch.equal(base["x_embedder.proj.weight"], other["x_embedder.proj.weight"])


def test_what_a_step_sees_depends_on_seed_and_step_alone(tmp_path: Path, scenes: Path) -> None:
    one, two = run_of(tmp_path / "a", scenes), run_of(tmp_path / "b", scenes, "--width", "128")
    torch.manual_seed(5)
    for step in (0, 3, 100):
        assert all(torch.equal(a, b) for a, b in zip(one.sample(step, 4), two.sample(step, 4)))
    assert not torch.equal(one.sample(3, 4)[1], one.sample(4, 4)[1])
    assert not torch.equal(one.sample(3, 4)[1], run_of(tmp_path / "c", scenes, "--seed", "2").sample(3, 4)[1])


def test_losses_are_those_of_the_formula(tmp_path: Path, scenes: Path) -> None:
    """x = (1 - sigma) latent + sigma noise; target noise - latent; the mean of its square, written out."""
    run = run_of(tmp_path / "a", scenes)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.1)
        latents, noise, sigma, context, pooled = run.sample(0, 4)
        found = train.velocity_loss(run.model, latents, noise, sigma, context, pooled)
        for i in range(4):
            x = (1 - sigma[i]) * latents[i] + sigma[i] * noise[i]
            v = run.model(x[None], sigma[i : i + 1], context[i : i + 1].float(), pooled[i : i + 1].float())[0]
            assert float(found[i]) == pytest.approx(float((v - (noise[i] - latents[i])).pow(2).mean()), rel=1e-4)


def test_what_is_left_out_is_left_out(tmp_path: Path, scenes: Path) -> None:
    held = run_of(tmp_path / "a", scenes).held
    rows, yes, no = torch.tensor([3, 3, 3]), torch.tensor([False, True, False]), torch.tensor([False, False, True])
    before = held.context.clone()
    latents, context, pooled = held.batch(rows, yes, no)
    assert torch.equal(latents, held.latents[rows]) and torch.equal(held.context, before)
    assert torch.equal(context[0], held.context[3]) and torch.equal(context[1], held.empty_context[0])
    assert torch.equal(context[2, :3], held.context[3, :3]) and not context[2, 3:].any()
    assert torch.equal(pooled[1], held.empty_pooled[0]) and torch.equal(pooled[2], held.pooled[3])


def test_operations_are_those_of_the_products(tmp_path: Path, scenes: Path) -> None:
    """Wider in every matrix by two is nearly four times as many; a batch twice as large, twice."""
    narrow = run_of(tmp_path / "a", scenes).flops
    wide = run_of(tmp_path / "b", scenes, "--width", "128").flops
    assert 3 < wide / narrow < 4
    assert run_of(tmp_path / "c", scenes, "--batch", "8").flops == 2 * narrow


@pytest.mark.parametrize(("device", "fast", "expected"), [
    ("cpu", True, torch.bfloat16), ("cpu", False, torch.float32), ("cuda", False, torch.bfloat16),
])  # fmt: skip
def test_it_computes_in_what_the_machine_multiplies_fast(
    device: str, fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once bfloat16 everywhere, 13 times slower on a CPU that has none."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert number_format(torch.device(device)) is expected


def test_a_run_begins_with_another_ones_weights(tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture) -> None:
    train.train(run_of(tmp_path / "a", scenes), Budget("steps", 3))
    registers = variants.load("benchmarks.variants.registers")
    run = run_of(tmp_path / "b", scenes, "--init", str(tmp_path / "a"), variant=registers)
    assert "1 new\nnew: registers" in capsys.readouterr().out
    state = weights_of(tmp_path / "a")
    assert all(torch.equal(run.model.state_dict()[name], tensor) for name, tensor in state.items())
    line = [*TINY, "--data", str(scenes), "--out", str(tmp_path / "c"), "--init", str(tmp_path / "none")]
    with pytest.raises(SystemExit) as end:
        train.main(line)
    assert end.value.code == 2 and "none" in capsys.readouterr().err.splitlines()[-1]


def test_fewer_encoders_give_what_drawing_gives(tmp_path: Path, scenes: Path) -> None:
    """Held against the engine's own join: one CLIP fills the first channels, the pooled vector is its own."""
    from text_encoders import join

    held = data.load(scenes / "scenes-16-400.safetensors", torch.device("cpu"))[1]
    clip, t5 = held.context[:, :3], held.context[:, 3:]
    parts = {"clip_l": (clip[..., :64], held.pooled[:, :64]), "clip_g": (clip[..., 64:192], held.pooled[:, 64:])}
    for encoders in (("clip_l", "t5"), ("clip_g", "t5"), ("clip_g",), ("clip_l", "clip_g", "t5")):
        found = held.read_by(encoders)
        own = [parts[name] for name in encoders if name != "t5"]
        context, pooled = join(own, t5 if "t5" in encoders else None, 192)
        assert torch.equal(found.context, context) and torch.equal(found.pooled, pooled)
    run = run_of(tmp_path / "a", scenes, variant=variants.load("benchmarks.variants.no_clip_g"))
    assert run.train.pooled.shape[1] == 64 == run.model.config.pooled_size


# ---- comparing -----------------------------------------------------------------------------------


def curve(losses: list[float], pace: float = 1.0, flops: float = 1.0, right: float = 0.5) -> Curve:
    told = {"parameters": 10, "flops_a_step": flops, "batch": 1}
    lines = [{"step": 10 * i, "flops": 10 * i * flops} for i in range(1, len(losses) + 1)]
    noise = np.random.default_rng(0).normal(size=50)
    kinds = {kind: [i < right * 20 for i in range(20)] for kind in compare.JUDGED}
    return Curve(told, lines, np.stack([loss + 0.01 * noise for loss in losses]), kinds, pace)


def test_base_against_base_is_exactly_nothing() -> None:
    base = [curve([3, 2, 1]), curve([3.1, 2.2, 1.4])]
    row = table({"base": base, "again": list(base)}).splitlines()[-1].split(" | ")
    assert row[5:8] == ["0", "0", "0"]
    assert all("(0)" in cell for cell in row[8:])


def test_equal_steps_operations_and_time_differ() -> None:
    """One that gains 0.5 a step and takes twice as long: at equal time it has half the steps, and is no better."""
    slow = {"base": [curve([3, 2, 1])] * 2, "slow": [curve([2.5, 1.5, 0.5], pace=2.0, flops=1.5)] * 2}
    row = table(slow).splitlines()[-1].split(" | ")
    assert row[3] == "2.00"
    found = [float(cell.split()[0]) for cell in row[5:8]]
    assert found == [-0.5, pytest.approx(0.5), pytest.approx(1.0)]  # at step 30; at 30 flops; in the time of 30


def test_a_pace_is_of_two_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that grows by 2 for a step of the base and by 3 for one of the other, and by more while both begin."""
    order, now = list[str](), [0.0]

    class Steps:
        def __init__(self, variant: Any, _: Any) -> None:
            self.name, self.steps = variant.name or "base", 0

        def update(self) -> None:
            order.append(self.name)
            self.steps += 1
            now[0] += {"base": 2.0, "registers": 3.0}[self.name] + (50.0 if self.steps <= pace.BEFORE else 0.0)

    monkeypatch.setattr(pace, "Run", Steps)
    monkeypatch.setattr(pace, "clock", lambda _: lambda: now[0])
    args = train.parser_of().parse_args(["--device", "cpu"])
    assert pace.pace("", "benchmarks.variants.registers", args) == 1.5
    assert order == ["base", "registers"] * (pace.BEFORE + pace.ROUNDS)


def test_between_two_measurements_a_loss_lies_on_a_line() -> None:
    c = curve([3, 2, 1])
    assert [round(float((c.at("step", n) - c.losses[0]).mean()), 6) for n in (0, 10, 15, 30, 99)] == [
        0,
        0,
        -0.5,
        -2,
        -2,
    ]


def test_two_measurements_at_one_time_are_no_division_by_zero() -> None:
    c = curve([3, 2, 1], flops=0.0)
    assert np.isin(c.at("flops", 0.0), c.losses).all()


def test_intervals_cover_the_truth_and_shrink() -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(60):
        mean, low, high = interval(0.3 + rng.normal(size=(3, 40)))
        inside += low <= 0.3 <= high
        assert low <= mean <= high
    assert inside >= 48
    wide, narrow = (interval(rng.normal(size=(3, n)))[2] - interval(rng.normal(size=(3, n)))[1] for n in (20, 2000))
    assert narrow < wide


@pytest.mark.parametrize("damage", ["train.txt"])
def test_a_comparison_trains_what_is_missing_only(
    damage: str, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """From the command line to the table, with pictures judged by a stand-in; the second call trains nothing.

    The base is trained in this process, the variant in one of its own, as all are for users.
    """
    own = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda line, **more: trained_here(line, **more) if "base-1" in line[4] else own(line, **more)
    )
    for pool in ("ThreadPoolExecutor", "ProcessPoolExecutor"):
        monkeypatch.setattr(compare, pool, OneByOne)
    monkeypatch.setattr(data, "HELD_OUT", 256)  # as in that process
    (tmp_path / "scenes-16-400.safetensors").write_bytes((scenes / "scenes-16-400.safetensors").read_bytes())
    monkeypatch.setattr(compare, "draw", lambda *given: np.zeros((len(given[1]), 8, 8, 3), np.uint8))
    monkeypatch.setattr(compare, "judge", lambda *_: None)
    monkeypatch.setattr(compare, "KINDS", dict.fromkeys(compare.JUDGED, Kind))
    monkeypatch.setattr(pace, "ROUNDS", 2)
    few = ["--seeds", "1", "--budget", "steps:5", "--judged", "4"]
    line = ["base", "benchmarks.variants.registers", *few, "--out", str(tmp_path), *TINY, "--batch", "64"]
    assert compare.main(line) == 0
    found = json.loads((tmp_path / "paces.json").read_text())
    assert found["base"]["base"] == 1.0 and found["base"]["registers"] > 0
    assert "| registers |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    kept = [tmp_path / "paces.json", *(tmp_path / f"{name}-1" / damage for name in ("base", "registers"))]
    times = [path.stat().st_mtime_ns for path in kept]
    capsys.readouterr()
    assert compare.main(line) == 0
    assert times == [path.stat().st_mtime_ns for path in kept]
    assert "trained" not in capsys.readouterr().out


class Kind:
    scene: dict[str, Any] = {"count": 1}  # noqa: RUF012

    @staticmethod
    def right(*_: object) -> bool:
        return True
