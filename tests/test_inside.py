"""Captured tensors, attention, lenses, ablations and patches, under every plan, against what they are by definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sweeps import sampled
from torch import Tensor

from mmdit import Pipeline
from mmdit.common.errors import SettingsError
from mmdit.inside import ablate, capture, patch
from mmdit.memory.residency import Mode

ASKED = {"prompt": "a horse", "width": 64, "height": 64, "steps": 2, "seed": 3}


def loaded(mode: Mode = Mode.RESIDENT, **keywords: Any) -> Pipeline:
    pipe = Pipeline.load(dtype="fp32", device="cpu", **keywords)
    modes = dict.fromkeys(pipe.residency.networks, Mode.STAGED) | {"transformer": mode}
    pipe.planner.ladder = lambda: [modes]  # pyright: ignore[reportAttributeAccessIssue]
    job = pipe.job(pipe.settings.resolved(pipe.defaults))
    pipe.follow(pipe.plan_for(job), job)
    return pipe


def drawn(pipe: Pipeline, **keywords: Any) -> dict[str, Tensor]:
    trace: dict[str, Tensor] = {}
    pipe.run(pipe.asked({**ASKED, **keywords}), trace)
    return trace


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return loaded()


def near(a: Tensor, b: Tensor, most: float = 1e-5) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= most * float(b.norm())


@pytest.mark.parametrize("mode", list(Mode))
def test_tokens_and_parts_add_up(mode: Mode) -> None:
    """A block's tokens are those before it and what its parts add, each through its gate; the picture stays."""
    pipe = loaded(mode)
    plain = drawn(pipe)
    with capture(pipe.transformer, ("x", "context", "attn", "attn2", "mlp", "modulation")) as seen:
        found = drawn(pipe)
    assert torch.equal(plain["latents.1"], found["latents.1"])
    depth = pipe.transformer.config.depth
    assert sorted(seen["x"]) == [(step, block) for step in range(2) for block in range(depth)]
    assert {block for _, block in seen["attn2"]} == set(pipe.transformer.config.dual_attention_blocks)
    for step, block in sorted(seen["x"]):
        if block == 0:
            continue
        gates = seen["modulation"][step, block]
        expected = seen["x"][step, block - 1] + gates[2] * seen["attn"][step, block]
        if (step, block) in seen["attn2"]:
            expected = expected + gates[8] * seen["attn2"][step, block]
        assert near(expected + gates[5] * seen["mlp"][step, block], seen["x"][step, block])
    assert drawn(pipe)["latents.1"].equal(plain["latents.1"])
    assert len(seen["x"]) == 2 * depth  # nothing more is kept after it


