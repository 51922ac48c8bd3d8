"""Variants of the architecture: registered, saved, loaded, refused, drawn with; and the check of every path."""

import json
import os
import shutil
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from sweeps import sampled

from benchmarks import check_variant
from benchmarks.check_variant import built, checked, folder_of, gradients, inputs, sampling
from mmdit import Pipeline, variants
from mmdit.common.errors import SettingsError
from mmdit.driver.loading import DEMO
from mmdit.memory.activations import Activations
from mmdit.memory.residency import Mode
from mmdit.run import main
from mmdit.variants import PLAIN, Variant, config_json
from weights import CheckpointError
from weights.convert import convert
from weights.inspect import inspect

FILES = sorted(path for path in Path(check_variant.__file__).with_name("variants").glob("*.py") if path.stem[0] != "_")
HEADER = """
import torch
from torch import nn
from dataclasses import dataclass, replace
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT, SelfAttention, JointBlock
from mmdit.variants import variant
"""


def written(path: Path, code: str) -> Variant:
    path.write_text(HEADER + dedent(code))
    return variants.load(str(path))


def wrong_of(variant: Variant, *names: str) -> dict[str, str]:
    """What does not hold of these checks, or of all."""
    with pytest.MonkeyPatch.context() as patch:
        if names:
            patch.setattr(check_variant, "CHECKS", [check for check in check_variant.CHECKS if check[0] in names])
            assert len(check_variant.CHECKS) == len(names)
        return {name: said for name, holds, said in checked(variant) if not holds}


# ---- those that come with it ---------------------------------------------------------------------


def test_there_are_at_least_ten() -> None:
    assert len(FILES) >= 12


@pytest.mark.parametrize("path", sampled(FILES, 5), ids=lambda path: path.stem)
def test_a_shipped_variant_is_short_and_another_model(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    variant = variants.load(str(path))
    assert variant.name == path.stem
    assert "parameters" in gradients(variant)
    assert "relative error" in sampling(variant)
    model = built(variant)
    with torch.no_grad():
        base = built(PLAIN)
        differs = (model(*inputs(model)) - base(*inputs(base))).norm()
    assert differs > 0.01


@pytest.mark.sweep
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_variant_passes_every_check(path: Path) -> None:
    assert wrong_of(variants.load(str(path))) == {}


def test_rotary_positions_turn_queries_and_keys_by_their_distance_alone() -> None:
    """A token that asks gets the same from tokens that lie the same way from it, wherever it is."""
    from benchmarks.variants.rope import turned
    from mmdit.model import SelfAttention, Tokens

    model = built(variants.load(str(next(p for p in FILES if p.stem == "rope"))))
    attn = next(m for m in model.modules() if isinstance(m, SelfAttention))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, attn.head_size, generator=generator) for _ in range(2))
    places = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    every = [t.expand(1, 12, 1, -1) for t in (q, k)]
    seen: list[torch.Tensor] = []
    attn.backend = lambda q, k, v, bias: seen.extend([q, k]) or v  # noqa: ARG005
    attn.attend(*every, every[1], Tokens(0, 3, 4))
    scores = torch.einsum("bnhd,bmhd->nm", *seen)
    by_distance: dict[tuple[int, ...], list[float]] = {}
    for (n, m), score in zip(torch.cartesian_prod(torch.arange(12), torch.arange(12)).tolist(), scores.flatten()):
        by_distance.setdefault(tuple((places[n] - places[m]).tolist()), []).append(float(score))
    assert all(max(same) - min(same) < 1e-4 for same in by_distance.values())
    assert len({round(same[0], 4) for same in by_distance.values()}) == len(by_distance) == 35
    assert torch.equal(turned(torch.ones(1, 5, 1, 64), torch.ones(3, 1, 32))[:, :2], torch.ones(1, 2, 1, 64))


# ---- plans ---------------------------------------------------------------------------------------


