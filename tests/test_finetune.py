"""Fine-tuning: adapters beside the weights, their files, whole runs; of adjoint matching itself see test_adjoint."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Toy, noise
from reference import diffusers_velocity, draw, randomize, relative_error, transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from toys import Ran, toy_folder

from mmdit.config import TOY
from mmdit.driver.pipeline import Pipeline
from mmdit.finetune import focus
from mmdit.finetune.__main__ import main
from mmdit.finetune.lora import JOINT_ATTENTION, Lora, targets
from mmdit.finetune.options import FocusTuning
from mmdit.finetune.state import Files, picked, seeded, undivided
from mmdit.maps import Look, recording
from mmdit.memory.plan import Job, Plan
from mmdit.memory.planner import Planner
from mmdit.memory.residency import Mode
from mmdit.model import MMDiT
from samplers.focus import COSTS

ROOT = Path(__file__).parents[1]

# ---- adapters ------------------------------------------------------------------------------------


def adapted(model: nn.Module, trained: bool = True, **more: Any) -> Lora:
    """With B as after a training."""
    lora = Lora(model, targets(model, JOINT_ATTENTION), **{"rank": 3, **more})
    for part, (_, b) in lora.matrices.items() if trained else ():
        b.data = noise(*b.shape, seed=part)
    return lora


def test_what_is_adapted_is_diffusers_joint_attention() -> None:
    """Its layers by its names, each once; nothing of the second attention."""
    ours, theirs = transformers(TOY)
    linear = [name for name, module in theirs.named_modules() if isinstance(module, nn.Linear)]
    found = [part for target in targets(ours, JOINT_ATTENTION) for part in target.parts]
    assert sorted(found) == sorted(name for name in linear if ".attn." in name)


def test_adapters_change_nothing_until_they_are_trained_and_when_they_are_off() -> None:
    model, inputs = randomize(MMDiT(TOY), 0), draw(TOY, 6, 10, 7, (0.9, 0.2))
    plain = model(*inputs)
    lora = adapted(model, trained=False)
    assert torch.equal(model(*inputs), plain)
    for p in lora.parameters():
        p.data += 0.1
    changed = model(*inputs).detach()
    assert relative_error(changed, plain) > 1e-2
    with lora.off():
        assert torch.equal(model(*inputs), plain)
    assert torch.equal(model(*inputs), changed)
    lora.close()
    assert torch.equal(model(*inputs), plain)
    assert all(not p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_the_file_is_read_here_and_by_diffusers(tmp_path: Path) -> None:
    """Either gives the velocity of the model with its adapters on; a strength of 2.5 is in the file."""
    pytest.importorskip("peft", reason="diffusers loads adapters with PEFT")
    model, inputs = randomize(MMDiT(TOY), 0), draw(TOY, 6, 10, 7, (0.9, 0.2))
    lora = adapted(model, strength=2.5)
    expected = model(*inputs)
    path = tmp_path / "style.safetensors"
    lora.write(path, {"note": "a test"})
    theirs = copy.deepcopy(transformers(TOY).theirs)
    theirs.load_lora_adapter(load_file(path), prefix="transformer")
    assert relative_error(diffusers_velocity(theirs, inputs), expected) < 1e-5
    toy = Toy(tmp_path, "transformer")
    assert relative_error(toy.modules["transformer"](*inputs), expected) > 1e-2
    report = toy.adapters.add(path)
    assert (len(report.applied), report.unknown) == (len(lora.matrices), [])
    assert relative_error(toy.modules["transformer"](*inputs), expected) < 1e-5
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "a test"}


# ---- runs ----------------------------------------------------------------------------------------

LINES = [
    {"prompt": "a horse and a bear", "focus": "horse; bear"},
    {"prompt": "a blue fox, a horse and a pig", "focus": "blue fox; pig"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    defaults = {"width": 64, "height": 48, "steps": 3, "cfg": 2.0, "t5_length": 12}
    root = tmp_path_factory.mktemp("finetune")
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return toy_folder(root, defaults=defaults)


class Bench:
    """A place to train in."""

    def __init__(self, model: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys, self.prompts = root, capsys, model.parent / "prompts.jsonl"
        self.told = ["--model", str(model), "--device", "cpu", "--dtype", "fp32", "--trajectories", "2"]

    def run(self, *options: object, out: str = "a.safetensors", prompts: Path | None = None) -> Ran:
        named = ["--prompts", str(prompts or self.prompts), "--out", str(self.root / out)]
        try:
            code = main(["focus", *named, *self.told, *map(str, options)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = self.capsys.readouterr()
        return Ran(code, captured.out.splitlines(), captured.err.splitlines())

    def log(self, out: str = "a") -> list[dict[str, Any]]:
        lines = map(json.loads, (self.root / f"{out}.log.jsonl").read_text().splitlines())
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture
def bench(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(folder, tmp_path, capsys)


def test_a_run_that_was_stopped_is_the_one_that_never_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its end, or in the middle of an iteration; the adapter bit for bit, and the log."""
    more = ["--watch-every", 3, "--rate", 0.01]
    ran = bench.run("--iterations", 3, *more)
    assert (ran.code, ran.lines) == (0, [str(bench.root / "a.safetensors")])
    assert len(list((bench.root / "a.pictures").glob("*.png"))) == 4
    assert [line["iteration"] for line in bench.log() if "held_out" in line] == [0, 3]
    assert bench.run("--iterations", 1, *more, out="b.safetensors").code == 0

    whole, count = focus.adjoint.adjoints, 0

    def stopped(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(focus.adjoint, "adjoints", stopped)
    ran = bench.run("--iterations", 3, *more, out="b.safetensors")
    assert (ran.code, ran.errors[-1]) == (130, "interrupted: what was done is saved; the same command goes on")
    monkeypatch.undo()
    assert bench.run("--iterations", 3, *more, out="b.safetensors").code == 0
    one, other = (load_file(bench.root / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert any(tensor.abs().max() > 1e-3 for name, tensor in one.items() if "lora_B" in name)
    ends = [line for line in bench.log("b") if line["iteration"] != 1 or "held_out" not in line]
    assert ends == bench.log("a")
    with safe_open(bench.root / "a.safetensors", "pt") as file:
        told = json.loads(file.metadata()["mmdit.finetune"])
    assert (told["iterations"], told["rank"], told["focus_loss"], len(told["prompts"])) == (3, 16, "focus", 64)


def focus_run(bench: Bench, folder: Path, **options: Any) -> focus.Focus:
    told = {"model": str(folder), "device": "cpu", "dtype": "fp32", "watch_every": 0, "at_steps": 2, **options}
    asked = FocusTuning(prompts=str(bench.prompts), out=str(bench.root / "x.safetensors"), trajectories=3, **told)
    lines = focus.read_lessons("prompts", asked.prompts, focus.settings_of(asked))
    return focus.Focus(asked, Files(Path(asked.out)), lines, lines)


@pytest.mark.parametrize("loss", ["focus", "conform"])
def test_memory_changes_nothing(bench: Bench, folder: Path, loss: str) -> None:
    """Trajectories one by one, and a transformer that comes block by block: gradients and costs as ever."""
    run = focus_run(bench, folder, focus_loss=loss)
    for pair in run.lora.matrices.values():
        pair[1].data += 0.05
    lesson = run.lessons[1]
    found = run.gradients(lesson, 3)
    grads = torch.cat([p.grad.flatten() for p in run.lora.parameters() if p.grad is not None])
    assert grads.norm() > 0 and found["loss"] > 0
    run.at_once = 1
    run.plan = replace(run.plan, modes={**run.plan.modes, "transformer": Mode.STREAMED})
    again = run._staged(partial(run.gradients, lesson, 3))
    assert run.pipe.residency.networks["transformer"].mode is Mode.STREAMED
    assert again == pytest.approx(found, rel=1e-4)
    assert (
        relative_error(torch.cat([p.grad.flatten() for p in run.lora.parameters() if p.grad is not None]), grads) < 1e-4
    )


def test_adapters_are_in_the_plan(bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they, their gradients and Adam's means take after a step is in every stage of what is trained by."""
    expect, plans = Planner.expect, list[Plan]()

    def told(planner: Planner, nbytes: int) -> None:
        planner._load()  # what it finds there is not of the adapters
        plain = planner.predict(planner.ladder()[0], Job(6, 8, 3, 3, 1, 12), 1, 0)
        expect(planner, nbytes)
        plans.extend((plain, planner.predict(plain.modes, Job(6, 8, 3, 3, 1, 12), 1, 0)))

    monkeypatch.setattr(Planner, "expect", told)
    run = focus_run(bench, folder)
    run.update()
    kept = [p for parameter in run.lora.parameters() for p in (parameter, parameter.grad)]
    kept += [state[name] for state in run.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    before, after = plans
    more = {stage: after.peaks[stage] - peak for stage, peak in before.peaks.items()}
    assert {*more.values()} == {sum(tensor.nbytes for tensor in kept)}
    assert run.plan.stages["denoise"].beside == after.stages["denoise"].beside


def test_adjoints_are_the_gradient_of_what_is_drawn(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an adapter at its beginning: by autograd through all steps of the model, called as it is."""
    run, kept = focus_run(bench, folder, scale=50.0), list[Any]()
    whole = focus.adjoint.adjoints
    monkeypatch.setattr(focus.adjoint, "adjoints", lambda *given: kept.append((given[1], whole(*given))) or kept[-1][1])
    lesson = run.lessons[0]
    found = run.gradients(lesson, 0)
    ((way, pulled),) = kept
    model, text = run.pipe.transformer, lesson.text
    assert [len(columns) for columns in lesson.groups] == [2, 2]  # of both CLIPs, and of T5
    look = Look(sum(lesson.groups, ()), COSTS["focus"](((0, 1), (2, 3))))
    sources = [seeded(0, "noise", 0, b) for b in range(3)]
    noises = [torch.stack([torch.randn(16, 6, 8, generator=source) for source in sources]) for _ in range(3)]
    x, points, total = noises[0].requires_grad_(), list[torch.Tensor](), torch.zeros(())
    for step, xi in zip(run.steps, [*noises[1:], noises[0]]):
        maps = dict[int, torch.Tensor]()
        with recording(model, [look] * 3, x, maps):
            level = torch.full((3,), step.sigma)
            velocity = -model(x, level, text.context.expand(3, -1, -1), text.pooled.expand(3, -1))
        rows = torch.stack([maps[i] for i in sorted(maps)], dim=1).movedim(-1, 2)  # (3, blocks, tokens, rows, columns)
        assert look.cost is not None
        total = total + 50 * step.height * torch.stack([look.cost(row) for row in rows]).sum()
        points.append(x)
        x = step.keep * x + step.gain * velocity + step.noise * xi
    assert 150 * found["cost"] == pytest.approx(float(total.detach()), rel=1e-5)
    expected = torch.autograd.grad(total, points)
    for k in (1, 2):
        assert relative_error(way.points[k], points[k].detach()) < 1e-5
        assert relative_error(pulled[k - 1], expected[k]) < 1e-4


def test_the_gradients_are_those_of_the_loss(bench: Bench, folder: Path) -> None:
    """By a difference along them, at points and adjoints that stay."""
    run = focus_run(bench, folder)
    lesson, draw = run.lessons[0], torch.Generator().manual_seed(0)
    prepared, shape = run._prepared(lesson), (16, 6, 8)
    points = [(k, torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)) for k in (0, 1, 1)]
    run.optimizer.zero_grad()
    run._descend(prepared, points, 1.0)
    own = [(p, p.grad.clone()) for p in run.lora.parameters() if p.grad is not None]
    steep = sum(float(g.square().sum()) for _, g in own)

    def moved(by: float) -> float:
        for p, g in own:
            p.data += by * g
        loss = run._descend(prepared, points, 1.0)
        for p, g in own:
            p.data -= by * g
        return loss

    by = 1e-2 / math.sqrt(steep)
    assert (moved(by) - moved(-by)) / (2 * by) == pytest.approx(steep, rel=1e-2)


def test_a_long_gradient_is_shortened(bench: Bench, folder: Path) -> None:
    """To twice the mean of the ten before, which it counts in as it is then."""
    run = focus_run(bench, folder)
    for length, expected, usual in ((3.0, 3.0, 3.0), (5.0, 5.0, 3.2), (64.0, 6.4, 3.52), (1.0, 1.0, 3.268)):
        for p in run.lora.parameters():
            p.grad = torch.zeros_like(p)
        grad = run.lora.parameters()[0].grad
        assert grad is not None
        grad[0, 0] = length
        run._clip(length)
        assert (float(grad[0, 0]), run.usual) == (pytest.approx(expected), pytest.approx(usual))


def test_every_prompt_has_its_turn() -> None:
    order = [picked(5, 3, i) for i in range(20)]
    assert all(sorted(order[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))
    assert len({tuple(order[i : i + 5]) for i in range(0, 20, 5)}) > 1
    assert order != [picked(5, 4, i) for i in range(20)]


def test_a_signal_waits_for_the_end_of_an_update() -> None:
    import signal

    done, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), undivided():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        done.append(True)
    assert done == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_mistakes(bench: Bench) -> None:
    """One line each, and nothing is written."""
    list_of = bench.root / "list.jsonl"

    def refusal(*options: object, lines: str | None = None, out: str = "new.safetensors") -> str:
        if lines is not None:
            list_of.write_text(lines)
        before = set(bench.root.rglob("*"))
        ran = bench.run(*options, out=out, prompts=None if lines is None else list_of)
        assert (ran.code, ran.lines, len(ran.errors)) == (2, [], 1), ran
        assert set(bench.root.rglob("*")) == before
        return ran.errors[0]

    list_of.write_text("")
    assert "there is no prompt in it" in refusal(lines=" \n")
    told = refusal(lines='{"prompt": "a horse", "focus": "horse; bear"}\n')
    assert 'list.jsonl: line 1: focus: "bear" is not in the prompt' in told
    assert 'line 2: expected {"prompt"' in refusal(lines=f'{json.dumps(LINES[0])}\n{{"prompt": "a horse"}}')
    assert "line 1: is not JSON" in refusal(lines="a horse and a bear")
    assert "line 1: focus is" in refusal(lines='{"prompt": "a horse", "focus": ";"}')
    assert "prompts: " in refusal("--prompts", bench.root / "none.jsonl")
    assert "expected a name ending in .safetensors" in refusal(out="a.png")
    assert "out: cannot write into /proc/none" in refusal("--out", "/proc/none/a.safetensors")
    (bench.root / "there.safetensors").write_bytes(b"")
    assert "without the run that made it" in refusal(out="there.safetensors")
    assert "iterations is 0" in refusal("--iterations", 0)
    assert "2 or more" in refusal("--steps", 1)
    assert "--dtype bf16 or --dtype fp32" in refusal("--dtype", "fp16")
    assert "rate is nan" in refusal("--rate", "nan")
    assert "--help lists the options" in refusal("--rate", "fast")
    (bench.root / "b.run.pt").write_bytes(b"no run")
    assert "b.run.pt: is no saved run" in refusal(out="b.safetensors")
    torch.save({"told": {"rank": 4}}, bench.root / "b.run.pt")
    assert "b.run.pt: was begun with" in refusal(out="b.safetensors")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom mmdit.finetune.__main__ import main\n"
        "for line in (['--help'], ['focus', '--help'], ['focus'], []):\n"
        "    try: main(line)\n"
        "    except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"
    assert "--held-out FILE" in ran.stdout


def test_the_demo_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two iterations; the adapter loads by --lora."""
    (tmp_path / "list.jsonl").write_text('{"prompt": "a blue horse and a bear", "focus": "blue horse; bear"}')
    out = tmp_path / "demo.safetensors"
    line = ["focus", "--prompts", tmp_path / "list.jsonl", "--out", out, "--iterations", 2, "--trajectories", 2]
    assert main([*map(str, line), "--steps", "4", "--watch-every", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    pipe = Pipeline.load(lora=[str(out)], device="cpu")
    assert pipe.adapters.settings == (f"{out}:1.0",)
