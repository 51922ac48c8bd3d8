"""Files that are there whole or not at all: several that want one name, links, refusals, leftovers."""

import errno
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from PIL import Image

from mmdit.common.files import beside, put, put_new, sweep
from mmdit.driver.output import picture_path, save_image, settings_in, stem
from mmdit.driver.settings import SD35_MEDIUM_DEFAULTS, Settings, identity

ROOT = Path(__file__).parents[1]


def settings(out: Path, **more: object) -> Settings:
    return Settings(**{"prompt": "a horse", "out": str(out), **SD35_MEDIUM_DEFAULTS, **more})  # type: ignore[arg-type]


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (200, 200), (i, i, i))


@pytest.fixture(params=["links", "no links"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that knows hard links, and one that does not."""
    if request.param == "no links":

        def link(*_: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    return request.param


@pytest.mark.usefixtures("disk")
def test_threads_with_one_prompt_and_seed(tmp_path: Path) -> None:
    """Each picture is there, whole, with its own settings; none took another's place."""
    count, start = 8, Barrier(8)

    def save(i: int) -> Path:
        own = settings(tmp_path, steps=i + 1)
        path = picture_path(own)
        start.wait()
        return save_image(picture(i), own, path)

    with ThreadPoolExecutor(count) as threads:
        paths = list(threads.map(save, range(count)))
    names = ["a-horse-0.png", *(f"a-horse-0-{i}.png" for i in range(2, count + 1))]
    assert sorted(path.name for path in paths) == sorted(names) == sorted(os.listdir(tmp_path))
    for i, path in enumerate(paths):
        found = settings_in(path)
        assert found is not None and found.steps == i + 1
        with Image.open(path) as image:
            assert image.convert("RGB").getpixel((0, 0)) == (i, i, i)


def test_processes_with_one_prompt_and_seed(tmp_path: Path) -> None:
    """They all begin at once, each draws by other settings; all of their pictures remain."""
    code = """
import sys
from pathlib import Path
from test_files import picture, picture_path, save_image, settings
own = settings(Path(sys.argv[1]), steps=int(sys.argv[2]))
print(flush=True), sys.stdin.readline()
for _ in range(5):
    save_image(picture(0), own, picture_path(own))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([*command, str(i + 1)], **pipes) for i in range(3)]  # type: ignore[call-overload]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    found = [settings_in(path) for path in (tmp_path / "out").iterdir()]
    assert sorted(s.steps or 0 for s in found if s is not None) == [1] * 5 + [2] * 5 + [3] * 5


@pytest.mark.usefixtures("disk")
def test_a_name_is_taken_once(tmp_path: Path) -> None:
    """Also by a folder, and by a link that leads nowhere."""
    for name, make in {"file": Path.touch, "folder": Path.mkdir, "link": lambda p: p.symlink_to("none")}.items():
        make(tmp_path / name)
        with beside(tmp_path / name) as written:
            written.write_text("new")
            assert not put_new(written, tmp_path / name)
            assert put_new(written, tmp_path / f"{name}-2")
        assert (tmp_path / f"{name}-2").read_text() == "new"
    assert (tmp_path / "file").read_text() == ""
    assert not (tmp_path / "none").exists()
    with beside(tmp_path / "new") as written:
        written.mkdir()
        (written / "x").touch()
        assert not put_new(written, tmp_path / "folder")
        assert put_new(written, tmp_path / "new")
    assert os.listdir(tmp_path / "new") == ["x"]


def test_a_link_that_waits_is_not_followed(tmp_path: Path) -> None:
    """Under the name that partial files had; nobody else can enter the folder that they are written in now."""
    (tmp_path / "victim").write_text("kept")
    (tmp_path / f".{platform.node()}.{os.getpid()}.partial").symlink_to("victim")
    own = settings(tmp_path)
    save_image(picture(0), own, picture_path(own))
    assert (tmp_path / "victim").read_text() == "kept"
    with beside(tmp_path / "x") as written:
        assert written.parent.stat().st_mode & 0o777 == 0o700
    assert oct((tmp_path / "a-horse-0.png").stat().st_mode) == oct((tmp_path / "victim").stat().st_mode)


def fails(written: Path) -> None:
    written.write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def is_broken_off(written: Path) -> None:
    written.mkdir()
    (written / "half").touch()
    raise KeyboardInterrupt


@pytest.mark.parametrize("work", [fails, is_broken_off])
def test_what_fails_leaves_nothing(tmp_path: Path, work: Callable[[Path], None]) -> None:
    with pytest.raises((OSError, KeyboardInterrupt)), beside(tmp_path / "deep" / "er" / "x") as written:
        work(written)
    assert os.listdir(tmp_path) == []


def test_without_links_a_failure_leaves_no_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(os, "replace", full)
    for give in (put_new, put):
        with beside(tmp_path / "x") as written:
            written.touch()
            with pytest.raises(OSError, match="No space left"):
                give(written, tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    """Of this machine's processes that are no more; not of those that live, of other machines, or other files."""
    code = f"""
import os, signal
from pathlib import Path
from mmdit.common.files import beside
with beside(Path({str(tmp_path / "x.png")!r})) as written:
    written.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    ended.wait()
    here = platform.node()
    assert [name.startswith(f".{here}.{ended.pid}.") for name in os.listdir(tmp_path)] == [True]
    (tmp_path / f".{here}.{ended.pid}.partial").touch()  # as earlier versions named them
    stay = [f".{here}.{os.getpid()}.abc.partial", f".elsewhere.{ended.pid}.abc.partial", "a.partial"]
    stay += [f".{here}.{name}.partial" for name in ("x", "9" * 30, f"{2**31}.abc", "-1", "1.5", "²")]
    for name in stay:
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(stay)
    sweep(tmp_path / "none")


def test_a_huge_picture_is_no_picture_of_ours(tmp_path: Path) -> None:
    """Its header alone says so; Pillow refuses to open it."""
    path = save_image(picture(0), settings(tmp_path), tmp_path / "a-horse-0.png")
    raw = path.read_bytes()
    for side in (10_000, 200_000):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + raw[24:29]
        (tmp_path / "x.png").write_bytes(raw[:12] + header + zlib.crc32(header).to_bytes(4, "big") + raw[33:])
        found = settings_in(tmp_path / "x.png")
        assert found is None or side == 10_000


def test_names_tell_prompts_apart() -> None:
    """Letters and digits of every language; a hash where there is none."""
    assert stem(settings(Path(), prompt="Ein Bär, 2 Füße!")) == "ein-bär-2-füße-0"
    assert stem(settings(Path(), prompt="赤い馬 と 熊")) == "赤い馬-と-熊-0"
    assert stem(settings(Path(), prompt="हिन्दी")) == "हिन्दी-0"
    assert stem(settings(Path(), prompt="e\u0301")) == stem(settings(Path(), prompt="é")) == "é-0"
    assert stem(settings(Path(), prompt="a/../b\x1b[31m\u202e\0c")) == "a-b-31m-c-0"
    assert stem(settings(Path(), prompt=" \n")) == "picture-0"
    signs = {stem(settings(Path(), prompt=p)) for p in ("🐴", "🐻", "!!!", "...")}
    assert len(signs) == 4 and all(name.startswith("picture-") for name in signs)
    long = stem(settings(Path(), prompt="馬" * 400, seed=2**64 - 1))
    assert long.startswith("馬" * 40) and len(f"{long}-1000000.png".encode()) <= 255


def test_the_same_picture_has_the_same_identity_after_it_was_saved(tmp_path: Path) -> None:
    own = settings(tmp_path, lora=("a.safetensors:0.5",), cfg_interval="0.2:0.9", weights="abc")
    found = settings_in(save_image(picture(0), own, tmp_path / "x.png"))
    assert found == own and identity(found) == identity(own)
