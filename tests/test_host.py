"""What the system tells of memory: its own, a container's, another device's; and what budgets make of it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmdit.common.errors import SettingsError
from mmdit.memory import devices, host
from mmdit.memory.budget import budget_of
from mmdit.memory.devices import free_bytes, give_back, indexed, lockable_bytes, taken_bytes

CPU, METAL = torch.device("cpu"), torch.device("mps")
MB = 2**20


class Files:
    """A tree of files as Linux shows it, empty at first."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def system(self, available: int) -> None:
        self.write("proc/meminfo", f"MemTotal: 99999999 kB\nMemFree: 1000 kB\nMemAvailable: {available // 1024} kB\n")
        self.write("proc/self/status", "Name:\tpython\nVmRSS:\t  900 kB\nRssAnon:\t  100 kB\nRssFile:\t  800 kB\n")

    def second(self, group: str, limit: str, used: int, *cache: int) -> None:
        """A group of version 2; cache: of files that were used once, and more often."""
        folder = f"sys/fs/cgroup/{group}"
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.current", f"{used}\n")
        kinds = zip(("inactive_file", "active_file"), cache or (0, 0))
        self.write(f"{folder}/memory.stat", "anon 7\nfile 99\n" + "".join(f"{k} {n}\n" for k, n in kinds))

    def first(self, group: str, limit: int, used: int, *cache: int) -> None:
        """A group of version 1; without `total_` its numbers leave out the groups below."""
        folder = f"sys/fs/cgroup/memory/{group}"
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{used}\n")
        kinds = zip(("total_inactive_file", "total_active_file"), cache or (0, 0))
        own = "cache 5\ninactive_file 3\nactive_file 3\n"
        self.write(f"{folder}/memory.stat", own + "".join(f"{k} {n}\n" for k, n in kinds))


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Files]:
    monkeypatch.setattr(host, "_ROOT", tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    return Files(tmp_path)


# ---- the system ----------------------------------------------------------------------------------


def test_a_system_that_tells_nothing(files: Files) -> None:
    """Half of the physical memory is for a computation on the CPU, and page-locking is tried."""
    assert (host.available_bytes(), host.own_bytes()) == (None, 0)
    assert free_bytes(CPU) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    assert lockable_bytes() > 2**60
    files.write("proc/meminfo", "MemAvailable: many kB\nnothing\n")
    files.write("proc/self/cgroup", "0::/\n")
    assert host.available_bytes() is None


def test_a_system_without_groups(files: Files) -> None:
    files.system(4000 * MB)
    assert (host.available_bytes(), host.own_bytes()) == (4000 * MB, 100 * 1024)
    assert free_bytes(CPU) == 4000 * MB + 100 * 1024
    assert lockable_bytes() == 2000 * MB
    assert lockable_bytes(held=100) == 2000 * MB + 50
    assert budget_of("auto", CPU) == int(0.9 * (4000 * MB + 100 * 1024))


@pytest.mark.usefixtures("files")
def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages that are free and those that can be had without writing anything."""
    told = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:            1000.\n"
        "Pages active:          9000.\nPages inactive:         200.\nPages speculative:       30.\n"
        "Pages wired down:      5000.\nPages purgeable:          4.\n"
    )
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told))
    assert host.available_bytes() == 1234 * 16384

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert host.available_bytes() is None


# ---- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GB", 4 * 10**9), ("1.5GiB", 3 * 2**29), ("900 mb", 9 * 10**8), ("512M", 512 * 10**6), (".5T", 5 * 10**11)],
)
def test_budgets(text: str, count: int) -> None:
    assert budget_of(text, CPU) == count


@pytest.mark.parametrize("text", ["", "4", "GB", "-4GB", "4 apples", "1e3MB", "nanGB"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^memory is .*: expected a size such as 4GB or 900MB, or auto$"):
        budget_of(text, CPU)


# ---- containers ----------------------------------------------------------------------------------


def test_a_container_of_version_2(files: Files) -> None:
    """Which sees itself as the root; what it holds of files would go where memory is wanted."""
    files.system(4000 * MB)
    files.write("proc/self/cgroup", "0::/\n")
    files.second(".", str(1000 * MB), 700 * MB, 300 * MB, 100 * MB)
    assert host.available_bytes() == (1000 - 700 + 300 + 100) * MB
    assert lockable_bytes() == 350 * MB
    assert budget_of("auto", CPU) == int(0.9 * (700 * MB + 100 * 1024))
    files.system(600 * MB)
    assert host.available_bytes() == 600 * MB


def test_groups_within_groups(files: Files) -> None:
    """The tightest counts, wherever it is; "max" is none."""
    files.system(4000 * MB)
    files.write("proc/self/cgroup", "0::/user.slice/job/step\n")
    files.second("user.slice/job/step", "max", 10 * MB)
    files.second("user.slice/job", str(900 * MB), 100 * MB)
    files.second("user.slice", str(2000 * MB), 500 * MB)
    files.second("elsewhere", str(1 * MB), 0)
    assert host.available_bytes() == 800 * MB
    files.second("user.slice", str(2000 * MB), 1900 * MB, 50 * MB, 0)
    assert host.available_bytes() == 150 * MB
    files.second("user.slice/job/step", str(20 * MB), 10 * MB)
    assert host.available_bytes() == 10 * MB
    files.second("user.slice/job/step", str(20 * MB), 30 * MB)
    assert host.available_bytes() == 0


@pytest.mark.parametrize("group", ["docker/4f5e", ""])
def test_a_container_of_version_1(files: Files, group: str) -> None:
    """Named as the host sees it, though its own files lie at the root; without a limit the number is huge."""
    files.system(4000 * MB)
    lines = (
        "12:cpu,cpuacct:/docker/4f5e", "5:memory:/docker/4f5e", "1:name=systemd:/docker/4f5e", "0::/docker/4f5e"
    )  # fmt: skip
    files.write("proc/self/cgroup", "\n".join(lines))
    files.first(group, 1000 * MB, 700 * MB, 200 * MB, 50 * MB)
    assert host.available_bytes() == 550 * MB
    files.first(group, 9223372036854771712, 700 * MB)
    assert host.available_bytes() == 4000 * MB


# ---- other devices -------------------------------------------------------------------------------


def test_metal_is_asked_what_is_free(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is the host's: what is recommended may long be taken by others."""
    metal = SimpleNamespace(
        recommended_max_memory=lambda: 16 * MB, driver_allocated_memory=lambda: 3 * MB,
        current_allocated_memory=lambda: 2 * MB,
    )  # fmt: skip
    monkeypatch.setattr(torch, "mps", metal)
    assert free_bytes(METAL) == 16 * MB
    files.system(4 * MB)
    assert free_bytes(METAL) == 7 * MB
    assert budget_of("auto", METAL) == int(0.9 * 7 * MB)
    files.system(400 * MB)
    assert free_bytes(METAL) == 16 * MB
    assert taken_bytes(METAL) == 2 * MB


@pytest.mark.parametrize("name", ["cpu", "cuda", "mps"])
def test_memory_goes_back_where_it_is_the_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(devices, "trim", lambda: done.append("cpu"))
    for each in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, each), "empty_cache", lambda each=each: done.append(each))
    give_back(torch.device(name))
    assert done == [name]


def test_a_gpu_has_a_number_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now: Any = 3
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now)
    assert indexed(torch.device("cuda")) == torch.device("cuda", 3)
    assert indexed(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert (indexed(CPU), indexed(torch.device("mps"))) == (CPU, torch.device("mps", 0))


def test_a_group_that_slows_its_processes_down_counts_as_a_limit(files: Files) -> None:
    """systemd's MemoryHigh and what Kubernetes sets: beyond it a process waits for memory."""
    files.system(900 * MB)
    files.write("proc/self/cgroup", "0::/a\n")
    files.second("a", "500000000", 100 * MB)
    before = free_bytes(CPU)
    files.write("sys/fs/cgroup/a/memory.high", f"{300 * MB}\n")
    assert free_bytes(CPU) == 200 * MB + 100 * 1024 < before
    files.write("sys/fs/cgroup/a/memory.high", "max\n")
    assert free_bytes(CPU) == before
