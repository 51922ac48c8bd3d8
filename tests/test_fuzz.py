"""Damaged checkpoints: each loads to what its bytes say, or is refused in one line with its name."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import samples
import torch
from forms import write_gguf
from fuzzing import Files, Place, Tally, Trial, bounded, fuzz, scratch
from said import EXPONENTS, Numbers, Said, decoded, gguf_said, safetensors_said
from sweeps import sampled

from mmdit.common.errors import SettingsError
from mmdit.driver.building import build
from mmdit.driver.loading import shift_of
from mmdit.driver.settings import Settings, check_defaults
from weights import CheckpointError, fill, open_checkpoint
from weights.checkpoint import PLACES

WORDS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I32", "I16", "I8", "U8", "BOOL", "F4")
MARKS = ("lora_A.weight", "double_blocks.0.x", "x.qweight", "loss.x", "x.scale_weight", "x.weight_scale", "scaled_fp8",
         "model_ema.x", "encoder.block.7.x", "float8_e5m2", "float8_e4m3fn", "x.weight", "joint_blocks.99999999.x.bias",
         "text_model.encoder.layers.99999999.x", "joint_blocks.x.y", "text_projection")  # fmt: skip
State = dict[str, dict[str, torch.Tensor]]
Modules = dict[str, Any]  # filled, by component


def load(path: Path) -> Modules:
    """Every network, filled as for drawing."""
    checkpoint = open_checkpoint(path)
    parts = {name: checkpoint.component(name) for name in checkpoint.components}
    shift_of(checkpoint)
    return {name: fill(build(part), part) for name, part in parts.items()}


def load_single(path: Path) -> State:
    """As `load`, the autoencoder's tensors without a module."""
    checkpoint = open_checkpoint(path)
    parts = {name: checkpoint.component(name) for name in checkpoint.components}
    vae = {name: parts["vae"].read(name) for name in parts["vae"].shapes} if "vae" in parts else {}
    return {n: vae if n == "vae" else fill(build(part), part).state_dict() for n, part in parts.items()}


def load_transformer(path: Path) -> State:
    return {name: module.state_dict() for name, module in load(path).items()}


def same(got: torch.Tensor, said: Numbers) -> bool:
    return np.array_equal(got.double().numpy().ravel(), said, equal_nan=True)


def check_transformer(original: bytes) -> Callable[[Files, State], None]:
    """Each tensor has the values that the damaged file says under the name it has in the valid one."""
    names = {name for name in safetensors_said(original)[0] if is_weight(name)}

    def check(files: Files, state: State) -> None:
        said, metadata = safetensors_said(files["file"])
        assert set(state["transformer"]) == names
        for name, tensor in state["transformer"].items():
            assert same(tensor, weight(name, said, metadata)), name

    return check


def check_single(original: bytes) -> Callable[[Files, State], None]:
    prefixes, names = samples.published.PREFIXES, set(safetensors_said(original)[0])

    def check(files: Files, state: State) -> None:
        said, metadata = safetensors_said(files["file"])
        for part, own in state.items():
            expected = {name for name in names if name.startswith(prefixes[part])}
            assert part == "vae" or {prefixes[part] + name for name in own} == expected
            for name, tensor in own.items():
                # The autoencoder here is one tensor or more, so that another prefix can be as good.
                known = [key for key in said if key.endswith(name)] if part == "vae" else [prefixes[part] + name]
                assert any(same(tensor, weight(key, said, metadata)) for key in known), name

    return check


def is_weight(name: str) -> bool:
    return not name.endswith(("scale_weight", "weight_scale", "comfy_quant", "scaled_fp8"))


def weight(name: str, said: dict[str, Said], metadata: Any) -> Numbers:
    """The numbers of a weight, times its scale if it has one."""
    tensor, layer = said[name], name.rpartition(".")[0]
    scale = said.get(f"{layer}.scale_weight", said.get(f"{layer}.weight_scale")) if name.endswith(".weight") else None
    if scale is None:
        assert not name.endswith(".weight") or declared(layer, said, metadata) is None
        return tensor.numbers
    dtype = tensor.dtype
    if dtype == "U8":
        dtype = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}[declared(layer, said, metadata) or ""]
    assert dtype in EXPONENTS
    factor = scale.numbers.astype(np.float32)
    assert factor.shape == (1,) and math.isfinite(factor[0])
    with np.errstate(all="ignore"):
        return (decoded(dtype, tensor.raw).astype(np.float32) * factor).astype(np.float64)


