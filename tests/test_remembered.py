"""Texts that are kept from run to run: each picture is the one without that, and nothing stale answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toys import toy_folder

from mmdit.common.errors import SettingsError
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.remembered import Remembered
from mmdit.driver.stages import NotFiniteError
from mmdit.driver.watch import Encoded, Watcher
from text_encoders import TextEncoder

DEFAULTS = {"width": 32, "height": 32, "steps": 1, "cfg": 4.5, "t5_length": 20}
LAYER = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return toy_folder(tmp_path_factory.mktemp("remembered"), defaults=DEFAULTS)


@pytest.fixture(scope="module")
def plain(model: Path) -> Pipeline:
    """Nothing may be changed of it."""
    return Pipeline.load(model, dtype="fp32", device="cpu")


@pytest.fixture
def pipe(model: Path) -> Pipeline:
    found = Pipeline.load(model, dtype="fp32", device="cpu")
    found.remembered = Remembered(1e8)
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The texts of each pass of the encoders, from now on."""
    found, encode = list[list[Any]](), TextEncoder.encode

    def told(self: TextEncoder, texts: Any, *args: Any, **more: Any) -> Any:
        found.append([*texts])
        return encode(self, texts, *args, **more)

    monkeypatch.setattr(TextEncoder, "encode", told)
    return found


def drawn(pipe: Pipeline, prompt: str, **more: Any) -> dict[str, np.ndarray]:
    """All tensors of a run."""
    trace: dict[str, torch.Tensor] = {}
    pipe.run(pipe.asked({"prompt": prompt, **more}), trace)
    return {name: tensor.numpy() for name, tensor in trace.items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(value, other[name]) for name, value in one.items())


@pytest.mark.filterwarnings("ignore:prompt too long")
def test_pictures_are_those_without_it(pipe: Pipeline, plain: Pipeline, passes: list[list[Any]]) -> None:
    """Every tensor bit for bit, whatever was drawn before, together or alone; each picture's texts are encoded once."""
    asks: list[tuple[str, dict[str, Any]]] = [
        ("a horse", {}), ("a bear", {}), ("a horse", {"seed": 3}), ("a horse", {"negative": "a bear"}),
        ("a horse", {"cfg": 1}), ("a horse", {"t5_length": 30}), ("(a horse)", {}),
        ("(a horse)", {"emphasis": True}), ("a horse", {"prompt_t5": "a fox"}), ("a horse", {"also": ["a fox"]}),
        ("a horse " * 40, {"long_prompts": True}), ("a horse " * 40, {}),
    ]  # fmt: skip
    [*pipe.draw_many(["a fox", "a bear", {"prompt": "a fox", "seed": 5}])]
    assert passes == [["a fox", ""], ["a bear", ""]]
    expected = [drawn(plain, prompt, **more) for prompt, more in asks]
    for again in (False, True):
        passes.clear()
        for (prompt, more), trace in zip(asks, expected):
            assert same(drawn(pipe, prompt, **more), trace), (prompt, more)
        assert bool(passes) is not again
    assert pipe.remembered and pipe.remembered.hits > pipe.remembered.misses > 0


def test_it_is_bounded_and_the_oldest_go_first(pipe: Pipeline, passes: list[list[Any]]) -> None:
    pipe("a horse", cfg=1)
    assert pipe.remembered is not None
    one = pipe.remembered.bytes
    assert one > 20 * pipe.text.width * 4  # T5's tokens alone
    pipe.remembered = remembered = Remembered(2.5 * one)
    for prompt in ("a horse", "a bear", "a horse", "a fox", "a horse", "a bear"):
        pipe(prompt, cfg=1)
        assert remembered.bytes <= 2.5 * one
    assert passes[1:] == [["a horse"], ["a bear"], ["a fox"], ["a bear"]]
    pipe.remembered = Remembered(0.5 * one)
    pipe("a horse", cfg=1)
    assert pipe.remembered.bytes == 0


