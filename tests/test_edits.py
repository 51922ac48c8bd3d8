"""Edits of a loaded model, made as a researcher would make them: each is in the picture, whatever draws it.

The truth is the edited model called as in training: `transformer(latent, sigma, context, pooled)`.
"""

from collections.abc import Callable
from itertools import pairwise
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sweeps import sampled
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmdit import Pipeline
from mmdit.common.errors import SettingsError
from mmdit.kernels import compiled
from mmdit.kernels.compiled import compile_blocks, compile_norms
from mmdit.kernels.onednn import by_onednn
from mmdit.memory.residency import Mode
from mmdit.model import MLP, Block, JointBlock, LayerNorm, MMDiT
from mmdit.prepared import Prepared
from samplers import shifted_sigmas

STEPS = {"width": 64, "height": 64, "steps": 2, "seed": 5}
Edit = Callable[[MMDiT], object]


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return drawn(Pipeline.load(dtype="fp32"))


def drawn(pipe: Pipeline) -> Tensor:
    trace: dict[str, Tensor] = {}
    pipe.run(pipe.asked({"prompt": "a horse", "negative": "a bear", **STEPS}), trace)
    return trace["latents.1"]  # on the CPU


def by_hand(pipe: Pipeline) -> Tensor:
    """Two guided Euler steps of the model as training calls it."""
    defaults = pipe.settings.resolved(pipe.defaults)
    assert defaults.t5_length and defaults.cfg
    texts = [pipe.encode([text], defaults.t5_length) for text in ("a horse", "a bear")]
    context, pooled = torch.cat([text.context for text in texts]), torch.cat([text.pooled for text in texts])
    x, sigmas = pipe.noise(64, 64, [5]), shifted_sigmas(2, pipe.shift)
    pipe.residency.use("transformer")
    with torch.no_grad():
        for sigma, after in pairwise(sigmas):
            cond, uncond = pipe.transformer(x.expand(2, -1, -1, -1), sigma.to(x).expand(2), context, pooled).split(1)
            x = x + (after - sigma) * (uncond + defaults.cfg * (cond - uncond))
    return x.cpu()


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm() / other.norm()) < 1e-5


def test_by_hand_is_what_is_drawn(plain: Tensor) -> None:
    assert close(by_hand(Pipeline.load(dtype="fp32", editable=True)), plain)


# ---- edits ---------------------------------------------------------------------------------------


def replaced_mlp(model: MMDiT) -> None:
    width = model.config.hidden_size
    block: Any = model.joint_blocks[1]
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width))
    block.x_block.mlp = mlp.to(block.x_block.mlp.fc1.weight.device)


def wrapped_context(model: MMDiT) -> None:
    class Louder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, context: Tensor) -> Tensor:
            return 1.5 * self.inner(context)

    model.context_embedder = Louder(model.context_embedder)  # pyright: ignore[reportAttributeAccessIssue]


def own_forward(model: MMDiT) -> None:
    def forward(self: MMDiT, latent: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return MMDiT.forward(self, latent, sigma, context.flip(1), 0.5 * pooled)

    model.forward = MethodType(forward, model)


def registers_in_forward(model: MMDiT) -> None:
    torch.manual_seed(1)
    registers = torch.randn(1, 4, model.config.hidden_size)

    def forward(self: MMDiT, latent: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        positions = self.positions(*self.grid(latent))
        text = torch.cat([self.embed_text(context), registers.to(context).expand(len(context), -1, -1)], dim=1)
        return self.flow(latent, positions, text, self.modulations(sigma, pooled))

    model.forward = MethodType(forward, model)


def zeroed(model: MMDiT) -> None:
    block: Any = model.joint_blocks[2]
    with torch.no_grad():
        block.x_block.mlp.fc2.weight.zero_()


def parametrized(model: MMDiT) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 0.5 * weight

    block: Any = model.joint_blocks[0]
    parametrize.register_parametrization(block.x_block.attn.proj, "weight", Half())


def other_method(model: MMDiT) -> None:
    plain = model.modulations
    model.modulations = lambda sigma, pooled: plain(1 - sigma, pooled)


def own_attention(model: MMDiT) -> None:
    """In one block, each token gathers from itself alone."""
    block: Any = model.joint_blocks[1]
    block.x_block.attn.backend = lambda q, k, v, bias: v[:, -q.shape[1] :]  # noqa: ARG005


def hooked(model: MMDiT) -> None:
    block: Any = model.joint_blocks[1]
    block.x_block.attn.register_forward_hook(lambda _, __, out: 0 * out)


def lora_by_peft(model: MMDiT) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(2)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False), model)


