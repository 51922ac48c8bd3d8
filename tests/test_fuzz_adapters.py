"""Damaged adapters: what is merged is what the file's bytes say, in float64, and comes out again; or one line."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import samples
import torch
from fuzzing import Files, Trial, fuzz
from said import Said, safetensors_said

from weights import CheckpointError
from weights.adapters import Adapters, Report

ROLES = {
    "lora_down.weight": "down", "lora_A.weight": "down", "lora_up.weight": "up", "lora_B.weight": "up",
    "lora_B.bias": "up_bias", "lora_magnitude_vector": "magnitude",
}  # fmt: skip
WORDS = (
    *(
        "F64",
        "F32",
        "F16",
        "BF16",
        "F8_E4M3",
        "I64",
        "U8",
        "x.oft_blocks",
        "x.lora_mid.weight",
        "x.set_weight",
        "x.diff",
    ),
    *("x.lora_A.default.weight", "bundle_emb.x", "x.lokr_w1", "x.dora_scale", "x.alpha", "x.w_norm", "double_blocks.0"),
    *("LORA", "LOHA", "lora_alpha", "alpha_pattern", "use_rslora", "r"),
)


class Sum(NamedTuple):
    """Numbers in float64, and how large each could be by absolute values: float32 rounds in proportion to that."""

    value: np.ndarray
    size: np.ndarray


class Merged(NamedTuple):
    report: Report
    state: dict[tuple[str, str], np.ndarray]


# ---- an adapter's arithmetic, once more ----------------------------------------------------------


def delta(roles: Mapping[str, np.ndarray], measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The change without its factor; measure: of each factor, np.abs for the bound."""
    get = {role: measure(values) for role, values in roles.items()}
    flat = {role: values.reshape(values.shape[0], -1) if values.ndim else values for role, values in get.items()}
    if "up" in get:
        return flat["up"] @ flat["down"]
    if "hada_w1_a" in get:
        return (get["hada_w1_a"] @ get["hada_w1_b"]) * (get["hada_w2_a"] @ get["hada_w2_b"])
    if "lokr_w1" in get:
        return np.kron(get["lokr_w1"], get["lokr_w2_a"] @ get["lokr_w2_b"])
    return flat["diff"]


def factor(roles: Mapping[str, np.ndarray], alpha: float | None, rslora: bool) -> float:
    rank = next((roles[role].shape[0] for role in ("down", "hada_w1_b", "lokr_w2_b") if role in roles), None)
    if rank is None:
        return 1.0
    if "alpha" in roles and (alpha is None or "down" not in roles):
        alpha, rslora = float(roles["alpha"].reshape(())), False
    return 1.0 if alpha is None else (alpha or rank) / (math.sqrt(rank) if rslora else rank)


def changed(weight: np.ndarray, roles: Mapping[str, np.ndarray], s: float) -> Sum:
    value = weight + s * delta(roles, np.asarray).reshape(weight.shape)
    size = np.abs(weight) + abs(s) * delta(roles, np.abs).reshape(weight.shape)
    scale = roles.get("magnitude", roles.get("dora_scale"))
    if scale is None:
        return Sum(value, size)
    by_input = "dora_scale" in roles and scale.ndim == 2 and scale.shape[0] == 1
    norm = np.sqrt((value**2).sum(axis=0 if by_input else 1, keepdims=True))
    scale = scale.reshape(norm.shape)
    sound = (norm > 1e-15) & (norm < 1e15)  # float32's squares
    size = np.abs(scale) * (size + size.max(0 if by_input else 1, keepdims=True)) / norm + np.abs(weight)
    return Sum(scale * value / norm, np.where(sound, size, np.inf))


def told_alpha(files: Files, metadata: Any, module: str) -> tuple[float | None, bool]:
    """alpha and rsLoRA by a configuration, PEFT's rule for patterns; None where it has none."""
    if "adapter_config.json" in files:
        configs = {"": json.loads(files["adapter_config.json"])}
    else:
        flat = json.loads(dict(metadata or {}).get("lora_adapter_metadata") or "{}")
        parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
        configs = {"": {k: v for k, v in flat.items() if not k.startswith(tuple(f"{p}." for p in parts))}}
        configs |= {p: {k[len(p) + 1 :]: v for k, v in flat.items() if k.startswith(f"{p}.")} for p in parts}
    prefix = module.split(".")[0]
    own = prefix if configs.get(prefix, {}).get("lora_alpha") is not None else ""
    config, name = configs[own], module.removeprefix(f"{own}.").removeprefix("base_model.model.")
    if config.get("lora_alpha") is None:
        return None, False
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), config["lora_alpha"])
    return alpha, bool(config.get("use_rslora"))


