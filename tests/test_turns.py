"""Several threads at once: they take turns, and leave the process as it was."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sweeps import sampled
from test_attention import draw, written_out
from test_memory import RUNGS
from toys import toy_folder

from mmdit import cores
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.stages import exact_convolutions
from mmdit.kernels.process import Switch

SIZES = [{"width": 48, "height": 32}, {"width": 32, "height": 48, "cfg": 1}, {"width": 32, "height": 32, "steps": 4}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    defaults = {"width": 48, "height": 32, "steps": 3, "cfg": 4.5, "t5_length": 20}
    return toy_folder(tmp_path_factory.mktemp("turns"), defaults=defaults)


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What they give, each in a thread of its own, all begun together."""
    start = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result() for done in [pool.submit(begin, work) for work in works]]


def far(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@pytest.mark.parametrize("modes", sampled(RUNGS, 2))
def test_one_pipeline_in_three_threads(model: Path, modes: dict) -> None:
    """Pictures of three sizes, single and in lists, in every plan: each is the one that it is alone."""
    pipeline = Pipeline.load(model, dtype="fp32", device="cpu")
    expected = [pipeline("a horse", seed=i, **size)[0] for i, size in enumerate(SIZES)]
    plan_for = pipeline.plan_for
    pipeline.plan_for = lambda job: replace(plan_for(job), modes=modes)  # type: ignore[method-assign]

    def single(i: int) -> None:
        for _ in range(3):
            assert far(pipeline("a horse", seed=i, **SIZES[i])[0], expected[i]) <= 1

    def many() -> None:
        for _ in range(2):
            rows = [{"prompt": "a horse", "seed": i, **size} for i, size in enumerate(SIZES)]
            for settings, image in pipeline.draw_many(rows):
                assert far(image, expected[settings.seed]) <= 1

    at_once(lambda: single(0), lambda: single(1), many)


def test_stages_by_hand_beside_a_run(model: Path) -> None:
    """One thread encodes, integrates and decodes by hand while another draws by a streamed plan."""
    pipeline = Pipeline.load(model, dtype="fp32", device="cpu")
    plan_for = pipeline.plan_for
    pipeline.plan_for = lambda job: replace(plan_for(job), modes=RUNGS[-1])  # type: ignore[method-assign]

    @torch.no_grad()
    def by_hand() -> torch.Tensor:
        cond, uncond = (pipeline.encode([text], 20) for text in ("a bear", ""))
        velocity, x = pipeline.velocity(cond, uncond, 4.5), pipeline.noise(96, 64, [0])
        for sigma in (1.0, 0.5):
            x = x - 0.5 * velocity(x, torch.tensor(sigma))
        return pipeline.decode(x)

    expected = [by_hand(), torch.from_numpy(np.array(pipeline("a horse")[0]))]
    for _ in range(3):
        hand, drawn = at_once(by_hand, lambda: pipeline("a horse")[0])
        assert far(hand, expected[0]) <= 1
        assert far(drawn, expected[1]) <= 1


def test_a_list_is_drawn_on_between_others_turns(model: Path) -> None:
    """While one thread holds a picture of its list, another draws; no turn is kept over what a caller does."""
    pipeline = Pipeline.load(model, dtype="fp32", device="cpu")
    pictures = pipeline.draw_many([{"prompt": "a horse", "seed": i, "width": 48 + 16 * i} for i in range(3)])
    seeds = [next(pictures)[0].seed]
    (image,) = at_once(lambda: pipeline("a bear")[0])
    assert far(image, pipeline("a bear")[0]) <= 1
    seeds += [settings.seed for settings, _ in pictures]
    assert sorted(seeds) == [0, 1, 2]


def test_two_pipelines_by_two_attentions(model: Path) -> None:
    """Each computes by its own, whatever the other does meanwhile, in a run and stage by stage."""
    asked: dict[str, set[str]] = {"math": set(), "sdpa": set()}
    pipelines = {}
    for name, seen in asked.items():
        pipelines[name] = pipe = Pipeline.load(model, dtype="fp32", device="cpu", attention=name)
        attn = pipe.transformer.joint_blocks[0].x_block.attn
        attend = attn.attend
        attn.attend = lambda *qkv, a=attend, m=attn, s=seen: s.add(m.backend) or a(*qkv)

    def draw_by(pipe: Pipeline) -> None:
        for _ in range(3):
            pipe("a horse", steps=1)
            velocity = pipe.velocity(pipe.encode(["a horse"], 20))
            velocity(pipe.noise(96, 64, [0]), torch.tensor(0.5))

    at_once(*(lambda p=p: draw_by(p) for p in pipelines.values()))
    assert asked == {"math": {"math"}, "sdpa": {"sdpa"}}


def test_adapters_change_between_turns(model: Path, tmp_path: Path) -> None:
    """While one thread draws, an adapter that another adds waits: no step is computed with half of it."""
    draw_one = torch.Generator().manual_seed(0)
    save_file(
        {
            "transformer.transformer_blocks.0.ff.net.2.lora_A.weight": torch.randn(3, 512, generator=draw_one),
            "transformer.transformer_blocks.0.ff.net.2.lora_B.weight": torch.randn(128, 3, generator=draw_one),
            "transformer.transformer_blocks.1.ff.net.2.lora_A.weight": torch.randn(3, 512, generator=draw_one),
            "transformer.transformer_blocks.1.ff.net.2.lora_B.weight": torch.randn(128, 3, generator=draw_one),
        },
        tmp_path / "a.safetensors",
    )
    pipeline = Pipeline.load(model, dtype="fp32", device="cpu")
    plain = pipeline("a horse", steps=1)[0]
    name = pipeline.adapters.add(tmp_path / "a.safetensors", 0.1).name
    adapted = pipeline("a horse", steps=1)[0]
    pipeline.adapters.remove(name)
    assert far(plain, adapted) > 10

    changed = threading.Event()

    def change() -> None:
        pipeline.adapters.add(tmp_path / "a.safetensors", 0.1)
        changed.set()

    with ThreadPoolExecutor(1) as pool:
        with pipeline.turn:  # as whoever draws has it
            pool.submit(change)
            assert not changed.wait(1)
            assert far(pipeline("a horse", steps=1)[0], plain) == 0
        assert changed.wait(30)
    assert far(pipeline("a horse", steps=1)[0], adapted) == 0


# ---- settings of the process ---------------------------------------------------------------------


def test_a_switch_is_put_back_by_the_last() -> None:
    """Whoever comes and goes in whatever order, and where somebody fails."""
    state = {"value": "before"}
    switch = Switch(lambda: state["value"], lambda value: state.update(value=value), "changed")
    first, second = switch, switch
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert state["value"] == "changed"
    second.__exit__()
    assert state["value"] == "before"
    with pytest.raises(KeyError), switch:
        raise KeyError
    assert state["value"] == "before"


def test_products_are_as_before_after_overlapping_attentions() -> None:
    """Two threads that have products rounded, the first to begin being the first to end."""
    matmul: Any = torch.backends.mkldnn.matmul
    before, inside, second_inside, ended = matmul.fp32_precision, *(threading.Event() for _ in range(3))
    seen: list[str] = []

    def first() -> None:
        with cores.rounded_products:
            inside.set()
            assert second_inside.wait(30)
        seen.append(matmul.fp32_precision)
        ended.set()

    def second() -> None:
        assert inside.wait(30)
        with cores.rounded_products:
            second_inside.set()
            assert ended.wait(30)
            seen.append(matmul.fp32_precision)

    at_once(first, second)
    assert seen == ["bf16", "bf16"]
    assert matmul.fp32_precision == before


@pytest.mark.skipif(not cores.available(torch.device("cpu"), torch.bfloat16), reason="needs bfloat16 in oneDNN")
def test_float32_beside_bfloat16_is_float32(model: Path) -> None:
    """A pipeline that has float32 products rounded for its attention, and one that needs them exact."""
    exact, short = (Pipeline.load(model, dtype=dtype, device="cpu") for dtype in ("fp32", "bf16"))
    trace: dict[str, torch.Tensor] = {}
    settings = replace(exact.settings, prompt="a horse", width=96, height=64)
    exact.run(settings, trace)

    def again() -> list[torch.Tensor]:
        found = []
        for _ in range(4):
            own: dict[str, torch.Tensor] = {}
            exact.run(settings, own)
            found.append(own["latents.2"])
        return found

    def disturb() -> None:
        for _ in range(4):
            short("a horse", attention="cores")

    runs, _ = at_once(again, disturb)
    assert all(torch.equal(run, trace["latents.2"]) for run in runs)


def test_the_users_flags_survive(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages called one by one compute float32 convolutions exactly, and change no other flag of cuDNN's."""
    pipeline, cudnn = Pipeline.load(model, dtype="fp32", device="cpu"), torch.backends.cudnn
    text = pipeline.encode(["a horse"], 20)
    velocity = pipeline.velocity(text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", True)
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    seen: list[tuple[bool, ...]] = []

    def switched() -> bool:
        return cudnn.conv.fp32_precision != "ieee" if hasattr(cudnn, "conv") else cudnn.allow_tf32

    def look(*_: object) -> None:
        seen.append((switched(), cudnn.benchmark, cudnn.deterministic, cudnn.enabled))

    hooks = [
        m.register_forward_pre_hook(look) for m in (pipeline.transformer.x_embedder.proj, pipeline.vae.decoder.conv_in)
    ]
    velocity(pipeline.noise(96, 64, [0]), torch.tensor(0.5))
    pipeline.decode(pipeline.noise(96, 64, [0]))
    for hook in hooks:
        hook.remove()
    assert len(seen) >= 2
    assert set(seen) == {(False, True, True, True)}
    assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == (True, True, True)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has no precision by operation")
@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
def test_convolutions_are_exact_by_the_newer_switch_too(before: str) -> None:
    """Whichever the user set, of PyTorch's two switches, which refuse to be read together."""
    conv = torch.backends.cudnn.conv
    usual = conv.fp32_precision
    try:
        conv.fp32_precision = before
        with exact_convolutions:
            assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == before
    finally:
        conv.fp32_precision = usual


def test_pictures_are_drawn_in_inference_mode() -> None:
    """Attention by cores has threads of its own, and that mode is a thread's own."""
    q, k, v = draw((1, 70, 90, 2, 64), torch.bfloat16, "cpu")
    expected = cores.attend(q, k, v)
    with torch.inference_mode():
        assert torch.equal(cores.attend(q, k, v), expected)
        assert cores.attend(q.clone(), k.clone(), v.clone()).shape == q.shape


@pytest.mark.skipif(not cores.available(torch.device("cpu"), torch.bfloat16), reason="needs bfloat16 in oneDNN")
def test_attention_in_three_threads() -> None:
    """Each result against the formula."""
    inputs = [draw((1, 200 + 10 * i, 300, 2, 64), torch.bfloat16, "cpu") for i in range(3)]
    expected = [written_out(*qkv) for qkv in inputs]

    def several(i: int) -> None:
        for _ in range(5):
            found = cores.attend(*inputs[i]).flatten(2).double()
            assert float((found - expected[i]).norm() / expected[i].norm()) <= 4e-3

    at_once(*(lambda i=i: several(i) for i in range(3)))