def test_attention_is_that_of_the_formula(pipe: Pipeline) -> None:
    """From queries and keys seen by hooks; rows of patches add up to one; words and patches agree where they meet."""
    block: Any = pipe.transformer.joint_blocks[1]
    at: dict[str, Tensor] = {}
    handles = []
    for stream in ("context_block", "x_block"):
        for name in ("ln_q", "ln_k"):
            module = block.get_submodule(f"{stream}.attn.{name}")
            see: Any = lambda _, __, out, key=f"{stream}.{name}": at.update({key: out})  # noqa: E731
            handles.append(module.register_forward_hook(see))
    tokens: Any = {"words": (0, 2), "patches": (3, 9), "texts": (1, 4, 5)}
    with capture(pipe.transformer, ("attention",), blocks=(1, 4), **tokens) as seen:
        drawn(pipe)
    q, k = (torch.cat([at[f"context_block.{n}"], at[f"x_block.{n}"]], dim=1).double() for n in ("ln_q", "ln_k"))
    table = (torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    text = at["context_block.ln_q"].shape[1]
    words, patches = seen["words"][1, 1].double(), seen["patches"][1, 1].double()
    assert near(words, table[:, :, text:, [0, 2]])
    assert near(seen["texts"][1, 1].double(), table[:, :, [1, 4, 5]])
    assert seen["texts"].keys() == {(0, 1), (1, 1)} and seen["words"].keys() > {(1, 4)}  # the last text asks nothing
    assert near(patches, table[:, :, [text + 3, text + 9]])
    assert near(patches.sum(-1), torch.ones_like(patches[..., 0]))
    assert block.x_block.attn.backend == "auto"
    for handle in handles:
        handle.remove()


def test_compiled_blocks_are_seen_too() -> None:
    from dataclasses import replace

    from mmdit.config import TOY
    from mmdit.kernels.compiled import compile_blocks
    from mmdit.model import MMDiT

    torch.manual_seed(0)
    model, given = (
        MMDiT(replace(TOY, depth=1)).eval(),
        (torch.randn(1, 16, 8, 8), torch.ones(1), torch.randn(1, 5, 256)),
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    found = []
    with torch.no_grad():
        for _ in range(2):
            with capture(model, ("attention", "mlp", "lens"), words=(1,)) as seen:
                model(*given, torch.randn(1, 192, generator=torch.Generator().manual_seed(0)))
            found.append(seen)
            compile_blocks(model, backend="eager")
    assert found[0].keys() == found[1].keys() == {"words", "mlp", "lens"}
    assert all(near(found[1][name][key], value) for name, values in found[0].items() for key, value in values.items())


def test_attention_in_pieces_is_the_whole(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for scores in (1 << 24, 70):
        monkeypatch.setattr("mmdit.inside._SCORES", scores)
        with capture(pipe.transformer, ("attention",), words=(1,)) as seen:
            drawn(pipe)
        found.append(seen["words"])
    assert all(near(value, found[1][key]) for key, value in found[0].items())


def test_the_lens_of_the_last_block_is_the_velocity(pipe: Pipeline) -> None:
    with capture(pipe.transformer, ("lens",)) as seen:
        trace = drawn(pipe)
    depth, cfg = pipe.transformer.config.depth, pipe.defaults["cfg"]
    for step in range(2):
        cond, uncond = seen["lens"][step, depth - 1].split(1)
        assert near(uncond + cfg * (cond - uncond), trace[f"velocity.{step}"])
        assert not near(seen["lens"][step, 0], seen["lens"][step, depth - 1], 0.1)


PARTS: dict[str, Callable[[Any], None]] = {
    "joint_blocks.1.x_block.mlp": lambda model: zero(model.joint_blocks[1].x_block.mlp.fc2),
    "joint_blocks.2.x_block.attn": lambda model: zero(model.joint_blocks[2].x_block.attn.proj),
    "joint_blocks.0.context_block.attn": lambda model: zero(model.joint_blocks[0].context_block.attn.proj),
}


def zero(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mode", sampled([Mode.STREAMED, Mode.RESIDENT], 2))
def test_a_part_of_zero_is_one_whose_weights_are_zero(part: str, mode: Mode) -> None:
    pipe, truth = loaded(mode), Pipeline.load(dtype="fp32", editable=True, device="cpu")
    plain = drawn(pipe)
    PARTS[part](truth.transformer)
    with ablate(pipe.transformer, part):
        found = drawn(pipe)
    assert near(found["latents.1"], drawn(truth)["latents.1"])
    assert not near(found["latents.1"], plain["latents.1"], 1e-3)
    assert torch.equal(drawn(pipe)["latents.1"], plain["latents.1"])


def test_heads_are_columns_of_the_projection(pipe: Pipeline) -> None:
    truth = Pipeline.load(dtype="fp32", editable=True, device="cpu")
    block: Any = truth.transformer.joint_blocks[1]
    size = block.x_block.attn.head_size
    with torch.no_grad():
        block.x_block.attn.proj.weight[:, 2 * size : 3 * size] = 0
    with ablate(pipe.transformer, "joint_blocks.1.x_block.attn", heads=(2,)):
        assert near(drawn(pipe)["latents.1"], drawn(truth)["latents.1"])


def test_a_block_left_out_gives_on_what_it_was_given(pipe: Pipeline) -> None:
    with ablate(pipe.transformer, "joint_blocks.3"), capture(pipe.transformer, ("x", "context"), (2, 3)) as seen:
        drawn(pipe)
    assert seen["x"].keys() == {(step, block) for step in range(2) for block in (2, 3)}
    assert all(torch.equal(seen[n][s, 2], seen[n][s, 3]) for n in ("x", "context") for s in range(2))


def test_a_mean_is_the_mean_and_a_function_is_called_with_its_step(pipe: Pipeline) -> None:
    part, steps = "joint_blocks.1.x_block.mlp", []

    def half(step: int, value: Tensor) -> Tensor:
        steps.append(step)
        return 0.5 * value

    with capture(pipe.transformer, ("mlp",), (1,)) as seen, ablate(pipe.transformer, part, by="mean"):
        drawn(pipe)
    value = seen["mlp"][0, 1]
    with ablate(pipe.transformer, part, by="mean"), capture(pipe.transformer, ("mlp",), (1,)) as changed:
        drawn(pipe)
    assert near(changed["mlp"][0, 1], value.mean(1, keepdim=True).expand_as(value))
    with ablate(pipe.transformer, part, by=half):
        drawn(pipe)
    assert steps == [0, 1]


def test_patching_in_a_run_of_its_own_changes_nothing_and_another_one_does(pipe: Pipeline) -> None:
    plain = drawn(pipe)
    with capture(pipe.transformer, ("attn",), (0, 1)) as own:
        drawn(pipe)
    with capture(pipe.transformer, ("attn",), (0, 1)) as other:
        drawn(pipe, prompt="a red bear on a blue background")
    with patch(pipe.transformer, own, "attn", (0, 1)):
        assert torch.equal(drawn(pipe)["latents.1"], plain["latents.1"])
    with patch(pipe.transformer, other, "attn", (0, 1)):
        assert not near(drawn(pipe)["latents.1"], plain["latents.1"], 1e-3)


def test_a_function_of_a_whole_block_has_both_streams(pipe: Pipeline) -> None:
    """Once a function, and a mean, were taken for a zero there."""
    with capture(pipe.transformer, ("x", "context"), (1,)) as plain:
        drawn(pipe)
    ways: list[Any] = [lambda _, streams: (streams[0], 2 * streams[1]), "mean"]
    for by in ways:
        with (
            ablate(pipe.transformer, "joint_blocks.1", by=by),
            capture(pipe.transformer, ("x", "context"), (1,)) as seen,
        ):
            drawn(pipe)
        x, context = (plain[name][0, 1] for name in ("x", "context"))
        expected = (x.mean(1, True).expand_as(x), context.mean(1, True).expand_as(context))
        for name, value in zip(("x", "context"), expected if by == "mean" else (x, 2 * context)):
            assert near(seen[name][0, 1], value)


def test_streams_are_patched_in_some_steps_and_rows(pipe: Pipeline) -> None:
    """What later blocks are given is the other run's there, and their own elsewhere."""
    names: Any = ("x", "context")
    with capture(pipe.transformer, names, (1,)) as plain:
        drawn(pipe)
    with capture(pipe.transformer, names, (1,)) as other:
        drawn(pipe, prompt="a red bear on a blue background", negative="a fox")
    for name, rest in (names, names[::-1]):
        replaced = patch(pipe.transformer, other, name, (1,), steps=(0,), rows=(1,))
        with replaced, capture(pipe.transformer, names, (1,)) as seen:
            drawn(pipe)
        assert torch.equal(seen[name][0, 1][1], other[name][0, 1][1])
        assert near(seen[name][0, 1][0], plain[name][0, 1][0]) and near(seen[rest][0, 1], plain[rest][0, 1])
        assert not near(seen[name][1, 1][1], other[name][1, 1][1], 1e-3)
        assert not near(seen["x"][1, 1], plain["x"][1, 1], 1e-3)


@pytest.mark.parametrize(("given", "said"), [
    (("y", (1,)), "patch: no 'y': there are x, context, attn"),
    (("mlp", (1,)), r"patch: mlp was not captured in blocks \[1\]"),
    (("x", (1, 2)), r"patch: x was not captured in blocks \[2\]"),
    (("x", (1,)), "patch: x of block 1 was not captured in step 1"),
])  # fmt: skip
def test_what_cannot_be_patched_is_told(given: Any, said: str, pipe: Pipeline) -> None:
    with capture(pipe.transformer, ("x",), (1,)) as seen:
        drawn(pipe, steps=1)
    with pytest.raises(SettingsError, match=said), patch(pipe.transformer, seen, *given):
        drawn(pipe)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"what": ("y",)}, "capture: no 'y': there are x, context"),
    ({"blocks": (9,)}, r"capture: blocks \[9\] are not all among the 5 from 0"),
    ({"what": ("attention",)}, "words, patches or texts number tokens"),
    ({"limit": 1000}, "captured tensors take more than 1 MB: expected fewer blocks"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_what_cannot_be_captured_is_told(given: dict[str, Any], said: str, pipe: Pipeline) -> None:
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules()]
    with pytest.raises(SettingsError, match=said), capture(pipe.transformer, **given):
        drawn(pipe)
    assert before == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules()]


@pytest.mark.parametrize(("given", "said"), [
    (("joint_blocks.9.x_block.mlp",), "no part 'joint_blocks.9.x_block.mlp': there are "),
    (("joint_blocks.1.x_block.mlp", (1,)), "has no heads"),
    (("joint_blocks.1.x_block.mlp", (), "none"), "by is 'none': expected zero, mean or a function"),
])  # fmt: skip
def test_what_cannot_be_ablated_is_told(given: Any, said: str, pipe: Pipeline) -> None:
    with pytest.raises(SettingsError, match=said), ablate(pipe.transformer, *given):
        pass


def test_a_pipeline_has_them_as_methods(pipe: Pipeline) -> None:
    plain = drawn(pipe)["latents.1"]
    with pipe.capture(("mlp",), blocks=(1,)) as seen, pipe.ablate("joint_blocks.2"):
        changed = drawn(pipe)["latents.1"]
    assert seen["mlp"].keys() == {(0, 1), (1, 1)}
    assert not torch.equal(plain, changed)
    with pipe.patch(seen, "mlp", (1,)), pipe.ablate("joint_blocks.2"):
        assert torch.equal(drawn(pipe)["latents.1"], changed)