# ---- one kind ------------------------------------------------------------------------------------


def trial(files: Files, targets: samples.Targets) -> Trial:
    networks = samples.adapter_networks()
    adapters = Adapters(networks)
    before = {(part, name): t.clone() for part, net in networks.items() for name, t in net.state_dict().items()}
    arrays = {place: tensor.double().numpy() for place, tensor in before.items()}
    whole = roles_of(stored(files)[0], targets)

    def state() -> dict[tuple[str, str], torch.Tensor]:
        return {(part, name): t for part, net in networks.items() for name, t in net.state_dict().items()}

    def load(path: Path) -> Merged:
        try:
            report = adapters.add(path, 1.0)
            merged = {place: tensor.clone() for place, tensor in state().items()}
            adapters.remove()
        finally:
            assert all(torch.equal(tensor, before[place]) for place, tensor in state().items())
        return Merged(report, {place: tensor.double().numpy() for place, tensor in merged.items()})

    def check(files: Files, merged: Merged) -> None:
        said, metadata = stored(files)
        found = roles_of(said, targets)
        assert set(merged.report.applied) <= set(targets)
        for module, roles in whole.items():
            intact = {r: v.shape for r, v in found[module].items()} == {r: v.shape for r, v in roles.items()}
            assert not intact or module in merged.report.applied, module
        expected = {place: Sum(values, np.abs(values)) for place, values in arrays.items()}
        for module in merged.report.applied:
            alpha = told_alpha(files, metadata, module)
            with np.errstate(all="ignore"):
                apply(expected, targets[module], found[module], factor(found[module], *alpha))
        for place, (value, size) in expected.items():
            with np.errstate(all="ignore"):
                assert (np.abs(merged.state[place] - value) <= 1e-5 * size + 1e-35).all(), place

    words = (*(s for s in stored(files)[0]), *WORDS)
    return Trial(files, load, check, words)


def stored(files: Files) -> tuple[dict[str, Said], Any]:
    return safetensors_said(next(raw for name, raw in files.items() if not name.endswith(".json")))


def roles_of(said: Mapping[str, Said], targets: samples.Targets) -> dict[str, dict[str, np.ndarray]]:
    """{module: {role: numbers}}, under the names of the valid file."""
    found: dict[str, dict[str, np.ndarray]] = {module: {} for module in targets}
    for name, tensor in said.items():
        module = next((m for m in targets if name.startswith(f"{m}.")), None)
        if module is not None:
            end = name.removeprefix(f"{module}.")
            found[module][ROLES.get(end, end)] = tensor.numbers.reshape(tensor.shape)
    return found


def apply(expected: dict, target: tuple, roles: Mapping[str, np.ndarray], s: float) -> None:
    """One module onto the expected weights, in place."""
    part, name, rows, swap = target
    place = (part, f"{name}.weight")
    if not roles.keys().isdisjoint(("up", "hada_w1_a", "lokr_w1", "diff")):
        value, size = (array.copy() for array in expected[place])
        chosen = slice(*rows) if rows else slice(None)
        order = np.roll(np.arange(len(value)), len(value) // 2) if swap else np.arange(len(value))
        new = changed(value[order][chosen], roles, s)
        inner = np.arange(len(value))[order][chosen]
        value[inner], size[inner] = new.value, new.size
        expected[place] = Sum(value, size)
    bias = (part, f"{name}.bias")
    for role, scale in (("up_bias", s), ("diff_b", 1.0)):
        if role in roles:
            value, size = expected[bias]
            expected[bias] = Sum(value + scale * roles[role], size + abs(scale * roles[role]))


TRIALS = {"LoRA, kohya": samples.kohya, "LoRA, diffusers": samples.diffusers, "LoRA, PEFT folder": samples.peft}


@pytest.mark.parametrize("kind", TRIALS)
def test_damaged(kind: str) -> None:
    fuzz(kind, trial(*TRIALS[kind]()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 1e308}, "the factor of its alpha is"),
        ({"lora_alpha": 4, "alpha_pattern": {".*" + "a*" * 2: 1}}, "not a name or a simple pattern"),
        ({"lora_alpha": 4, "alpha_pattern": {f".*{i}.*": 1 for i in range(6)}}, "more than 10 repeats in all"),
        ({"lora_alpha": 4, "alpha_pattern": {str(i): 1 for i in range(2001)}}, "of at most 2000 names"),
    ],
)
def test_values_that_no_config_has(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    files = samples.peft()[0]
    files["adapter_config.json"] = json.dumps({"peft_type": "LORA", **change}).encode()
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        Adapters(samples.adapter_networks()).add(tmp_path)