def declared(layer: str, said: dict[str, Said], metadata: Any) -> str | None:
    """The format that a layer is said to have."""
    if f"{layer}.comfy_quant" in said:
        return json.loads(said[f"{layer}.comfy_quant"].raw)["format"]
    layers = json.loads(dict(metadata or ()).get("_quantization_metadata", '{"layers": {}}'))["layers"]
    return layers[layer]["format"] if layer in layers else None


def facts_of_file(files: Files, facts: dict[str, Any]) -> None:
    """What is described can be read, and is as much as is there."""
    raw = files["file"]
    if raw[:4] == b"GGUF":
        shapes = [shape for shape, _ in gguf_said(raw).values()]
    else:
        shapes = [tensor.shape for tensor in safetensors_said(raw)[0].values()]
    assert facts["tensors"] == len(shapes) == sum(own["tensors"] for own in facts["dtypes"].values())
    assert facts["parameters"] == sum(map(math.prod, shapes))


def words(raw: bytes) -> tuple[str, ...]:
    return (*safetensors_said(raw)[0], *WORDS, *MARKS)


def transformer(raw: bytes) -> Trial:
    return Trial({"file": raw}, load_transformer, check_transformer(raw), words(raw), facts=facts_of_file)


def single(raw: bytes) -> Trial:
    return Trial({"file": raw}, load_single, check_single(raw), words(raw), facts=facts_of_file)


def gguf_trial(tmp_path: Path) -> Trial:
    kinds = gguf.GGMLQuantizationType
    stored = {}
    for name, tensor in samples.wide_transformer().items():
        kind = kinds.Q4_0 if "mlp" in name and tensor.shape[1:] == (32,) else kinds.F16
        stored[name] = gguf.quants.quantize(tensor.float().numpy(), kind), kind
    raw = write_gguf(tmp_path / "file", stored, shapes={"pos_embed": [1, 4, 32]}).read_bytes()
    names = set(stored)

    def check(files: Files, state: State) -> None:
        said = gguf_said(files["file"])
        assert set(state["transformer"]) == names
        for name, tensor in state["transformer"].items():
            assert same(tensor, said[name][1]), name

    return Trial({"file": raw}, load_transformer, check, facts=facts_of_file)


# ---- folders -------------------------------------------------------------------------------------


def folder_trial(tmp_path: Path) -> Trial:
    files = samples.folder()
    for name, raw in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    # In the valid folder every number is its own place in its network's files.
    modules = load(tmp_path)
    states = {part: module.state_dict() for part, module in modules.items()}
    places = {part: {name: t.numpy().ravel().astype(int) for name, t in own.items()} for part, own in states.items()}
    said = {part: folder_tensors(files, part) for part in modules}
    names = {part: sorted(own, key=lambda name, own=own: own[name].numbers[0]) for part, own in said.items()}
    valid = {part: vars(module.config) for part, module in modules.items()}

    def check(files: Files, modules: Modules) -> None:
        index = json.loads(files["model_index.json"])
        listed = {part for part, (place, _) in PLACES.items() if isinstance(index.get(place), list) and index[place]}
        assert {part for part in listed if any(word is not None for word in index[PLACES[part][0]])} == set(modules)
        for part, module in modules.items():
            said = folder_tensors(files, part)
            flat = np.concatenate([said[name].numbers for name in names[part]])
            state = module.state_dict()
            assert set(state) == set(places[part])
            assert all(same(tensor, flat[places[part][name]]) for name, tensor in state.items())
            check_config(vars(module.config), valid[part])

    everything = [name for part in names for name in names[part]]
    return Trial(files, load, check, (*everything, *WORDS, *MARKS))


