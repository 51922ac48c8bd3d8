"""Where a step's time goes, by PyTorch's profiler, for `benchmarks.speed`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from mmdit import attention

LINEAR = ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm", "aten::_scaled_mm", "aten::linear")
MOST = 5  # other operations that are named


def parts(run: Callable[[], object], cuda: bool) -> str:
    """A line: the shares of attention, linear layers, the largest other operations and all the rest.

    On a CPU they are shares of the time that the calling thread takes, waiting for attention's threads included.
    """
    by_name, before = attention.BACKENDS, attention.BACKENDS["auto"]

    def recorded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        with record_function("attention"):
            return before(q, k, v, bias)

    run()
    by_name["auto"] = recorded
    try:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as made:
            run()
            if cuda:
                torch.cuda.synchronize()
    finally:
        by_name["auto"] = before
    return told(own_times(made.events(), cuda))


def own_times(events: Any, cuda: bool) -> dict[str, float]:
    """Of each operation that attention does not call; attention's own with all that it calls."""
    times: dict[str, float] = {}
    events = [event for event in events if event.device_type.name == "CPU"]
    for event in events:
        within, whole = event, False
        while within.cpu_parent is not None and not whole:
            within = within.cpu_parent
            whole = within.name == "attention"
        if whole or event.thread != events[0].thread:
            continue
        name = "attention" if event.name == "attention" else "linear" if event.name in LINEAR else event.name
        total = event.device_time_total if cuda else event.cpu_time_total
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        times[name] = times.get(name, 0.0) + (total if name == "attention" else own)
    return times


def told(times: dict[str, float]) -> str:
    whole = sum(times.values())
    named = sorted(times, key=lambda name: (name not in ("linear", "attention"), -times[name]))[: 2 + MOST]
    shares = {name.removeprefix("aten::"): times[name] / whole for name in named}
    shares["the rest"] = 1 - sum(shares.values())
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
