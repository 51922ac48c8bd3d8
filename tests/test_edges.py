"""What a second reading of the driver found, each by the way in which it went wrong."""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmdit import Pipeline
from mmdit.common.errors import SettingsError
from mmdit.driver.stages import NotFiniteError
from mmdit.driver.watch import Stepped
from mmdit.memory.residency import Mode
from mmdit.run import main

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(dtype="fp32")


def listed(path: Path, *lines: dict[str, Any]) -> list[str]:
    (path / "list.jsonl").write_text("".join(json.dumps({**SMALL, **line}) + "\n" for line in lines))
    return ["--prompts", str(path / "list.jsonl"), "--out", str(path / "out")]


# ---- lists ---------------------------------------------------------------------------------------


def test_one_file_by_two_spellings_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = str(tmp_path / "a.png")
    (tmp_path / "link").symlink_to(tmp_path)
    for other in ("a.png", "link/a.png"):
        line = listed(tmp_path, {"prompt": "a horse", "out": other}, {"prompt": "a bear", "out": whole})
        assert main(line) == 2
        assert "is also where line 1 goes" in capsys.readouterr().err


def test_a_fixed_name_in_a_folder_is_not_given_to_another_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The folder as it was given, and the file by its whole path; both stay, and the second run draws none."""
    monkeypatch.chdir(tmp_path)
    fixed = str(tmp_path / "f" / "a-horse-0.png")
    line = listed(tmp_path, {"prompt": "a horse", "out": "f"}, {"prompt": "a bear", "out": fixed})
    assert main(line) == 0
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["a-horse-0-2.png", "a-horse-0.png"]
    capsys.readouterr()
    assert main(line) == 0
    assert "0 written; 2 skipped" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["flash", "cudnn"])
def test_an_attention_that_is_not_there_is_refused_by_its_line(
    attention: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = listed(tmp_path, {"prompt": "a horse"}, {"prompt": "a bear", "attention": attention})
    assert main([*line, "--device", "cpu"]) == 2
    assert f"line 2: attention {attention} cannot be used: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [10**12, 100_001])
def test_more_pictures_than_a_list_can_hold_are_refused(count: int, capsys: pytest.CaptureFixture) -> None:
    assert main(["a horse", "--count", str(count)]) == 2
    assert f"count is {count}: expected at most 100000" in capsys.readouterr().err


@pytest.mark.parametrize(("pictures", "said"), [
    ("ab", "draw_many takes a list"), ({"prompt": "x"}, "draw_many takes a list"),
    ([5], "draw_many: 5: expected a prompt, a dict or a Settings"), ([None], "draw_many: None: expected"),
])  # fmt: skip
def test_what_is_no_list_of_pictures_is_told(pictures: Any, said: str, pipeline: Pipeline) -> None:
    with pytest.raises(SettingsError, match=said):
        pipeline.draw_many(pictures)


def test_guidance_of_any_size_is_a_number(pipeline: Pipeline) -> None:
    """As far as the numbers of the run go: the error is about them, not about the whole number."""
    with pytest.raises(NotFiniteError):
        pipeline("a", cfg=10**38, **SMALL)


# ---- watchers ------------------------------------------------------------------------------------


def test_memory_that_runs_out_in_a_watcher_at_the_last_step(pipeline: Pipeline) -> None:
    """Of two pictures drawn together, in the second's: the first, which was done then, is given all the same."""
    expected = [np.asarray(image, int) for image in pipeline("a horse", count=2, **SMALL)]
    failed: list[int] = []

    def scarce(event: Stepped) -> None:
        if event.index == 1 and event.step.index == 1 and not failed:
            failed.append(1)
            raise MemoryError

    with pytest.warns(UserWarning, match="memory ran out"):
        found = pipeline("a horse", count=2, on_step=scarce, **SMALL)
    assert len(found) == 2
    assert all(np.abs(np.asarray(a, int) - b).max() <= 1 for a, b in zip(found, expected))  # drawn one by one now


def test_after_stop_all_nothing_more_is_told(pipeline: Pipeline) -> None:
    told: list[int] = []

    def stop(event: Stepped) -> None:
        told.append(event.index)
        event.stop_all()

    assert pipeline("a horse", count=4, on_step=stop, **SMALL) == []
    assert len(told) == 1