EDITS = [
    replaced_mlp, wrapped_context, own_forward, registers_in_forward, zeroed, parametrized, other_method,
    own_attention, hooked, lora_by_peft,
]  # fmt: skip


@pytest.mark.parametrize("edit", sampled(EDITS, 2), ids=lambda edit: edit.__name__)
def test_an_edited_model_draws_as_it_is_called(edit: Edit, plain: Tensor) -> None:
    pipe = Pipeline.load(dtype="fp32", editable=True)
    edit(pipe.transformer)
    found = drawn(pipe)
    assert close(found, by_hand(pipe))
    assert not close(found, plain)


@pytest.mark.parametrize("edit", sampled(EDITS, 4), ids=lambda edit: edit.__name__)
def test_an_edited_model_draws_within_a_budget(edit: Edit) -> None:
    """Measured without memory where the edit allows that; one that holds real tensors draws all the same."""
    pipe = Pipeline.load(dtype="fp32", editable=True, memory="20GB")
    edit(pipe.transformer)
    assert close(drawn(pipe), by_hand(pipe))


@pytest.mark.parametrize("edit", sampled(EDITS[:5], 2), ids=lambda edit: edit.__name__)
def test_an_edit_between_two_pictures_is_in_the_second(edit: Edit, plain: Tensor) -> None:
    pipe = Pipeline.load(dtype="fp32", editable=True)
    assert close(drawn(pipe), plain)
    edit(pipe.transformer)
    assert close(drawn(pipe), by_hand(pipe))


@pytest.mark.parametrize("memory", ["auto", "2GB"])
@pytest.mark.parametrize("edit", sampled([replaced_mlp, wrapped_context, zeroed], 3), ids=lambda edit: edit.__name__)
def test_an_edit_of_weights_that_come_and_go_is_refused(edit: Edit, memory: str) -> None:
    """Where the weights lie at the moment, a change is in the picture; where they do not, it would be lost."""
    pipe = Pipeline.load(dtype="fp32", memory=memory)
    pipe.residency.networks["transformer"].leave()
    edit(pipe.transformer)
    with pytest.raises(SettingsError, match=r"the transformer was changed after .*: load it with editable=True"):
        drawn(pipe)


@pytest.mark.parametrize(
    "edit", sampled([own_forward, other_method, own_attention, hooked], 2), ids=lambda edit: edit.__name__
)
@pytest.mark.parametrize("mode", sampled(Mode, 2))
def test_edits_without_weights_work_in_every_plan(edit: Edit, mode: Mode, plain: Tensor) -> None:
    pipe, truth = Pipeline.load(dtype="fp32"), Pipeline.load(dtype="fp32", editable=True)
    for each in (pipe, truth):
        edit(each.transformer)
    job = pipe.job(pipe.settings.resolved(pipe.defaults))
    modes = dict.fromkeys(pipe.residency.networks, Mode.STAGED) | {"transformer": mode}
    pipe.planner.ladder = lambda: [modes]  # pyright: ignore[reportAttributeAccessIssue]
    pipe.follow(pipe.plan_for(job), job)
    found = drawn(pipe)
    assert pipe.plan.modes["transformer"] is mode
    assert close(found, by_hand(truth))
    assert not close(found, plain)


def test_an_edited_model_is_never_taken_for_another() -> None:
    one, two = (Pipeline.load(editable=True) for _ in range(2))
    kinds = {pipe.run(pipe.asked({"prompt": "a", **STEPS})).settings.weights for pipe in (one, two)}
    assert len(kinds) == 2


def test_an_editable_model_takes_adapters_when_it_is_loaded_only(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    name = "transformer.transformer_blocks.0.ff.net.0.proj"
    width = Pipeline.load().transformer.config.hidden_size
    up, down = torch.ones(4 * width, 2), torch.ones(2, width)
    save_file({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}, tmp_path / "a.safetensors")
    merged, editable = (Pipeline.load(dtype="fp32", lora=[str(tmp_path / "a.safetensors")], editable=e) for e in (0, 1))
    assert torch.equal(drawn(merged), drawn(editable))
    with pytest.raises(SettingsError, match="given when it is loaded"):
        editable.adapters.add(str(tmp_path / "a.safetensors"), 1.0)


# ---- what is seen --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Mode))
def test_every_module_of_the_transformer_is_called(mode: Mode) -> None:
    """Forward hooks fire on all of them, the whole included, with what each returns."""
    pipe = Pipeline.load()
    modes = dict.fromkeys(pipe.residency.networks, Mode.STAGED) | {"transformer": mode}
    pipe.planner.ladder = lambda: [modes]  # pyright: ignore[reportAttributeAccessIssue]
    seen: dict[str, list[Any]] = {}
    for name, module in pipe.transformer.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, []).append(out))
    job = pipe.job(pipe.settings.resolved(pipe.defaults))
    pipe.follow(pipe.plan_for(job), job)
    drawn(pipe)
    silent = {name for name, _ in pipe.transformer.named_modules()} - seen.keys()
    last = f"joint_blocks.{pipe.transformer.config.depth - 1}.context_block.attn"
    assert silent == {"joint_blocks", last}
    assert len(seen[""]) == 2  # steps, guided in one batch
    assert seen["joint_blocks.0.x_block.attn"][0].shape == (2, 16, pipe.transformer.config.hidden_size)