SHARED = """
    @variant("naive_shared")
    class Shared(MMDiT):
        def __init__(self, config):
            super().__init__(replace(config, dual_attention_blocks=()))
            shared = self.joint_blocks[0].x_block.adaLN_modulation
            for block in self.joint_blocks:
                block.x_block.adaLN_modulation = shared
"""


def test_one_module_in_several_places_is_right_in_every_plan(tmp_path: Path) -> None:
    """One adaLN for all blocks: once a traceback where blocks come and go, and a table predicted too small."""
    found = written(tmp_path / "shared.py", SHARED)
    assert wrong_of(found, "saved and loaded", "every plan", "memory") == {}
    with folder_of(found) as folder:
        pipe = Pipeline.load(folder, variant=str(tmp_path / "shared.py"), t5="off")
        one, plain = pipe.planner.costs, Pipeline.load(t5="off").planner.costs
        assert one.size("transformer") < plain.size("transformer")
        assert len(pipe.residency.networks["transformer"].before) == 1 + pipe.transformer.config.depth


def test_a_table_is_as_large_as_what_the_blocks_are_told() -> None:
    """Numbers written out: offsets make each block's shifts, scales and gates tensors of their own."""
    path = next(p for p in FILES if p.stem == "shared_adaln")
    with folder_of(variants.load(str(path))) as folder:
        pipe = Pipeline.load(folder, variant=str(path), t5="off", dtype="fp32")
        job = pipe.job(pipe.settings.resolved(pipe.defaults))._replace(steps=7)
        width, chunks = 256, 3 * 9 + 2 * 6 + 4 * 6 + 2 + 2  # dual, plain, context, last context, final
        expected = 4 * 7 * 2 * width * chunks
        assert pipe.planner.costs.activations.table("transformer", job, 1) == expected


def test_bounds_that_hold_for_the_published_architecture_are_not_taken_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where memory abounds, too: no bound of the transformer's is asked for."""
    asked: list[str] = []
    bound = Activations.denoising_bound
    monkeypatch.setattr(
        Activations, "denoising_bound", lambda self, *given: asked.append("bound") or bound(self, *given)
    )
    path = next(p for p in FILES if p.stem == "registers")
    with folder_of(variants.load(str(path))) as folder:
        Pipeline.load(folder, variant=str(path), t5="off")
        assert asked == []
    Pipeline.load(t5="off")
    assert asked


def test_an_architecture_that_config_json_does_not_name_is_refused() -> None:
    path = next(p for p in FILES if p.stem == "attn2_windowed")
    with folder_of(variants.load(str(path))) as folder:
        file = folder / "transformer" / "config.json"
        config = json.loads(file.read_text())
        assert (config["variant"], config["attn2_window"]) == ("attn2_windowed", 4)
        del config["variant"]
        file.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"transformer: config.json has attn2_window, which SD3 does not"):
            Pipeline.load(folder)
        assert Pipeline.load(folder, variant=str(path), t5="off").transformer.config.attn2_window == 4  # type: ignore[attr-defined]


def test_a_variant_that_is_not_at_hand_is_named(tmp_path: Path) -> None:
    found = written(
        tmp_path / "mine.py",
        """
        @dataclass(frozen=True)
        class Config(MMDiTConfig):
            louder: tuple[int, ...] = (1, 2)

        @variant("mine", Config)
        def mine(model):
            assert model.config.louder == (3, 4, 5)
    """.replace("assert model.config.louder == (3, 4, 5)", "pass"),
    )
    with folder_of(found) as folder:
        file = folder / "transformer" / "config.json"
        config = json.loads(file.read_text()) | {"louder": [3, 4, 5]}
        file.write_text(json.dumps(config))
        assert Pipeline.load(folder, t5="off").transformer.config.louder == (3, 4, 5)  # type: ignore[attr-defined]
        variants._known.pop("mine")
        with pytest.raises(
            CheckpointError, match=r"transformer: it is the variant 'mine', which is not at hand: --var"
        ):
            Pipeline.load(folder, t5="off")
        with pytest.raises(CheckpointError, match=r"it is the variant 'mine', not rope"):
            Pipeline.load(folder, variant="benchmarks.variants.rope", t5="off")
        found = variants.load(str(tmp_path / "mine.py"))
        assert config_json(Pipeline.load(folder, t5="off").transformer)["louder"] == [3, 4, 5]
        file.write_text(json.dumps(config | {"louder": "x", "other": 1}))
        with pytest.raises(CheckpointError, match=r"config.json has other, which the variant mine does not know"):
            Pipeline.load(folder, variant=str(tmp_path / "mine.py"), t5="off")


