"""The same velocity by compiled code, by oneDNN's functions and by both, whatever becomes of the weights meanwhile."""

import copy
import re
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Inputs, draw, relative_error, rounded, transformers
from sweeps import sampled
from torch import Tensor, nn

from benchmarks.emoji.tokenizers import write_tokenizers
from benchmarks.random_checkpoint import write_checkpoint
from mmdit import Pipeline, Settings
from mmdit.attention import attention_by
from mmdit.common.errors import SettingsError
from mmdit.config import TOY
from mmdit.kernels import compiled
from mmdit.kernels.compiled import compile_blocks, compile_norms, lacking
from mmdit.kernels.onednn import by_onednn
from mmdit.model import MMDiT

CPU = torch.device("cpu")
DEEP = replace(TOY, hidden_size=192, num_heads=3, depth=5, dual_attention_blocks=(0, 1))
PLAIN = replace(TOY, qk_norm=False, dual_attention_blocks=(), depth=3)
TWO = replace(DEEP, depth=2, dual_attention_blocks=(0,))  # each kind of block is seconds of compiling
compiler = pytest.mark.skipif(lacking(CPU) is not None, reason="needs a C++ compiler")
# The compiler's own packages warn of what is to change in PyTorch.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(autouse=True)
def _forget() -> None:
    """Past a number of shapes PyTorch compiles no more: every test begins anew."""
    torch._dynamo.reset()


def whole(model: MMDiT) -> None:
    """What is done on a GPU, by a compiler that is there anywhere."""
    compile_blocks(model, backend="aot_eager")


def followed(model: MMDiT) -> None:
    """The blocks, by that of PyTorch's compiler which is ours to get wrong; what follows takes most of the time."""
    compile_blocks(model, backend="eager")


NORMS = pytest.param(compile_norms, marks=compiler)


