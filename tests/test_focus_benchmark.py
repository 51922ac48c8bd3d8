"""Whether keeping subjects apart helps: its prompts, what is right of a picture, and the command on few pictures."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_emoji import needs_font

from benchmarks import focus
from benchmarks.emoji import compare
from benchmarks.emoji.scenes import Scene, Subject, held_out, render, tint_held_out
from benchmarks.emoji.several import RATES, judged, prompts_of

HORSE, BEAR = Subject("horse"), Subject("bear", "blue")


def test_prompts() -> None:
    counts = {"usual": 24, "loose": 24, "twins": 6, "single": 8}
    prompts = prompts_of(counts, 100)
    assert [p.seed for p in prompts] == list(range(100, 162))
    assert prompts == prompts_of(counts, 100) != prompts_of(counts, 101)
    for i, prompt in enumerate(prompts):
        group, scene = prompt.group, prompt.scene
        assert all(words in prompt.text for words in prompt.subjects.split("; "))
        assert group == "single" or len(scene.subjects) == 2 + (i % 24) % 3
        if group in ("usual", "loose"):  # never seen: every second half dozen
            assert any(held_out(*pair) for pair in combinations(scene.nouns, 2)) == (i % 12 >= 6)
            assert any(scene.tints) == (i % 6 >= 3)
            assert all(tint is None or tint_held_out(noun, tint) == (i % 12 >= 6)
                       for noun, tint in zip(scene.nouns, scene.tints))  # fmt: skip
    loose = [p for p in prompts if p.group == "loose"]
    assert all(p.text != p.scene.caption for p in loose)
    assert len({p.text[:2] == "a " or p.text[:3] == "an " for p in loose}) == 2
    assert all(len(set(p.scene.nouns)) == 1 < len(set(p.scene.tints)) for p in prompts if p.group == "twins")


@needs_font
def test_what_is_right() -> None:
    asked = Scene((HORSE, BEAR), "green", named_colour=True)
    right = judged(render(asked), asked)
    assert all(right[name] for name in RATES) and right["likeness"] > 0.99

    elsewhere = judged(render(Scene((BEAR, HORSE), "green", True)), asked)
    assert elsewhere["present"] and not elsewhere["in place"] and elsewhere["likeness"] < 0.5
    other_colours = judged(render(Scene((HORSE, Subject("bear", "red")), "pink", True)), asked)
    assert other_colours["in place"]
    assert not (other_colours["colours"] or other_colours["background"] or other_colours["all right"])

    both = (render(Scene((HORSE, HORSE), "green", True)) / 2 + render(Scene((BEAR, BEAR), "green", True)) / 2).round()
    mixture = judged(both.astype(np.uint8), asked)
    assert not (mixture["present"] or mixture["unmixed"])
    unnamed = judged(render(Scene((HORSE, BEAR), "pink", False)), Scene((HORSE, BEAR), "green", False))
    assert unnamed["background"] is None and unnamed["all right"]


def test_the_whole_command_and_again_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(focus, "STEPS", 2)
    monkeypatch.setattr(compare, "DRAWS", 20)
    ways = [focus.focused("focus", "relative", scale, 0.9) for scale in (0.1, 3.0)]
    monkeypatch.setattr(focus, "candidates", lambda: [*ways, focus.focused("jedi", "relative", 1, 0.9)])
    every = focus.main_ways

    def few(chosen: dict[str, Any]) -> list[focus.Way]:
        return [way for way in every(chosen) if way.pushed == (way.keywords in chosen.values())]

    monkeypatch.setattr(focus, "main_ways", few)
    seen: list[np.ndarray] = []

    def plausible(picture: np.ndarray, scene: Scene) -> dict[str, Any]:
        seen.append(picture)
        right = dict.fromkeys(RATES, bool(picture.sum() % 2)) | {"background": scene.named_colour or None}
        return {**right, "likeness": float(picture.mean()) / 255}

    monkeypatch.setattr(focus, "judged", plausible)
    command = ["--share", "0.01", "--out", str(tmp_path)]
    focus.main([*command, "--only", "relative 3"])  # one way, and no more
    assert [path.name for path in (tmp_path / "choosing").iterdir()] == ["focus relative 3 until 0.9.jsonl"]
    focus.main(command)
    table = (tmp_path / "table.md").read_text()
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    assert set(chosen) == {"focus", "jedi"} and chosen["focus"]["focus_scale"] in (0.1, 3.0)
    for words in ("All of several subjects", "Twins", "Single", "| plain |", "28 steps", "best of 2"):
        assert words in table
    plain = focus.lines_of(tmp_path / "plain.jsonl")
    assert len(plain) == 4 and all(0 < line["cost"] < 1 for line in plain)

    path = tmp_path / "plain.jsonl"
    path.write_text(path.read_text()[:-20])  # its last line is no whole one
    seen.clear()
    focus.main(command)
    assert len(seen) == 1
    again = focus.lines_of(path)
    assert [line["likeness"] for line in again] == pytest.approx([line["likeness"] for line in plain], abs=0.01)
    capsys.readouterr()