def test_it_is_inspected_and_converted_without_its_code(tmp_path: Path) -> None:
    """Into another number format; a single file has no place for what it is."""
    path = next(p for p in FILES if p.stem == "rope")
    with folder_of(variants.load(str(path))) as folder:
        shutil.rmtree(folder / "text_encoder_3")
        variants._known.pop("rope")
        found = inspect(folder)
        assert (found["model"], found["load"]["loads"]) == (None, True)
        assert found["load"]["needs"] == ["--variant FILE"]
        assert "another architecture than SD3's, the variant 'rope'" in found["notes"]
        convert(folder, tmp_path / "half", layout="diffusers", dtype="bf16")
        one, other = (Pipeline.load(f, variant=str(path), dtype="bf16", t5="off") for f in (folder, tmp_path / "half"))
        small = {"width": 64, "height": 64, "steps": 1, "t5_length": 4}
        assert one("a horse", **small)[0].tobytes() == other("a horse", **small)[0].tobytes()
        for name in ("text_encoder", "text_encoder_2"):  # what else a single file would have no place for
            shutil.rmtree(folder / name)
        (folder / "vae" / "config.json").unlink()
        with pytest.raises(CheckpointError, match="transformer: variant is 'rope'; readers of a single file"):
            convert(folder, tmp_path / "file.safetensors", layout="single-file", dtype="bf16")


# ---- text encoders -------------------------------------------------------------------------------


def test_encoders_that_a_variant_does_not_have_are_not_opened() -> None:
    """Their folders may be gone; the context and the pooled vector are CLIP-L's, and T5's beside it."""
    path = next(p for p in FILES if p.stem == "no_clip_g")
    with folder_of(variants.load(str(path))) as folder:
        for name in ("text_encoder_2", "tokenizer_2"):
            shutil.rmtree(folder / name)
        pipe = Pipeline.load(folder, variant=str(path), dtype="fp32")
        assert sorted(pipe.residency.networks) == ["clip_l", "t5", "transformer", "vae"]
        text, whole = pipe.encode(["a horse"], 12), Pipeline.load(dtype="fp32").encode(["a horse"], 12)
        assert torch.equal(text.pooled, whole.pooled[:, :64])
        assert torch.equal(text.context[:, :, :64], whole.context[:, :, :64])
        clip = text.tokens["clip_l"].shape[1]
        assert not text.context[:, :clip, 64:].any()
        pipe("a horse", width=64, height=64, steps=1)


TEXT = """
    class Letters:
        width = 192

        def length(self, t5_length):
            return 5

        def encode(self, texts, t5_length):
            from text_encoders import Conditioning
            ids = torch.tensor([[ord(c) % 100 for c in text.ljust(5)[:5]] for text in texts])
            context = torch.sin(ids[..., None] * torch.arange(1, self.width + 1) / 50)
            return Conditioning(context, context.mean(1)[:, :192], {"letters": ids})

    @variant("letters", text=lambda config: Letters())
    def letters(model): ...
"""