@torch.no_grad()
@pytest.mark.parametrize("way", [*sampled([NORMS, followed], 2), pytest.param(whole, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("config", [TWO, *(pytest.param(each, marks=pytest.mark.sweep) for each in (DEEP, PLAIN))])
def test_float32_velocity_is_the_same(config: Any, way: Callable[[MMDiT], None]) -> None:
    """In several sizes, so that what was compiled for one is not taken for another.

    Every size of every kind of block is compiled, past the limit that was there; this raises where one is not.
    """
    limits = torch._dynamo.config
    before = 2 if way is followed else limits.cache_size_limit  # PyTorch's own would take minutes to pass
    plain, _ = transformers(config)
    model = copy.deepcopy(plain)
    with limits.patch(cache_size_limit=before, fail_on_recompile_limit_hit=True):
        way(model)
        every = (10, 6, 77, (0.98, 0.11)), (18, 26, 154, (0.3, 0.2, 0.1)), (2, 14, 9, (1.0,))
        for rows, columns, tokens, sigmas in every[:2] if config is TWO else every:
            inputs = draw(config, rows, columns, tokens, sigmas)
            assert relative_error(model(*inputs), plain(*inputs)) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("ways", [(by_onednn,), pytest.param((by_onednn, compile_norms), marks=compiler)])
@pytest.mark.parametrize("backend", sampled(["auto", "sdpa"], 2))
def test_bfloat16_is_no_further_from_the_exact_velocity(
    backend: str, ways: tuple[Callable[[MMDiT], None], ...]
) -> None:
    """Errors against float64 on the same rounded weights, mean over seeds, beside diffusers' own."""
    config = replace(DEEP, depth=3, pos_embed_max_size=64)
    ours_off, theirs_off = 0.0, 0.0
    for seed in range(3):
        ours, theirs, exact = rounded(transformers(config, seed), torch.bfloat16)
        for way in ways:
            way(ours)
        latent, sigma, context, pooled = draw(config, 46, 46 + 2 * seed, 77, (0.98738, 0.11))
        inputs = Inputs(latent.bfloat16(), sigma, context.bfloat16(), pooled.bfloat16())
        doubles = [t.double() for t in inputs]
        expected = exact(doubles[0], doubles[2], doubles[3], 1000 * doubles[1], return_dict=False)[0]
        other = theirs(inputs.latent, inputs.context, inputs.pooled, 1000 * sigma, return_dict=False)[0]
        attention_by(ours, backend)
        ours_off += relative_error(ours(*inputs), expected)
        theirs_off += relative_error(other, expected)
    assert ours_off <= 1.05 * theirs_off


@pytest.mark.parametrize("way", sampled([NORMS, whole], 2))
def test_gradient_of_the_latent_is_the_same(way: Callable[[MMDiT], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes back is traced; a C++ compiler would take seconds for each of its pieces."""
    traced = cache(partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiled, "_compiled", traced)
    plain, _ = transformers(TWO)
    model = copy.deepcopy(plain)
    way(model)
    inputs = draw(TWO, 10, 6, 77, (0.98738, 0.11))

    def gradient(which: nn.Module) -> Tensor:
        latent = inputs.latent.clone().requires_grad_()
        return torch.autograd.grad(which(*inputs._replace(latent=latent)).square().sum(), latent)[0]

    assert relative_error(gradient(model), gradient(plain)) <= 1e-5


@torch.no_grad()
def test_blocks_share_a_compilation_for_each_kind() -> None:
    """Dual, plain and last are three kinds, however many blocks there are."""
    from torch._dynamo.testing import CompileCounter

    model = copy.deepcopy(transformers(DEEP)[0])
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    model(*draw(DEEP, 10, 6, 77, (0.5,)))
    assert counter.frame_count == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compiled")
    write_tokenizers(root / "tokenizers", captions=2000)
    more: dict[str, Any] = {"tokenizers": root / "tokenizers", "clip_vocab": 1024, "t5_vocab": 512}
    return write_checkpoint(root / "toy", dtype="fp32", **more)


@compiler
def test_compiled_pipelines_draw_the_same_streamed_and_with_adapters(folder: Path, tmp_path: Path) -> None:
    """In float32, by weights that come and go, and that change after the compilation."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    name = "transformer.transformer_blocks.0.attn.norm_q"
    tensors = {
        "transformer.transformer_blocks.0.ff.net.2.lora_A.weight": torch.randn(3, 512, generator=generator),
        "transformer.transformer_blocks.0.ff.net.2.lora_B.weight": torch.randn(128, 3, generator=generator),
        f"{name}.w_norm": torch.randn(64, generator=generator),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    plain, made = (Pipeline.load(folder, dtype="fp32", device="cpu", compile=c) for c in (False, True))
    own = {"prompt": "a horse", "width": 96, "height": 64, "steps": 2, "t5_length": 20}

    def latents(pipeline: Pipeline) -> Tensor:
        trace: dict[str, Tensor] = {}
        pipeline.run(replace(pipeline.settings, **own), trace)
        return trace["latents.1"]

    before = latents(plain)
    assert relative_error(latents(made), before) <= 1e-5
    for pipeline in (plain, made):
        pipeline.adapters.add(tmp_path / "a.safetensors", 0.1)
    after = latents(plain)
    assert relative_error(after, before) > 1e-3
    plan = replace(made.plan, modes=made.planner.ladder()[-1])
    made.plan_for = lambda _: plan
    assert relative_error(latents(made), after) <= 1e-5


def test_compilation_without_a_compiler_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"^compile cannot be used: it needs a C\+\+ compiler, and there is no no-such"
    ):
        Pipeline.load(folder, device="cpu", compile=True)
    assert lacking(torch.device("mps")) == "there is no compiler for mps"


def test_what_compiling_for_a_gpu_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton, a C compiler and Python's headers, each told before anything is done."""
    gpu, there = torch.device("cuda"), {"clang"}
    monkeypatch.setattr(compiled, "find_spec", lambda _: None)
    assert lacking(gpu) == "it needs the package triton"
    monkeypatch.setattr(compiled, "find_spec", lambda _: "there")
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path / "include"))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    told = "it needs Python's headers (Debian and Ubuntu have them in python3-dev), and there is no Python.h"
    assert lacking(gpu) == told
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "Python.h").touch()
    monkeypatch.setenv("CPATH", f"{tmp_path}:{tmp_path / 'own'}")
    assert lacking(gpu) is None
    there.clear()
    assert lacking(gpu) == "it needs a C compiler, and there is no gcc or clang"
    monkeypatch.setenv("CC", "mycc")
    assert lacking(gpu) == "it needs a C compiler, and there is no mycc"
    monkeypatch.delenv("CPATH")
    monkeypatch.setenv("CXX", "mycc")
    there.add("mycc")
    assert lacking(gpu) == lacking(CPU) == told


@pytest.mark.parametrize("way", [compile_blocks, compile_norms])
def test_a_compiler_that_fails_is_told_on_one_line(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first error that it has to tell, as PyTorch's compiler for CPUs gives it."""

    def fails(*_: object) -> None:
        from torch._inductor.exc import CppCompileError

        raise CppCompileError(["cc", "a.cpp"], "In file included from x\ncc: error: disk full\ncc: error: again\n")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails))
    compiled._compiled.cache_clear()
    model = copy.deepcopy(transformers(PLAIN)[0])
    way(model)
    words = "compile: the compiler failed: cc: error: disk full; without --compile none is needed"
    with pytest.raises(SettingsError, match=f"^{re.escape(words)}$"):
        model(*draw(PLAIN, 2, 2, 9, (0.5,)))
    compiled._compiled.cache_clear()


def test_other_errors_of_compiled_blocks_are_their_own() -> None:
    """Memory that runs out, which a stage deals with, and mistakes."""

    def runs_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def backend(*_: object) -> Any:
        return runs_out

    for found in (runs_out, backend):
        torch._dynamo.reset()
        model = copy.deepcopy(transformers(PLAIN)[0])
        compile_blocks(model, backend=found)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(*draw(PLAIN, 2, 2, 9, (0.5,)))


@torch.no_grad()
def test_hooks_of_compiled_blocks_are_heard() -> None:
    """Put on after the first call, and taken off again: they see what those of a plain model see."""
    one = replace(TWO, depth=1)
    plain, _ = transformers(one)
    model, inputs = copy.deepcopy(plain), draw(one, 10, 6, 77, (0.5,))
    compile_blocks(model, backend="eager")
    model(*inputs)
    seen: dict[MMDiT, list[Tensor]] = {plain: [], model: []}
    handles = [
        which.joint_blocks[0].x_block.attn.ln_q.register_forward_hook(
            lambda _, __, q, which=which: seen[which].append(q)
        )
        for which in seen
    ]
    for which in seen:
        which(*inputs)
        which(*inputs)
    assert [len(queries) for queries in seen.values()] == [2, 2]
    assert relative_error(seen[model][1], seen[plain][1]) <= 1e-6
    for handle in handles:
        handle.remove()
    model(*inputs)
    assert len(seen[model]) == 2


def test_what_is_missing_is_refused_before_anything_is_read() -> None:
    """The model that is named does not exist, which would be the next thing to be told."""
    for own in ({"attention": "flash"}, {"attention": "xformers"}, {"attention": "cudnn"}):
        with pytest.raises(ValueError, match=f"^attention {own['attention']} cannot be used: "):
            Pipeline.from_settings(Settings(model="no/such/folder", device="cpu", **own))