# ---- faster forms --------------------------------------------------------------------------------


class OtherBlock(JointBlock):
    def forward(self, x: Tensor, context: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        x, context = super().forward(x, context, *given)
        return -0.5 * x, context


def relu_mlp(self: MLP, x: Tensor) -> Tensor:
    return self.fc2(F.relu(self.fc1(x)).square())


def other_norm(self: LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return shift + F.rms_norm(x, (self.width,)) * scale


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def model_of(seed: int = 0) -> MMDiT:
    from dataclasses import replace

    from mmdit.config import TOY

    torch.manual_seed(seed)
    model = MMDiT(replace(TOY, depth=2)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    return model.requires_grad_(False)


def evaluated(model: MMDiT, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latent, context, pooled = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((2, 16, 8, 12), (2, 9, model.config.context_size), (2, model.config.pooled_size))
    )
    with torch.no_grad():
        return Prepared(model, context, pooled, (0.7,))(latent, 0.7, (0, 1)).double()


WAYS = [by_onednn, compile_norms, lambda model: compile_blocks(model, backend="eager")]


def edited_classes(monkeypatch: pytest.MonkeyPatch, model: MMDiT) -> None:
    """As an edit of the model's file would change them, or a line in a notebook."""
    monkeypatch.setattr(MLP, "forward", relu_mlp)
    monkeypatch.setattr(LayerNorm, "forward", other_norm)
    assert model


def edited_blocks(_: pytest.MonkeyPatch, model: MMDiT) -> None:
    for block in model.joint_blocks:
        block.__class__ = OtherBlock


def edited_layers(_: pytest.MonkeyPatch, model: MMDiT) -> None:
    for module in model.modules():
        if isinstance(module, Block):
            module.mlp.fc1.__class__ = OtherLinear
            module.attn.proj.__class__ = OtherLinear


def edited_by_hook(_: pytest.MonkeyPatch, model: MMDiT) -> None:
    for module in model.modules():
        if isinstance(module, MLP):
            module.fc1.register_forward_hook(lambda _, __, out: 2 * out)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("edit", sampled([edited_classes, edited_blocks, edited_layers, edited_by_hook], 4))
@pytest.mark.parametrize("way", WAYS, ids=["onednn", "norms", "blocks"])
def test_a_faster_form_stands_in_only_for_what_it_was_written_for(
    way: Callable[[MMDiT], None], edit: Any, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edit comes before the fast path is laid, or after it. Only hooks meet PyTorch's compiler here: it is slow."""
    monkeypatch.setattr(compiled, "_compiled", lambda function: function)
    if edit is not edited_by_hook:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    dtype = torch.bfloat16
    truth, fast = model_of().to(dtype), model_of().to(dtype)
    usual = evaluated(model_of().to(dtype), dtype)
    if late:
        way(fast)
    edit(monkeypatch, fast)
    if edit is not edited_classes:
        edit(monkeypatch, truth)
    if not late:
        way(fast)
    found, expected = evaluated(fast, dtype), evaluated(truth, dtype)
    assert (found - expected).norm() <= 0.02 * expected.norm()
    assert (usual - expected).norm() > 0.1 * expected.norm()


def test_the_model_as_it_is_has_its_faster_forms() -> None:
    """Else a changed line of the model's file would lose them, and nobody would notice."""
    from mmdit.kernels import onednn
    from mmdit.kernels.stock import forward_is

    model = model_of()
    mlp = next(m for m in model.modules() if isinstance(m, MLP))
    norm = next(m for m in model.modules() if isinstance(m, LayerNorm))
    assert forward_is(mlp, onednn.plain_mlp)
    assert forward_is(norm, compiled._plain_layer_norm)