def test_another_text_encoder_takes_the_place_of_all(tmp_path: Path) -> None:
    """No published one is opened, nor a tokenizer; lists, plans and dumps know the length of its texts."""
    found = written(tmp_path / "letters.py", TEXT)
    with folder_of(found) as folder:
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"):
            shutil.rmtree(folder / name)
        pipe = Pipeline.load(folder, variant=str(tmp_path / "letters.py"), dtype="fp32")
        assert sorted(pipe.residency.networks) == ["transformer", "vae"]
        trace: dict[str, torch.Tensor] = {}
        small = {"width": 64, "height": 64, "steps": 1, "seed": 1}
        pipe.run(pipe.asked({"prompt": "a horse", **small}), trace)
        assert trace["cond.context"].shape == (1, 5, 192)
        assert pipe.job(pipe.settings.resolved(pipe.defaults)).context == 5
        first = trace["latents.0"]
        pipe.run(pipe.asked({"prompt": "b bear", **small}), trace)
        assert not torch.equal(first, trace["latents.0"])
        assert len(list(pipe.draw_many(["a", "b", "c"], **small))) == 3
    wide = written(tmp_path / "wide.py", TEXT.replace("width = 192", "width = 200").replace('"letters"', '"wide"'))
    with folder_of(wide) as folder, pytest.raises(CheckpointError, match="texts of width 200, expected 192"):
        Pipeline.load(folder)


# ---- files ---------------------------------------------------------------------------------------

BROKEN = [
    ("", r"registers no variant; one stands under @variant\(NAME\)"),
    ("x = 1 +\n", r"line 8: SyntaxError: invalid syntax"),
    ("x = 1\nraise KeyError('y')\n", r"line 9: KeyError: 'y'"),
    ("import nowhere.at_all\n", r"line 8: ModuleNotFoundError: No module named 'nowhere'"),
    ("@variant('a')\ndef a(m): ...\n@variant('b')\ndef b(m): ...\n", r"registers a, b: expected one"),
]


@pytest.mark.parametrize(("code", "said"), BROKEN, ids=range(len(BROKEN)))
def test_a_file_that_is_none_is_told_in_a_line(code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said) as error:
        written(tmp_path / "v.py", code)
    assert "\n" not in str(error.value) and str(tmp_path / "v.py") in str(error.value)


@pytest.mark.parametrize(("name", "said"), [("no.py", "no such file"), ("no_module", "no module no_module: expected")])
def test_what_is_not_there_is_told(name: str, said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["a horse", "--variant", name]) == 2
    assert said in capsys.readouterr().err


def test_a_file_is_run_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was changed within the second, to one of the same size, and Python keeps what it compiled."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path, found = tmp_path / "own.py", list[Any]()
    for number in (1, 2):
        path.write_text(f"{HEADER}@variant('own')\ndef own(model):\n    return {number}\n")
        os.utime(path, (1e9, 1e9))
        found.append(variants.load(str(path)).make(None))
    assert found == [1, 2]


def test_a_variant_of_the_demo_draws_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The demo's own weights under changed arithmetic; its code is part of what tells pictures apart."""
    code = """
        @variant("louder")
        class Louder(MMDiT):
            def flow(self, *given):
                return FACTOR * super().flow(*given)
    """
    hashes, pictures = set(), set()
    for factor in ("1.0", "1.1"):
        (tmp_path / "louder.py").write_text(HEADER + dedent(code).replace("FACTOR", factor))
        out = str(tmp_path / factor)
        line = ["a horse", "--steps", "2", "--variant", str(tmp_path / "louder.py"), "--out", out, "--width", "64"]
        assert main(line) == 0
        from PIL import Image

        with Image.open(capsys.readouterr().out.strip()) as image:
            pictures.add(image.tobytes())
            hashes.add(json.loads(image.info["mmdit"])["weights"])
    assert len(hashes) == len(pictures) == 2


def test_opening_a_model_runs_none_of_its_code(tmp_path: Path) -> None:
    found = written(tmp_path / "evil.py", '@variant("evil")\ndef evil(model): ...\n')
    with folder_of(found) as folder:
        for name in ("evil.py", "transformer/evil.py", "transformer/variant.py"):
            (folder / name).write_text("raise SystemExit('ran')\n")
        variants._known.pop("evil")
        with pytest.raises(CheckpointError, match="not at hand"):
            Pipeline.load(folder)


def test_modes_are_all_checked() -> None:
    assert [m.value for m in Mode] == ["resident", "staged", "streamed"]
    assert DEMO.is_dir() and "mmdit.variants" in sys.modules
