"""Adapters from prompt to picture, and live against diffusers, PEFT and LyCORIS.

diffusers loads adapters with PEFT; these tests are skipped where PEFT or LyCORIS (`lycoris-lora`) is not installed.
"""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import FC1, WIDTH, Toy, lora, noise
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.emoji.tokenizers import write_tokenizers
from benchmarks.random_checkpoint import write_checkpoint
from mmdit.common.errors import SettingsError
from mmdit.common.paths import split_scale
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import Settings
from mmdit.run import main
from weights import CheckpointError, Source
from weights.keymap import TRANSFORMER, revert, to_diffusers

DEFAULTS = {"width": 32, "height": 32, "steps": 1, "cfg": 2.0, "t5_length": 8}
TARGETS = {  # module of the transformer or a text encoder: outputs and inputs
    "transformer.transformer_blocks.0.attn.to_q": (128, 128),
    "transformer.transformer_blocks.0.attn.to_k": (128, 128),
    "transformer.transformer_blocks.0.attn.add_v_proj": (128, 128),
    "transformer.transformer_blocks.0.attn2.to_out.0": (128, 128),
    "transformer.transformer_blocks.1.ff.net.0.proj": (512, 128),
    "transformer.transformer_blocks.1.norm1_context.linear": (256, 128),
    "transformer.norm_out.linear": (256, 128),
    "transformer.context_embedder": (128, 256),
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (128, 128),
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc2": (128, 512),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy folder with tokenizers. Not to be written to."""
    root = tmp_path_factory.mktemp("adapters")
    write_tokenizers(root / "tokenizers", captions=2000)
    sizes = {"clip_vocab": 1024, "t5_vocab": 512}
    return write_checkpoint(root / "toy", tokenizers=root / "tokenizers", defaults=DEFAULTS, **sizes)


def load(model: Path, **keywords: Any) -> Pipeline:
    return Pipeline.load(model, device="cpu", dtype="fp32", t5=keywords.pop("t5", "off"), **keywords)


def strong(path: Path, seed: str = "", **more: Tensor) -> Path:
    """An adapter that shows in a picture."""
    save_file({**{k: 5 * t for k, t in lora(FC1, 4 * WIDTH, WIDTH, seed=seed).items()}, **more}, path)
    return path


# ---- against diffusers ---------------------------------------------------------------------------


def weights(pipeline: Pipeline, part: str) -> dict[str, Tensor]:
    """What a network computes with, wherever it is."""
    network = pipeline.residency.networks[part]
    return {name: network.source(name) for name in network.shapes}


@pytest.mark.parametrize("metadata", [False, True])
def test_fused_weights_are_those_of_diffusers(model: Path, tmp_path: Path, metadata: bool) -> None:
    """load_lora_weights and fuse_lora of StableDiffusion3Pipeline, with ranks that differ."""
    pytest.importorskip("peft", reason="diffusers loads adapters with PEFT")
    from diffusers import StableDiffusion3Pipeline

    ranks = {module: 2 + i % 3 for i, module in enumerate(TARGETS)}
    tensors = {}
    for module, (out, inputs) in TARGETS.items():
        tensors[f"{module}.lora_A.weight"] = noise(ranks[module], inputs, seed=module)
        tensors[f"{module}.lora_B.weight"] = noise(out, ranks[module], seed=module)
    text = None
    if metadata:
        flat: dict[str, Any] = {}
        for part in ("transformer", "text_encoder_2"):
            own = {m.removeprefix(f"{part}."): r for m, r in ranks.items() if m.startswith(f"{part}.")}
            alphas = {m: 3.0 * (i % 2 + 1) for i, m in enumerate(own)}
            flat |= {f"{part}.r": 4, f"{part}.lora_alpha": 8.0, f"{part}.rank_pattern": own}
            flat |= {f"{part}.alpha_pattern": alphas, f"{part}.target_modules": list(own)}
        text = {"lora_adapter_metadata": json.dumps(flat)}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", text)

    none: dict[str, Any] = {"tokenizer": None, "tokenizer_2": None, "tokenizer_3": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusion3Pipeline.from_pretrained(model, **none)
        theirs.load_lora_weights(tmp_path)
        theirs.fuse_lora(components=["transformer", "text_encoder_2"], lora_scale=0.7)
        theirs.unload_lora_weights()
    ours = load(model, lora=[f"{tmp_path}:0.7"])
    native, expected = weights(ours, "transformer"), theirs.transformer.state_dict()
    for name, entry in to_diffusers(native, TRANSFORMER).items():
        torch.testing.assert_close(revert(entry, native[entry.sources[0]]), expected[name], rtol=1e-5, atol=2e-6)
    clip = theirs.text_encoder_2.state_dict()
    for name, tensor in weights(ours, "clip_g").items():
        torch.testing.assert_close(tensor, clip[name], rtol=1e-5, atol=2e-6)
    ours.adapters.remove()
    plain = load(model)
    original, back = weights(plain, "transformer"), weights(ours, "transformer")
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"attn.qkv": 6}, "alpha_pattern": {"attn.qkv": 3, r".*\.mlp\.fc1": 5}},
    ],
)
def test_merged_weights_are_those_of_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    """Of a folder that save_pretrained wrote, merged by merge_and_unload; a convolution among the weights."""
    peft = pytest.importorskip("peft", reason="not needed otherwise")
    toy = Toy(tmp_path, "transformer")
    names = ["attn.qkv", "attn2.proj", "mlp.fc1", "x_embedder.proj", "adaLN_modulation.1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = copy.deepcopy(toy.modules["transformer"])
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=16, target_modules=names, **options))
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1 + noise(*parameter.shape)
            elif "lora_" in name:
                parameter.data = noise(*parameter.shape, seed=name)
        theirs.save_pretrained(tmp_path / "folder")
        theirs = theirs.merge_and_unload()
    report = toy.adapters.add(tmp_path / "folder")
    assert len(report.applied) == 4 + 1 + 3 + 1 + 5
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(toy.weight(name), tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoHaConfig", {}),
        ("LoHaConfig", {"use_effective_conv2d": True, "alpha_pattern": {"attn.qkv": 3, r".*\.mlp\.fc1": 5}}),
        ("LoKrConfig", {}),
        ("LoKrConfig", {"decompose_both": True, "decompose_factor": 4, "use_effective_conv2d": True}),
        ("LoKrConfig", {"r": 500}),  # both factors whole: the rank is nowhere but in the configuration
        ("LoKrConfig", {"r": 500, "rank_pattern": {"attn.qkv": 4, "mlp.fc1": 300}}),
    ],
)
def test_merged_lycoris_weights_are_those_of_peft(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="not needed otherwise")
    toy = Toy(tmp_path, "transformer")
    names = ["attn.qkv", "attn2.proj", "mlp.fc1", "x_embedder.proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, kind)(**{"r": 4, "alpha": 16, "target_modules": names, **options})
        theirs = peft.get_peft_model(copy.deepcopy(toy.modules["transformer"]), config)
        for name, parameter in theirs.named_parameters():
            if "hada_" in name or "lokr_" in name:
                parameter.data = noise(*parameter.shape, seed=name)
        theirs.save_pretrained(tmp_path / "folder")
        theirs = theirs.merge_and_unload()
    report = toy.adapters.add(tmp_path / "folder")
    assert len(report.applied) == 4 + 1 + 3 + 1
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(toy.weight(name), tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [FC1, "x_embedder.proj"])
@pytest.mark.parametrize("kind", ["LoConModule", "LohaModule", "LokrModule", "FullModule"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decompose": True, "wd_on_out": True},
        {"weight_decompose": True, "wd_on_out": False},
        {"use_tucker": True},
        {"decompose_both": True, "factor": 4},
        {"full_matrix": True},
        {"rs_lora": True},
        {"use_scalar": True},
    ],
)
def test_layers_are_those_of_lycoris(tmp_path: Path, module: str, kind: str, options: dict[str, Any]) -> None:
    """A layer of LyCORIS against ours with the weights that it saves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = pytest.importorskip("lycoris.modules", reason="not needed otherwise")
    toy = Toy(tmp_path, "transformer")
    ours = toy.modules["transformer"].get_submodule(module)
    theirs = copy.deepcopy(ours)
    layer = getattr(modules, kind)("x", theirs, multiplier=1.0, lora_dim=3, alpha=2.0, **options).eval()
    for name, parameter in layer.named_parameters():
        if "dora" in name:
            parameter.data *= 1 + noise(*parameter.shape)
        elif "org_module" not in name:
            parameter.data = noise(*parameter.shape, seed=name)
    layer.apply_to()
    inputs = noise(3, WIDTH) if module == FC1 else noise(2, 16, 4, 4)
    saved = {key: t for key, t in layer.state_dict().items() if not key.startswith("org")}
    toy.add({f"diffusion_model.{module}.{key}": t for key, t in saved.items()})
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=1e-4, atol=1e-4)


# ---- the pipeline --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Without the notes of the reference packages."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def test_pictures_with_and_without(model: Path, tmp_path: Path) -> None:
    """Loaded with an adapter or given one later, the same; without it again as before; metadata say which were in."""
    path = strong(tmp_path / "style.safetensors")
    plain, styled = load(model), load(model, lora=[f"{path}:0.5"])
    before, expected = plain("a horse")[0], styled("a horse")[0]
    assert before.tobytes() != expected.tobytes()
    assert plain.adapters.add(path, 0.5).name == "style"
    assert plain("a horse")[0].tobytes() == expected.tobytes()
    run = plain.run(Settings("a horse", model=str(model), t5="off", dtype="fp32", device="cpu"))
    assert run.settings.lora == (f"{path}:0.5",)
    assert plain.run(run.settings).images[0].tobytes() == expected.tobytes()
    plain.adapters.remove()
    assert plain("a horse")[0].tobytes() == before.tobytes()
    styled.adapters.rescale("style", 0.0)
    assert styled("a horse")[0].tobytes() == before.tobytes()
    with pytest.raises(SettingsError, match="lora is fixed when the model is loaded"):
        plain("a horse", lora=["other.safetensors"])


@pytest.mark.filterwarnings("default")
def test_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--lora again and again; the settings in the picture repeat it; mistakes are one line before anything is read."""
    from PIL import Image

    one, two = strong(tmp_path / "one.safetensors", "1"), strong(tmp_path / "two.safetensors", "2")
    told = ["a horse", "--model", str(model), "--t5", "off", "--dtype", "fp32", "--device", "cpu"]
    assert main([*told, "--lora", f"{one}:0.5", "--lora", str(two), "--out", str(tmp_path / "a.png")]) == 0
    picture = Image.open(tmp_path / "a.png")
    own = json.loads(picture.text["mmdit"])  # type: ignore[attr-defined]
    assert own["lora"] == [f"{one}:0.5", f"{two}:1.0"]
    assert f'lora: "{one}:0.5, {two}:1.0"' in picture.text["parameters"]  # type: ignore[attr-defined]
    again = Pipeline.from_settings(Settings(**own)).run(Settings(**own)).images[0]
    assert again.tobytes() == picture.tobytes()

    capsys.readouterr()
    extra = lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 64, 256)
    part = strong(tmp_path / "part.safetensors", **extra)
    assert main([*told, "--lora", str(part), "--out", str(tmp_path / "b.png")]) == 0
    warning = f"warning: {part}: 1 module applied, left out: 1 module of t5, which is not loaded"
    assert capsys.readouterr().err.splitlines()[0] == warning
    save_file(extra, part)
    for lora_option, message in {
        str(tmp_path / "none.safetensors"): "no such file",
        f"{one}:much": "expected FILE_OR_FOLDER:SCALE with a number",
        f"{one}:nan": "expected FILE_OR_FOLDER:SCALE with a number",
        str(part): "nothing of it applies to this model: 1 module of t5, which is not loaded",
    }.items():
        assert main([*told, "--lora", lora_option, "--out", str(tmp_path / "c.png")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert (error.startswith("error: "), error.count("\n")) == (True, 1)
    assert not (tmp_path / "c.png").exists()


def test_a_wrong_adapter_is_found_before_the_weights_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(lora("lora_unet_double_blocks_0_x", 8, 8), tmp_path / "flux.safetensors")
    monkeypatch.setattr(Source, "original", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(CheckpointError, match="an adapter for FLUX"):
        load(model, lora=[str(tmp_path / "flux.safetensors")])


def test_what_the_option_means(tmp_path: Path) -> None:
    (tmp_path / "a:2").mkdir()
    (tmp_path / "b").mkdir()
    for text, expected in {
        "a.safetensors": ("a.safetensors", 1.0),
        "a.safetensors:0.5": ("a.safetensors", 0.5),
        "a.safetensors:-1": ("a.safetensors", -1.0),
        f"{tmp_path}/a:2": (f"{tmp_path}/a:2", 1.0),
        f"{tmp_path}/a:2:3": (f"{tmp_path}/a:2", 3.0),
        r"C:\adapters\a.safetensors": (r"C:\adapters\a.safetensors", 1.0),
    }.items():
        assert split_scale(text) == expected
    for text in (f"{tmp_path}/b:", f"{tmp_path}/b:x", "a:inf", ":1"):
        with pytest.raises(SettingsError, match="expected FILE_OR_FOLDER:SCALE with a number"):
            split_scale(text)
    assert Settings(lora="a").lora == Settings(lora=["a"]).lora == ("a",)  # type: ignore[arg-type]
