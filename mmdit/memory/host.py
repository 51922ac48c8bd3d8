"""What the system tells of the host's memory."""

from pathlib import Path


def own_bytes(process: int | str = "self") -> int:
    """What a process has of its own, files that it maps left out; 0 where the system does not tell."""
    return _told(f"/proc/{process}/status", "RssAnon") or 0


def available_bytes() -> int | None:
    """What programs may take without harm to others; None where the system does not tell."""
    return _told("/proc/meminfo", "MemAvailable")


def _told(file: str, name: str) -> int | None:
    try:
        lines = Path(file).read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
    except (OSError, StopIteration, ValueError):
        return None
