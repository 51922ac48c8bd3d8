"""What the driver has done by others: pages locked, memory given back, faster layers laid; each as the plan says."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from played_gpu import Gpu
from torch import Tensor

from mmdit import Pipeline
from mmdit.kernels import onednn
from mmdit.memory.residency import Mode
from vae import decode_in_strips


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(device="cpu")


@pytest.mark.parametrize("locked", [0, 1000])
def test_decoding_locks_pages_only_where_the_plan_says_so(
    locked: int, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[bool] = []
    Gpu().play(monkeypatch)

    def decoded(vae: Any, latents: Tensor, rows: int, where: str, pin: bool) -> Tensor:
        pinned.append(pin)
        return decode_in_strips(vae, latents, rows, where, False)

    monkeypatch.setattr("mmdit.driver.stages.decode_in_strips", decoded)
    monkeypatch.setattr(pipeline, "plan", replace(pipeline.plan, locked=locked))
    pipeline.decode(pipeline.noise(64, 64, [0]))
    assert pinned == [locked > 0]


def test_strips_decoded_by_hand_leave_nothing_page_locked(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a played GPU; from one picture to the next of a drawing it stays."""
    gpu, taken, decode, plan = Gpu(), [], pipeline.decode, pipeline.planner.plan
    gpu.play(monkeypatch)

    def decoded(vae: Any, latents: Tensor, rows: int, where: str, pin: bool) -> Tensor:
        assert pin
        gpu.empty(1000, pin_memory=True)  # which is cached as soon as nobody has it
        return decode_in_strips(vae, latents, rows, where, False)

    def seen(*given: Any) -> Tensor:
        pixels = decode(*given)
        taken.append(gpu.taken)
        return pixels

    monkeypatch.setattr("mmdit.driver.stages.decode_in_strips", decoded)
    monkeypatch.setattr(pipeline.planner, "plan", lambda *given: replace(plan(*given), locked=1000))
    monkeypatch.setattr(pipeline, "decode", seen)
    pipeline("a horse", width=64, height=64, steps=1, count=2)
    pipeline.decode(pipeline.noise(64, 64, [0]))
    assert taken == [1024, 1024, 0]


def test_a_network_that_leaves_gives_its_memory_back(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.device] = []
    monkeypatch.setattr("mmdit.memory.residency.give_back", given.append)
    for name in ("vae", "transformer"):
        pipeline.residency.use(name)
    given.clear()
    network = pipeline.residency.networks["transformer"]
    monkeypatch.setattr(network, "mode", Mode.STAGED)
    network.leave()
    network.leave()
    assert given == [network.device]


def test_a_pipeline_on_a_cpu_has_the_faster_linear_layers(pipeline: Pipeline) -> None:
    layers = [m for m in pipeline.transformer.modules() if type(m) is torch.nn.Linear]
    assert layers
    assert {vars(m)["forward"].__func__ for m in layers} == {onednn.linear}