def folder_tensors(files: Files, part: str) -> dict[str, Said]:
    """{name: Said} of one component."""
    place, stem = PLACES[part]
    whole, index = f"{place}/{stem}.safetensors", f"{place}/{stem}.safetensors.index.json"
    if whole in files:
        return safetensors_said(files[whole])[0]
    shards = json.loads(files[index])["weight_map"]
    said = {shard: safetensors_said(files[f"{place}/{shard}"])[0] for shard in set(shards.values())}
    return {name: said[shard][name] for name, shard in shards.items()}


def check_config(config: dict[str, Any], valid: dict[str, Any]) -> None:
    """Every setting is of the type it has in the valid folder, and a number that can be computed with."""
    for name, value in config.items():
        usual = valid[name]
        if isinstance(usual, float):
            assert type(value) in (int, float) and abs(value) < 1e9, name
        elif value is not None:
            assert type(value) is type(usual), name
        for number in value if isinstance(value, tuple) else [value]:
            assert type(number) is not int or abs(number) < 1 << 31, name


def defaults_trial(_: Path) -> Trial:
    def load(path: Path) -> dict[str, Any]:
        return check_defaults(open_checkpoint(path).defaults, str(path / "mmdit.json"))

    def check(files: Files, found: dict[str, Any]) -> None:
        assert found == (json.loads(files["mmdit.json"]) if "mmdit.json" in files else {})
        Settings().resolved(found)

    files = {"model_index.json": b'{"_class_name": "StableDiffusion3Pipeline"}',
             "mmdit.json": b'{"width": 64, "height": 64, "steps": 2, "cfg": 4.0, "t5_length": 77}'}  # fmt: skip
    return Trial(files, load, check, ("width", "seed", "cfg", "prompt"), errors=(CheckpointError, SettingsError))


TRIALS: dict[str, Callable[[Path], Trial]] = {
    "transformer": lambda _: transformer(samples.file(samples.transformer(), {"modelspec.title": "x"})),
    "fp8, plain": lambda _: transformer(samples.file(samples.plain_fp8())),
    "fp8, older": lambda _: transformer(samples.file(*samples.scaled("older"))),
    "fp8, newer, notes": lambda _: transformer(samples.file(*samples.scaled("notes"))),
    "fp8, newer, metadata": lambda _: transformer(samples.file(*samples.scaled("metadata"))),
    "GGUF": gguf_trial,
    "single file": lambda _: single(samples.file(samples.single_file())),
    "diffusers folder": folder_trial,
    "mmdit.json": defaults_trial,
}


@pytest.mark.parametrize("kind", sampled(TRIALS, 2))
def test_damaged(kind: str, tmp_path: Path) -> None:
    fuzz(kind, TRIALS[kind](tmp_path))


CONFIGS = {
    "transformer/config.json": {"num_layers": 10**9, "attention_head_dim": "x", "patch_size": True},
    "vae/config.json": {"layers_per_block": 10**9, "block_out_channels": [2] * 999, "scaling_factor": float("nan")},
    "text_encoder/config.json": {"num_hidden_layers": 10**9, "hidden_size": "%999999999d", "layer_norm_eps": None},
    "text_encoder_3/config.json": {"num_layers": 10**9, "d_kv": 1e300, "relative_attention_max_distance": "128"},
}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, changes in CONFIGS.items() for key in changes])
def test_values_that_no_config_has(file: str, key: str) -> None:
    """Rare among damaged files, and each the end of a program that trusts it."""
    files = samples.folder()
    config = json.loads(files[file])
    assert key in config
    files[file] = json.dumps({**config, key: CONFIGS[file][key]}).encode()
    with scratch() as root, bounded(Tally()), pytest.raises(CheckpointError, match=Path(file).parent.name):
        load(Place(root, files).path)


def test_deep_layers_in_a_name(tmp_path: Path) -> None:
    tensors = samples.single_file()
    for name in (
        "text_encoders.clip_g.transformer.text_model.encoder.layers.",
        "text_encoders.t5xxl.transformer.encoder.block.",
    ):
        path = tmp_path / "file"
        path.write_bytes(samples.file({**tensors, f"{name}99999999.x": torch.ones(1)}))
        with bounded(Tally()), pytest.raises(CheckpointError, match="100000000 layers of"):
            load_single(path)
