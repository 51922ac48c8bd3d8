"""A list cut into shards, or shared by claims: by processes that are killed, with rows that kill them."""

import json
import os
import shutil
import signal
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from PIL import Image
from several import alone
from toys import Ran, toy_folder

from mmdit.driver.loop import Drawing, kind
from mmdit.driver.output import is_there, save_image, settings_in
from mmdit.driver.prompts import Folders, line_of, picture_settings
from mmdit.driver.settings import SD35_MEDIUM_DEFAULTS, Settings, identity
from mmdit.parallel import shards
from mmdit.parallel.claimed import Tally, draw_claimed, draw_part
from mmdit.parallel.claims import Claim, Claims, State
from mmdit.parallel.shards import Part, parts_of, shard_of, work
from mmdit.run import main, run_by

DEFAULTS = {"width": 64, "height": 48, "steps": 1, "cfg": 4.5, "t5_length": 20}
LINES: list[dict[str, Any]] = [
    {"prompt": "a horse", "count": 5},
    {"prompt": "a horse", "cfg": 3.0},  # another picture that would have the same name
    {"prompt": "a bear", "width": 32, "count": 6},
    {"prompt": "a fox", "steps": 2, "count": 4, "seed": 7},
    {"prompt": "a horse", "seed": 2},  # again
    {"prompt": "a cat", "seed": 3},
]
NAMES = [f"a-horse-{i}" for i in range(5)] + ["a-horse-0-2", "a-cat-3"]
NAMES += [f"a-bear-{i}" for i in range(6)] + [f"a-fox-{i}" for i in range(7, 11)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return toy_folder(tmp_path_factory.mktemp("claims"), defaults=DEFAULTS)


def options(model: Path, folder: Path, lines: list[dict[str, Any]], *more: str, out: str = "out") -> list[str]:
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = ["--prompts", str(folder / "list.jsonl"), "--model", str(model), "--dtype", "fp32", "--device", "cpu"]
    return [*told, "--out", str(folder / out), *more]


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.png"))


def check_each_once(folder: Path, expected: list[str]) -> None:
    """Whole pictures under exactly these names, no two of them the same, and nothing else."""
    assert names(folder) == sorted(expected)
    shown = [settings_in(path) for path in folder.glob("*.png")]
    assert len({identity(s) for s in shown if s is not None}) == len(expected)
    assert {path.name for path in folder.iterdir() if path.suffix != ".png"} <= {".claims", "failed.jsonl"}


# ---- shards ----------------------------------------------------------------------------------------


def test_shards_are_the_list_with_the_same_names(model: Path, tmp_path: Path) -> None:
    """In any order, some again; each file is as it would be without shards, and says nothing of them."""
    for shard in ("3/3", "1/3", "3/3", "2/3"):
        assert main(options(model, tmp_path, LINES, "--shard", shard)) == 0
    assert main(options(model, tmp_path, LINES, out="whole")) == 0
    check_each_once(tmp_path / "out", NAMES)
    for name in NAMES:
        one, other = (settings_in(tmp_path / out / f"{name}.png") for out in ("out", "whole"))
        assert one is not None and other is not None
        assert replace(one, out="") == replace(other, out="") and one.shard is None


def wanted(*sizes: tuple[int, int, int]) -> list[tuple[Settings, Path | None]]:
    """Of width, steps, number each."""
    usual = {**SD35_MEDIUM_DEFAULTS, "height": 16}
    told = [Settings("x", **{**usual, "width": w, "steps": n}) for w, n, count in sizes for _ in range(count)]
    return [(replace(s, seed=i), Path(f"{i}.png")) for i, s in enumerate(told)]


def test_shards_have_equal_work_and_few_kinds() -> None:
    """Each picture in one; no shard is further from its share than one picture; kinds are cut only where shards end."""
    every = wanted((64, 4, 6), (16, 1, 50), (64, 1, 20), (64, 4, 7), (1024, 28, 3))
    every = every[::3] + every[1::3] + every[2::3]
    whole, most = sum(work(s) for s, _ in every), max(work(s) for s, _ in every)
    for number in (1, 2, 7, 90):
        shards = [shard_of(every, f"{i + 1}/{number}") for i in range(number)]
        assert sorted(s.seed for shard in shards for s, _ in shard) == list(range(len(every)))
        for shard in shards:
            assert abs(sum(work(s) for s, _ in shard) - Fraction(whole, number)) <= most
        assert sum(len({kind(s) for s, _ in shard}) for shard in shards) <= 4 + number - 1
    assert work(replace(every[0][0], cfg=1.0)) * 2 == work(every[0][0])


def test_parts_do_not_depend_on_what_is_there_or_where() -> None:
    every = wanted((64, 4, 20), (16, 1, 44), (64, 1, 100))
    there = [(replace(s, out="/b", device="cpu"), None if s.seed % 3 else path) for s, path in every]
    parts = parts_of([(replace(s, out="/a"), path) for s, path in every], "/a")
    assert [part.name for part in parts] == [part.name for part in parts_of(there, "/c/../b")]
    assert len({part.name for part in parts}) == len(parts) == 10 + 22 + 50
    assert all(len({kind(s) for s, _ in part.pictures}) == 1 and len(part.pictures) == 2 for part in parts)
    assert {part.name for part in parts_of(every, "/a")}.isdisjoint(part.name for part in parts)  # they go elsewhere
    assert {len(part.pictures) for part in parts_of(every[:100], "")} == {1}  # of a short list


def test_names_are_those_of_the_beginning(tmp_path: Path) -> None:
    """Whatever part of a list is there, the rest gets the names that it had before."""
    some = Settings("a horse", **SD35_MEDIUM_DEFAULTS, out=str(tmp_path))
    every = [replace(some, cfg=float(i)) for i in range(6)]
    Image.new("RGB", (8, 8)).save(tmp_path / "a-horse-0-3.png")  # of somebody else
    first = Folders().placed(every)
    for i in (4, 1, 3, 0):
        s, path = first[i]
        assert path is not None and save_image(Image.new("RGB", (8, 8)), s, path) == path
        again = Folders().placed(every)
        assert all(now == then or now[1] is None for now, then in zip(again, first))


def test_names_given_while_another_writes(tmp_path: Path) -> None:
    """What came since the folder was looked at is seen; the names stay those of the beginning."""
    some = Settings("a horse", **SD35_MEDIUM_DEFAULTS, out=str(tmp_path))
    one, two, three = (replace(some, cfg=float(i)) for i in range(3))
    folders = Folders()
    assert folders.place(one) == tmp_path / "a-horse-0.png"
    save_image(Image.new("RGB", (8, 8)), two, tmp_path / "a-horse-0-2.png")
    assert folders.place(two) is None and folders.place(three) == tmp_path / "a-horse-0-3.png"


# ---- claims ----------------------------------------------------------------------------------------


def test_a_claim_has_one_owner_until_it_is_late(tmp_path: Path) -> None:
    first, second, third = (Claims(tmp_path, patience) for patience in (1000, 10, 10))
    claim = first.take("x")
    assert isinstance(claim, Claim) and claim.tries == 1
    assert second.take("x") is first.take("x") is State.BUSY
    renewed = claim.path.stat().st_mtime
    os.utime(claim.path, (renewed - 900, renewed - 900))
    assert second.take("x") is State.BUSY  # by the owner's patience, not by one's own
    os.utime(claim.path, (renewed - 1100, renewed - 1100))
    taken = second.take("x")
    assert isinstance(taken, Claim) and taken.tries == 2
    assert third.take("x") is State.BUSY  # the number counts, not the old claim
    assert not claim.begin(0) and taken.begin(0)  # its first owner is told
    os.utime(taken.path, (0, 0))
    last = third.take("x")
    assert isinstance(last, Claim) and (last.tries, last.begun_before()) == (3, {0})
    with third.holding(last):
        pass
    assert first.take("x") is second.take("x") is State.DONE
    assert not list((tmp_path / ".claims").glob("*.claim"))
    assert not taken.begin(1) and not list((tmp_path / ".claims").glob("*.claim"))


def test_a_part_is_not_done_when_it_is_lost(tmp_path: Path) -> None:
    """An owner that slept, and draws one by one, leaves it to whoever took it over; nobody leaves before that one."""
    pictures = [(replace(s, out=str(tmp_path)), tmp_path / f"{s.seed}.png") for s, _ in wanted((16, 1, 3))]
    slow, other, third = (Claims(tmp_path, 10) for _ in range(3))
    part, drawn, taken = Part("x", [*pictures]), list[int](), list[Any]()
    slow.claim_path("x", 1).touch()
    os.utime(slow.claim_path("x", 1), (0, 0))
    second = slow.take("x")
    assert isinstance(second, Claim)

    def draw(some: Any) -> None:
        drawn.append(some[0][0].seed)
        if len(drawn) == 1:  # it sleeps while it draws
            second.abandon()
            taken.append(other.take("x"))
        save_image(Image.new("RGB", (8, 8)), *some[0])

    assert not draw_part(second, part, str(tmp_path), draw, Tally())
    assert drawn == [0] and third.take("x") is State.BUSY
    assert draw_part(taken[0], part, str(tmp_path), draw, Tally())
    assert drawn == [0, 1, 2] and third.take("x") is State.DONE
    assert not list((tmp_path / ".claims").glob("*.claim"))


def test_whoever_wakes_after_the_sweep_goes_on(tmp_path: Path) -> None:
    claims = Claims(tmp_path, 10)
    claim = claims.take("x")
    assert isinstance(claim, Claim)
    shutil.rmtree(tmp_path / ".claims")
    claim.done()
    assert claims.take("x") is State.DONE
    shutil.rmtree(tmp_path / ".claims")
    assert claims.take("x") is State.BUSY and isinstance(claims.take("x"), Claim)


def test_nothing_is_given_up_when_nobody_reads(tmp_path: Path) -> None:
    """A closed pipe, as of `head`: the process ends, and what it had is free."""
    pictures = [(replace(s, out=str(tmp_path)), tmp_path / f"{s.seed}.png") for s, _ in wanted((16, 1, 3))]
    with Claims(tmp_path, 100) as claims, pytest.raises(BrokenPipeError):
        draw_claimed([*pictures], str(tmp_path), claims, Mock(side_effect=BrokenPipeError), Tally())
    assert not (tmp_path / ".claims").exists()


def test_to_look_for_what_is_not_there_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdit.driver.output.time.sleep", pytest.fail)
    for out in (tmp_path, tmp_path / "x.png"):
        assert not is_there(Settings("x", **SD35_MEDIUM_DEFAULTS, out=str(out)), tmp_path / "x.png")


def test_an_owner_that_wrote_nothing_is_late_as_well(tmp_path: Path) -> None:
    claims = Claims(tmp_path, 10)
    (tmp_path / ".claims" / "x.1.claim").touch()
    assert claims.take("x") is State.BUSY
    os.utime(tmp_path / ".claims" / "x.1.claim", (0, 0))
    assert isinstance(claims.take("x"), Claim)


@pytest.mark.parametrize(("error", "tries"), [(KeyboardInterrupt(), 1), (RuntimeError(), 2)])
def test_what_is_broken_off_can_be_had_at_once(tmp_path: Path, error: BaseException, tries: int) -> None:
    """An interrupt was no try; what ended the process was one."""
    claims, other = Claims(tmp_path, 1000), Claims(tmp_path, 1000)
    claim = claims.take("x")
    assert isinstance(claim, Claim)
    with pytest.raises(type(error)), claims.holding(claim):
        raise error
    again = other.take("x")
    assert isinstance(again, Claim) and again.tries == tries


def test_what_was_done_before_the_look_is_not_believed(tmp_path: Path) -> None:
    """Pictures may have been removed since."""
    claims = Claims(tmp_path, 1000)
    claims.done_path("x").touch()
    os.utime(claims.done_path("x"), (claims.since - 1, claims.since - 1))
    assert isinstance(claims.take("x"), Claim)


def test_the_last_one_sweeps(tmp_path: Path) -> None:
    with Claims(tmp_path, 1000):
        with Claims(tmp_path, 1000) as claims:
            for path in (claims.done_path("x"), claims.claim_path("x", 1), tmp_path / ".claims" / "dead.clock"):
                path.touch()
            os.utime(tmp_path / ".claims" / "dead.clock", (0, 0))
        assert claims.done_path("x").exists()
    assert not (tmp_path / ".claims").exists()


def test_a_picture_of_two_is_written_once(tmp_path: Path) -> None:
    """By whoever comes first; another picture goes beside it, and without `once` each is a new one."""
    s, image = Settings("a horse", **SD35_MEDIUM_DEFAULTS, out=str(tmp_path)), Image.new("RGB", (8, 8))
    path = tmp_path / "a-horse-0.png"
    assert save_image(image, s, path, once=True) == path
    assert save_image(image, replace(s, device="cpu"), path, once=True) is None
    other = save_image(image, replace(s, cfg=1.0), path, once=True)
    assert other == tmp_path / "a-horse-0-2.png"
    assert save_image(image, replace(s, cfg=1.0), path, once=True) is None
    assert save_image(image, s, path) == tmp_path / "a-horse-0-3.png"


# ---- processes that die ----------------------------------------------------------------------------


def deadly(rank: int) -> None:
    """A wolf kills every process that begins it; process 0 is killed by its third picture, if it comes to that."""
    begin, begun = Drawing._begin, []

    def dying(self: Drawing, alike: Any, start: Any, texts: Any, index: int) -> Any:
        begun.append(index)
        if "wolf" in alike[index].prompt or (rank == 0 and len(begun) == 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(self, alike, start, texts, index)

    Drawing._begin = dying  # type: ignore[method-assign]


def test_four_share_a_list_and_some_are_killed(model: Path, tmp_path: Path) -> None:
    """None lost, none twice; the row that kills is given up after two of them, and listed."""
    wolf = {"prompt": "a wolf", "seed": 5, "steps": 2}
    told = options(model, tmp_path, [*LINES[:3], wolf, *LINES[3:]], "--claim", "4")
    ran = alone(4, told, deadly)
    assert ran.count(None) in (2, 3), ran  # how many pictures process 0 comes to is up to the others
    assert all(one is None or (one.code == 0 and "; 1 are in " in one.errors[-2]) for one in ran), ran
    check_each_once(tmp_path / "out", NAMES)
    (line,) = map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text().splitlines())
    assert {name: line[name] for name in wolf} == wolf and "died, twice" in line["error"]
    assert [path.suffix for path in (tmp_path / "out" / ".claims").iterdir()] == [".failed"]
    # It is not tried again, as long as that is there; the rest of the list is whole.
    (again,) = alone(1, told, deadly)
    assert again.code == 0 and again.lines == []
    assert "0 written; 18 were there; 1 by others or given up; 1 are in" in again.errors[0]


class BrokenError(Exception):
    pass


def test_errors_of_a_row_are_its_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others of its part are drawn; a list of what failed can be drawn as it is."""
    begin, fails = Drawing._begin, True

    def failing(self: Drawing, alike: Any, start: Any, texts: Any, index: int) -> Any:
        if fails and alike[index].seed in (3, 5):
            raise BrokenError("it broke")
        return begin(self, alike, start, texts, index)

    monkeypatch.setattr(Drawing, "_begin", failing)
    monkeypatch.setattr(shards, "_PARTS", 2)
    lines = [{"prompt": "a bear", "count": 9, "width": 16, "height": 16}]  # in three parts
    assert main(options(model, tmp_path, lines, "--claim", "5")) == 0
    check_each_once(tmp_path / "out", [f"a-bear-{i}" for i in range(9) if i not in (3, 5)])
    failed = list(map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text().splitlines()))
    assert sorted(line["seed"] for line in failed) == [3, 5] and failed[0]["error"] == "BrokenError: it broke"
    fails = False
    told = options(model, tmp_path, failed)
    assert main(told) == 0
    check_each_once(tmp_path / "out", [f"a-bear-{i}" for i in range(9)])


def test_a_line_of_failures_asks_for_the_same_picture() -> None:
    s = Settings("a horse", **{**SD35_MEDIUM_DEFAULTS, "cfg": 2.0}, seed=4, also=("x:0.5",), out="y", device="cpu")
    line = json.loads(json.dumps(line_of(s, "y")))
    assert line.keys() == {"prompt", "seed", "also", *SD35_MEDIUM_DEFAULTS}
    assert identity(picture_settings({**line, "error": "it broke"}, Settings())) == identity(s)
    assert line_of(s, "z")["out"] == "y"


def test_a_machine_that_fails_at_everything_ends(tmp_path: Path) -> None:
    pictures = [(replace(s, out=str(tmp_path)), tmp_path / f"{s.seed}.png") for s, _ in wanted((16, 1, 100))]

    def draw(_: Any) -> None:
        raise BrokenError("it broke")

    tally = Tally()
    with Claims(tmp_path, 100) as claims, pytest.raises(ValueError, match="16 pictures in a row failed"):
        draw_claimed(pictures, str(tmp_path), claims, draw, tally)
    assert len(tally.failed) == 16


def test_a_full_disk_is_no_fault_of_the_rows(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The process ends, and whoever comes next draws what is left."""
    told = options(model, tmp_path, LINES, "--claim", "100")
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(Image.Image, "save", full)
        assert main(told) == 2
    assert "No space left" in capsys.readouterr().err
    assert main(told) == 0
    check_each_once(tmp_path / "out", NAMES)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--shard", "0/8"], "shard is '0/8': expected I/N with I from 1 to N"),
        (["--shard", "9/8"], "shard is '9/8'"),
        (["--shard", "1"], "shard is '1'"),
        (["--claim", "0"], "claim is 0: expected a whole number from 1"),
        (["--ray", "auto", "--ray-actors", "2:1"], "ray_actors is '2:1': expected LEAST:MOST"),
        (["--ray-cores", "2"], "are for --ray"),
    ],
)
def test_mistakes(tmp_path: Path, more: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--prompts", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out"), *more]
    (tmp_path / "list.txt").write_text("a horse")
    assert ran(told, capsys).code == 2
    said = ran(told, capsys).errors
    assert len(said) == 1 and error in said[0] and not (tmp_path / "out").exists()


def test_a_mistake_in_a_line_leaves_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = options(model, tmp_path, [{"prompt": "a horse", "width": 47}], "--claim", "9", out="new/out")
    assert ran(told, capsys).code == 2 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("more", [["--shard", "1/2"], ["--claim", "9"], ["--ray", "auto"], ["--ray-actors", "1:2"]])
def test_they_are_for_lists(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = ran(["a horse", *more], capsys)
    assert code == 2 and f"{more[0]} is for a list: expected --prompts FILE" in said[0]


def test_torchrun_and_claims_are_two_ways(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a horse")
    settings = Settings(prompts=str(tmp_path / "list.txt"), claim=9, out=str(tmp_path))
    ranks: Any = object()
    with pytest.raises(ValueError, match="expected no torchrun"):
        run_by(settings, ranks)


def ran(words: list[str], capsys: pytest.CaptureFixture[str]) -> Ran:
    try:
        code = main(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return Ran(code, captured.out.splitlines(), captured.err.splitlines())