def test_events_and_pictures_have_the_settings_that_drew_them(tmp_path: Path) -> None:
    """Adapters that come while the second of two, denoised with the first, waits to be given."""
    pipe = Pipeline.load(dtype="fp32")
    width = pipe.transformer.config.hidden_size
    name = "transformer.transformer_blocks.0.ff.net.0.proj"
    adapter = {f"{name}.lora_B.weight": torch.ones(4 * width, 1), f"{name}.lora_A.weight": torch.ones(1, width)}
    save_file(adapter, tmp_path / "a.safetensors")
    seen: list[str] = []
    drawing = pipe.draw_many(
        ["a horse", "a bear"], on_step=lambda e: seen.append((e.settings.device, e.settings.lora)), **SMALL
    )  # type: ignore[arg-type]
    first, _ = next(drawing)
    pipe.adapters.add(str(tmp_path / "a.safetensors"), 1.0)
    second, _ = next(drawing)
    assert first.lora == second.lora == ()
    assert first.weights == second.weights != pipe.actual["weights"]
    assert set(seen) == {(pipe.device.type, ())}


def test_a_call_inside_a_call_does_not_leave_its_plan(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher draws by another plan; the outer picture is decoded by its own."""
    plans, strips, plan_for, decode = [], [], pipeline.plan_for, pipeline.decode

    def planned(job: Any) -> Any:
        plan = replace(plan_for(job), strip=2 if job.rows == 16 else 1)
        plans.append(plan)
        return plan

    def decoded(latents: torch.Tensor, *more: Any) -> Any:
        strips.append((latents.shape[2], pipeline.plan.strip))
        return decode(latents, *more)

    monkeypatch.setattr(pipeline, "plan_for", planned)
    monkeypatch.setattr(pipeline, "decode", decoded)
    inner: list[Any] = []

    def draw(event: Stepped) -> None:
        if event.step.index == 1 and not inner:
            inner.extend(pipeline("a bear", width=64, height=64, steps=1))

    pipeline("a horse", width=128, height=128, steps=2, on_step=draw)
    assert strips == [(8, 1), (16, 2)]


def test_an_abandoned_list_takes_no_weights_from_a_picture_on_its_way() -> None:
    """It is collected in the middle of a block, by the thread that computes."""
    pipe = Pipeline.load(dtype="fp32")
    modes = dict.fromkeys(pipe.residency.networks, Mode.STAGED) | {"transformer": Mode.STREAMED}
    pipe.planner.ladder = lambda: [modes]  # pyright: ignore[reportAttributeAccessIssue]
    expected = pipe("a horse", **SMALL)[0].tobytes()
    left = pipe.draw_many(["a bear", "a pig"], **SMALL)
    next(left)
    cycle: list[Any] = [left]
    cycle.append(cycle)
    del left
    collected: list[bool] = []

    def collect(*_: object) -> None:
        if cycle:
            cycle.clear()
            collected.append(True)
            gc.collect()

    block: Any = pipe.transformer.joint_blocks[2]
    block.x_block.register_forward_pre_hook(collect)
    assert pipe("a horse", **SMALL)[0].tobytes() == expected
    assert collected
    assert all(
        tensor.is_meta for tensor in pipe.transformer.joint_blocks[1].x_block.mlp.parameters() if tensor.ndim > 1
    )


# ---- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [*(pytest.param(c, marks=pytest.mark.sweep) for c in (">&-", "2>&-")), ">&- 2>&-"])
def test_closed_streams_are_no_reason_to_fail(closed: str, tmp_path: Path) -> None:
    command = (
        f"{sys.executable} -m mmdit.run 'a horse' --steps 1 --width 64 --height 64 --out {tmp_path}/a.png {closed}"
    )
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, "Traceback" in ran.stdout + ran.stderr) == (0, False)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (64, 64)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_standard_output_is_one_line(tmp_path: Path) -> None:
    command = (
        f"{sys.executable} -m mmdit.run 'a horse' --steps 1 --width 64 --height 64 --out {tmp_path}/a.png > /dev/full"
    )
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: standard output: No space left on device"]
    assert "Traceback" not in ran.stderr
    assert (tmp_path / "a.png").exists()


def test_a_reader_of_errors_who_left_changes_nothing(tmp_path: Path) -> None:
    """Standard error is a pipe without a reader; all is drawn, and said to be."""
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, "-m", "mmdit.run", "a horse", "--steps", "1", "--width", "64", "--out", str(tmp_path)]
    ran = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=write, text=True, timeout=120)
    os.close(write)
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path}/a-horse-0.png\n")


def test_what_was_cut_off_is_quoted_in_a_line(pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning, match="^prompt too long") as warned:
        pipeline.encode(["a horse " * 20_000], 12)
    assert all(len(str(w.message)) < 600 and " ... " in str(w.message) for w in warned)
