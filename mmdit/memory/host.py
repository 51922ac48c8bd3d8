"""What the system tells of the host's memory, of which a container may have been given a part."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_ROOT = Path("/")


class _Groups(NamedTuple):
    """Where a version of Linux's control groups keeps what it tells of memory."""

    folder: str
    limits: tuple[str, ...]  # beyond the first a process fails, beyond the second it is slowed down
    used: str
    cache: tuple[str, str]  # in memory.stat: bytes of files that the system drops where memory is wanted


_SECOND = _Groups("sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_FIRST = _Groups(
    "sys/fs/cgroup/memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def own_bytes(process: int | str = "self") -> int:
    """What a process has of its own, files that it maps left out; 0 where the system does not tell."""
    return 1024 * _numbers(f"proc/{process}/status").get("RssAnon", 0)


def available_bytes() -> int | None:
    """What programs may take without harm to others, within the container's limits; None where nothing is told."""
    told = list(_of_groups())
    kilobytes = _numbers("proc/meminfo").get("MemAvailable")
    if kilobytes is not None:
        told.append(1024 * kilobytes)
    elif sys.platform == "darwin":
        told += _of_mac()
    return min(told, default=None)


def _of_groups() -> Iterator[int]:
    """What every group leaves that this process is in, from its own up to the system's.

    Inside a container the own group may be named as the host sees it and lie at the root: names that are not there are
    passed over.
    """
    for line in _text("proc/self/cgroup").splitlines():
        number, controllers, name = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        groups = _SECOND if number == "0" else _FIRST
        path = PurePosixPath(name.lstrip("/"))
        for group in (path, *path.parents):
            folder = f"{groups.folder}/{group}"
            used = _text(f"{folder}/{groups.used}").strip()
            for limit in (_text(f"{folder}/{file}").strip() for file in groups.limits):
                if limit.isdecimal() and used.isdecimal():  # "max" is no limit
                    stat = _numbers(f"{folder}/memory.stat")
                    yield max(0, int(limit) - int(used) + sum(stat.get(kind, 0) for kind in groups.cache))


def _of_mac() -> list[int]:
    """The pages that are free, or will be when they are wanted."""
    try:
        text = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text, re.MULTILINE)
    return [int(size[1]) * sum(map(int, pages))] if size and pages else []


def _numbers(file: str) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split()[:2] for line in _text(file).splitlines())
    return {pair[0].rstrip(":"): int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _text(file: str) -> str:
    try:
        return (_ROOT / file).read_text()
    except (OSError, ValueError):
        return ""
