"""What is counted, in the text form that Prometheus reads (its exposition format 0.0.4)."""

from collections import defaultdict
from threading import Lock

# Name: its kind and what it is. Of a summary sum and count are kept, no quantiles.
_TOLD = {
    "mmdit_requests_total": ("counter", "requests answered, by route and status"),
    "mmdit_pictures_total": ("counter", "pictures drawn"),
    "mmdit_cancelled_total": ("counter", "pictures let go, by reason"),
    "mmdit_failed_total": ("counter", "pictures that failed"),
    "mmdit_worker_deaths_total": ("counter", "times that the thread that draws was begun anew"),
    "mmdit_texts_total": ("counter", "texts that pictures needed, by who had them: the cache, or the encoders"),
    "mmdit_queue_pictures": ("gauge", "pictures that wait"),
    "mmdit_running_pictures": ("gauge", "pictures that are being drawn"),
    "mmdit_ready": ("gauge", "1 where requests are taken"),
    "mmdit_memory_bytes": ("gauge", "memory of the device, predicted by the plan and held; texts kept on the host"),
    "mmdit_queue_seconds": ("summary", "seconds that pictures waited"),
    "mmdit_step_seconds": ("summary", "seconds of a step of one picture"),
    "mmdit_stage_seconds": ("summary", "seconds of each stage of a batch"),
    "mmdit_step_pictures": ("summary", "pictures that took a step together"),
    "mmdit_batch_pictures": ("summary", "pictures of one drawing, with those that joined"),
    "mmdit_request_seconds": ("summary", "seconds from a request to its answer, by route"),
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Numbers by name and labels; any thread may add."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._values: dict[tuple[str, Labels], float] = defaultdict(float)

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        assert _TOLD[name][0] == "counter"
        with self._lock:
            self._values[name, tuple(labels.items())] += value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one value to a summary."""
        assert _TOLD[name][0] == "summary"
        with self._lock:
            self._values[f"{name}_sum", tuple(labels.items())] += value
            self._values[f"{name}_count", tuple(labels.items())] += 1

    def value(self, name: str, **labels: str) -> float:
        with self._lock:
            return self._values.get((name, tuple(labels.items())), 0.0)

    def text(self, gauges: dict[tuple[str, Labels], float]) -> str:
        """All of it; gauges: what is not counted but so now."""
        with self._lock:
            values = {**self._values, **gauges}
        lines = []
        for name, (kind, told) in _TOLD.items():
            own = {key: value for key, value in values.items() if key[0] in (name, f"{name}_sum", f"{name}_count")}
            lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
            lines += [f"{full}{_braced(labels)} {value:.10g}" for (full, labels), value in own.items()]
        return "\n".join(lines) + "\n"


def _braced(labels: Labels) -> str:
    def plain(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{plain(value)}"' for name, value in labels) + "}" if labels else ""