def test_who_looks_on_may_write_into_what_they_see(pipe: Pipeline, plain: Pipeline) -> None:
    expected = drawn(plain, "a horse")

    class Writes(Watcher):
        def encoded(self, event: Encoded) -> None:
            for text in event.texts.values():
                seen.append(text.tokens["clip_l"].clone())
                text.context.zero_()
                text.tokens["clip_l"].zero_()

    seen: list[torch.Tensor] = []
    for _ in range(2):
        pipe.run(pipe.asked({"prompt": "a horse"}), watchers=[Writes()])
    assert len(seen) == 4 and torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:])) and seen[0].any()
    assert same(drawn(pipe, "a horse"), expected)


def test_adapters_are_not_answered_from_before(pipe: Pipeline, model: Path, tmp_path: Path) -> None:
    """Added, rescaled and taken out, of a text encoder alone."""
    generator = torch.Generator().manual_seed(0)
    width = pipe.parts.networks["clip_l"].module.get_submodule(LAYER).in_features
    matrices = {
        name: torch.randn(shape, generator=generator) for name, shape in (("down", (4, width)), ("up", (width, 4)))
    }
    path = tmp_path / "style.safetensors"
    save_file({f"lora_te1_{LAYER.replace('.', '_')}.lora_{n}.weight": m for n, m in matrices.items()}, path)
    before = drawn(pipe, "a horse")
    pipe.adapters.add(path, 0.5)
    added = drawn(pipe, "a horse")
    assert not same(added, before)
    pipe.adapters.rescale("style", 2.0)
    expected = drawn(Pipeline.load(model, dtype="fp32", device="cpu", lora=[f"{path}:2"]), "a horse")
    assert same(drawn(pipe, "a horse"), expected) and not same(expected, added)
    pipe.adapters.remove()
    assert same(drawn(pipe, "a horse"), before)


def test_what_may_change_texts_unseen_turns_it_off(pipe: Pipeline, passes: list[list[Any]]) -> None:
    """As soon as it is there, though the text is known already; a module in another's place is refused as ever."""
    encoder, everywhere = pipe.parts.networks["clip_l"].module, torch.nn.modules.module
    layer = encoder.get_submodule(LAYER)

    def count() -> int:
        passes.clear()
        for _ in range(2):
            pipe("a horse")
        return len(passes)

    assert count() == 1 and count() == 0
    for register in (
        layer.register_forward_hook, layer.register_forward_pre_hook, everywhere.register_module_forward_hook
    ):  # fmt: skip
        handle = register(lambda *_: None)
        assert count() == 2
        handle.remove()
        assert count() == 1 and count() == 0
    for owner, name in ((layer, "forward"), (pipe, "encode"), (pipe.text, "encode")):
        setattr(owner, name, getattr(owner, name))
        assert count() == 2, name
        delattr(owner, name)
        assert count() == 1
    encoder.set_submodule(LAYER, torch.nn.Linear(layer.in_features, layer.out_features))
    with pytest.raises(SettingsError, match="is another module"):
        pipe("a horse")


def test_another_reading_of_prompts_is_not_answered_from_before(pipe: Pipeline) -> None:
    assert isinstance(pipe.text, TextEncoder)
    before = drawn(pipe, "a horse")
    pipe.text.t5_mode = "off"
    assert not same(drawn(pipe, "a horse"), before)
    pipe.text.t5_mode = "on"
    assert same(drawn(pipe, "a horse"), before)


def test_an_editable_model_forgets_at_once(model: Path) -> None:
    pipe = Pipeline.load(model, dtype="fp32", device="cpu", editable=True)
    pipe.remembered = Remembered(1e6)
    before = drawn(pipe, "a horse")
    with torch.no_grad():
        pipe.parts.networks["clip_l"].module.get_submodule(LAYER).weight.mul_(2)
    assert not same(drawn(pipe, "a horse"), before) and pipe.remembered.bytes == pipe.remembered.hits == 0


def test_a_text_that_cannot_be_encoded_is_not_remembered(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise NotFiniteError("NaN")

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "check_finite", fails)
        with pytest.raises(NotFiniteError):
            pipe("a horse")
    assert pipe.remembered is not None and pipe.remembered.bytes == 0
    pipe("a horse")
    assert pipe.remembered.bytes > 0
