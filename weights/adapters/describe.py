"""What an adapter file is: whose names it has, which kinds, ranks and alphas, and for which model it was made."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from weights.adapters.groups import UNSUPPORTED, AdapterFile, open_adapter, split_key
from weights.adapters.kinds import Shapes, kind_of
from weights.adapters.targets import LARGE, other_model, owner, unwrapped
from weights.errors import CheckpointError

# (what a module's name begins with, who writes that); the first that fits counts.
_DIALECTS = (
    ("lora_unet_", "kohya"),
    ("lora_te", "kohya or OneTrainer"),
    ("lora_transformer_", "OneTrainer"),
    ("lycoris_", "LyCORIS (SimpleTuner)"),
    ("diffusion_model.", "ComfyUI"),
    ("model.diffusion_model.", "ComfyUI"),
    ("text_encoders.", "ComfyUI"),
    ("clip_l.", "ComfyUI"),
    ("clip_g.", "ComfyUI"),
    ("t5xxl.", "ComfyUI"),
    ("base_model.model.", "PEFT"),
    ("transformer.", "diffusers"),
    ("text_encoder", "diffusers"),
    *((name, "diffusers, without a prefix")
      for name in ("transformer_blocks.", "norm_out.", "proj_out", "pos_embed.", "time_text_embed.")),
    *((name, "Stability's names, without a prefix")
      for name in ("joint_blocks.", "final_layer.", "x_embedder.", "t_embedder.", "y_embedder.")),
)  # fmt: skip
_MAGNITUDES = {"magnitude", "dora_scale"}
_MEDIUM = 1536  # width of SD3-Medium and SD3.5-Medium


def is_adapter(keys: Collection[str]) -> bool:
    """Whether most tensors are named like an adapter's, of a kind that can be merged or of another."""
    return 0 < len(keys) <= 2 * sum(_unsupported(key) is not None or split_key(key) is not None for key in keys)


def describe(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Facts of an adapter file or folder whose file has these keys, ready for JSON.

    dialects: names; kinds: {name: number of modules}; ranks: all there are; alphas: all there are, empty without;
    targets: {component: number of modules}; model: which it was made for, None where the names do not tell; refused:
    why it cannot be merged into any Stable Diffusion 3, or None. Reads headers and stored alphas only.
    """
    try:
        file = open_adapter(path)
    except CheckpointError as error:
        others = Counter(name for key in keys if (name := _unsupported(key)) is not None)
        refused = str(error)
        return {**_facts({}, None), "kinds": dict(others), "refused": refused}
    return _facts(
        {module: {role: info.shape for role, info in roles.items()} for module, roles in file.groups.items()}, file
    )


def _unsupported(key: str) -> str | None:
    return next((name for part, name in UNSUPPORTED.items() if part in key), None)


def _facts(modules: Mapping[str, Shapes], file: AdapterFile | None) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    ranks: set[int] = set()
    deltas: dict[str, tuple[int, ...]] = {}
    for module, shapes in modules.items():
        try:
            kind = kind_of(shapes)
            deltas[module] = kind.shape(shapes) if kind else ()
            rank = kind.rank(shapes) if kind else None
        except (ValueError, IndexError, KeyError):
            kinds["broken"] += 1
            continue
        kinds[kind.name if kind else "bias"] += 1
        kinds["DoRA"] += not _MAGNITUDES.isdisjoint(shapes)
        ranks |= set() if rank is None else {rank}
    model, refused = _model(deltas)
    # Text encoders have the same names in several dialects: the transformer's tell more, where there are any.
    telling = [module for module in modules if owner(module) == "transformer"] or modules
    return {
        "dialects": list(dict.fromkeys(map(_dialect, telling))),
        "kinds": {name: count for name, count in kinds.items() if count},
        "ranks": sorted(ranks),
        "alphas": _alphas(file) if file else [],
        "targets": dict(Counter(map(owner, modules))),
        "model": model,
        "refused": refused,
    }


def _dialect(module: str) -> str:
    name = unwrapped(module)
    return next((who for start, who in _DIALECTS if name.startswith(start)), "of unknown names")


def _model(deltas: Mapping[str, tuple[int, ...]]) -> tuple[str | None, str | None]:
    """The model's name, and why it is none that runs here."""
    strange = other_model(deltas, LARGE)
    if strange is not None:
        return strange, f"an adapter for {strange}; this engine runs Stable Diffusion 3 and 3.5 only"
    images = {module: shape for module, shape in deltas.items() if owner(module) == "transformer"}
    widths = {n for shape in images.values() for n in shape}
    if LARGE in widths:
        return "SD3.5-Large", None
    if _MEDIUM not in widths:
        return None, None
    dual = any("attn2" in module for module in images)
    return ("SD3.5-Medium" if dual else "SD3-Medium or SD3.5-Medium"), None


def _alphas(file: AdapterFile) -> list[float]:
    """Those of the configuration, else those stored; CheckpointError where the file cannot be read."""
    if file.scalings:
        told = {alpha for s in file.scalings.values() for alpha in (s.alpha, *(a for _, a in s.patterns))}
        return sorted(told)
    infos = [roles["alpha"] for roles in file.groups.values() if "alpha" in roles]
    try:
        with safe_open(str(file.path), framework="pt", device="cpu") as opened:
            stored = {float(opened.get_tensor(i.key).float()) for i in infos if math.prod(i.shape) == 1}
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file.path}: cannot be read: {error}") from error
    return sorted(alpha for alpha in stored if math.isfinite(alpha))
