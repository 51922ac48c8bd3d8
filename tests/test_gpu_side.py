"""What a GPU alone brings about, played where there is none: errors of its libraries, budgets, compiled shapes."""

from typing import Any

import pytest
import torch

from benchmarks.memory import Unread
from mmdit import cores
from mmdit.attention import BACKENDS
from mmdit.driver.pipeline import NotFiniteError, Pipeline
from mmdit.driver.settings import Settings
from mmdit.driver.watch import Finite, Stepped
from mmdit.memory.budget import DeviceMemoryError, budget_of, memory_errors
from mmdit.memory.planner import Planner
from mmdit.memory.residency import Mode, Network
from samplers import Step

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
        "CUDA error: out of memory",
    ],
)
def test_libraries_that_run_out_of_memory_are_understood(message: str) -> None:
    words = r"^decode: the device's memory does not suffice"
    with pytest.raises(DeviceMemoryError, match=words) as told, memory_errors("decode"):
        raise RuntimeError(message)
    assert (message in str(told.value)) != ("out of memory" in message)
    other = "cuBLAS error: CUBLAS STATUS EXECUTION FAILED"
    with pytest.raises(RuntimeError, match=other), memory_errors("decode"):
        raise RuntimeError(other)


@pytest.mark.parametrize(
    ("free", "reserved", "budget"),
    [(80e9, 0, 72e9), (3e9, 1e9, 3.5e9), (2.5e9, 0, 2e9), (4e8, 0, 0)],
)
def test_auto_leaves_a_gpu_what_its_libraries_take(
    free: float, reserved: float, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of what is free, at least half a gigabyte."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), int(1e11)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: int(reserved))
    assert budget_of("auto", CUDA) == int(budget)


def test_what_others_of_the_process_have_on_a_gpu_is_not_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there beside the networks that are there, whenever a plan is made; 40 MB for libraries."""
    with torch.device("meta"):
        module = torch.nn.Linear(1000, 9)
    source: Any = Unread(module)
    network = Network("vae", module, source, CUDA)
    network.mode, own = Mode.STAGED, 2 * 9009
    taken = 5000
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: taken)
    planner = Planner({"vae": network}, CUDA, torch.bfloat16)
    assert planner.costs.beside() == 40_000_000 + 5000
    network.here, taken = True, own + 700
    assert planner.costs.beside() == 40_000_000 + 700
    planner.plans = lambda *_: iter(())  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        planner.plan(None, 10**9)  # type: ignore[arg-type]
    assert planner._beside == 40_000_000 + 700
    planner.expect(9000)  # counted once: before it is there, while it comes, and when it is
    for taken in (own + 700, own + 5000, own + 9700, own + 9900):  # it is what memory_allocated gives
        with pytest.raises(AssertionError):
            planner.plan(None, 10**9)  # type: ignore[arg-type]
        assert planner._beside == 40_000_000 + max(9700, taken - own)


def test_only_a_cpu_is_asked_for_its_matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's compiler cannot follow the question, and would cut every block in two."""

    def asked(*_: object) -> bool:
        raise AssertionError

    monkeypatch.setattr(cores, "available", asked)
    q = torch.empty(2, 1024, 3, 64, dtype=torch.bfloat16, device="meta")
    assert BACKENDS["auto"](q, q, q).shape == (2, 1024, 3, 64)
    with pytest.raises(AssertionError):
        BACKENDS["auto"](*[torch.empty(2, 1024, 3, 64, dtype=torch.bfloat16)] * 3)


@pytest.mark.parametrize(("device", "told"), [("cpu", 11), ("cuda", 16)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gpu_is_asked_about_several_steps_at_a_time(device: str, told: int, bad: float) -> None:
    """Latents that are not finite from the eleventh step on; the message names it, whenever that is found."""
    pipe = Pipeline.__new__(Pipeline)
    pipe.device, pipe.dtype = torch.device(device), torch.bfloat16
    for length in (20, 11, 12):
        watcher, fine, settings = Finite(pipe), min(told, length) - 1, Settings(steps=length)
        steps = [torch.full((1, 2), bad if i >= 10 else 1.0) for i in range(length)]
        events = [
            Stepped(settings=settings, index=0, step=Step(i, torch.tensor(0.5), x, x, x)) for i, x in enumerate(steps)
        ]
        other = torch.ones(1, 2)  # a picture drawn beside it is asked about on its own
        for i, event in enumerate(events[:fine]):
            watcher.step(event)
            watcher.step(Stepped(settings=settings, index=1, step=Step(i, torch.tensor(0.5), other, other, other)))
        with pytest.raises(
            NotFiniteError, match=f"^the latents after step 11 of {length}: NaN or infinity; the weights"
        ):
            watcher.step(events[fine])
