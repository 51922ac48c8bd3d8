"""From a file's headers to a network without values: which class, with which numbers."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mmdit import variants
from mmdit.config import MMDiTConfig
from mmdit.control.network import ControlConfig, ControlNet
from mmdit.memory.empty import on_meta
from mmdit.model import MMDiT
from mmdit.variants import Variant
from text_encoders import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder
from vae import Autoencoder, VAEConfig
from weights import CheckpointError, Component, published

MODULES: dict[str, tuple[type[nn.Module], Any]] = {
    "clip_l": (CLIPTextEncoder, CLIPConfig),
    "clip_g": (CLIPTextEncoder, CLIPConfig),
    "t5": (T5Encoder, T5Config),
    "transformer": (MMDiT, MMDiTConfig),
    "vae": (Autoencoder, VAEConfig),
}
BESIDE: dict[str, tuple[type[nn.Module], Any]] = {"control": (ControlNet, ControlConfig)}  # none belongs to a model
_PUBLISHED: dict[str, Callable[..., dict[str, Any]]] = {
    "clip_l": published.clip_config,
    "clip_g": published.clip_config,
    "t5": published.t5_config,
    "vae": published.vae_config,
    "control": published.control_config,
}


def build(component: Component, variant: Variant | None = None) -> Any:
    """The component's module without values; its config from config.json, else from the tensors' shapes.

    variant: of the transformer, if not the one that its config.json names.
    """
    module: Callable[[Any], nn.Module]
    config: Any
    module, config = (MODULES | BESIDE)[component.name]
    if component.name == "control" and (unknown := config.unknown(component.config or {})):
        known = "which no ControlNet of SD3 has"
        raise CheckpointError(f"{component.path}: control: config.json has {', '.join(unknown)}, {known}")
    if component.name == "transformer":
        made = variant_of(component, variant)
        module, config = made.build, made.config
        unknown = config.unknown(component.config or {})
        if unknown:
            raise CheckpointError(
                f"{component.path}: transformer: config.json has {', '.join(unknown)}, which "
                f"{f'the variant {made.name}' if made.name else 'SD3'} does not know: --variant FILE names another"
            )
    try:
        if component.config:
            plain = module is (MODULES | BESIDE)[component.name][0]
            usual = None if plain else config().to_json()
            check_types(component.config, usual or _PUBLISHED[component.name](component.shapes), component.name)
        values = config.from_json(component.config) if component.config else config.from_shapes(component.shapes)
        if component.name == "clip_g" and values.projection_dim is None:  # its pooled vector would be another one
            raise KeyError("text_projection.weight")
        layers = max(getattr(values, name, 0) for name in ("depth", "num_layers", "layers_per_block"))
        layers *= len(getattr(values, "block_out_channels", "1"))
        if layers > len(component.shapes):  # before a module is made for each of them
            raise ValueError(f"{layers} layers of {len(component.shapes)} tensors")
        return on_meta(module, values)
    except KeyError as missing:
        name = component.spelled(missing.args[0], component.shapes)
        raise CheckpointError(f"{component.path}: {component.name} lacks {name}") from None
    except (ValueError, TypeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{component.path}: {component.name}: sizes without sense: {error}") from None


def variant_of(component: Component, variant: Variant | None) -> Variant:
    """What a transformer is to be built as: what was asked for, else what its config.json names; CheckpointError."""
    named = (component.config or {}).get("variant")
    if named is None or (variant is not None and variant.name == named):
        return variant or variants.PLAIN
    if variant is not None:
        raise CheckpointError(f"{component.path}: transformer: it is the variant {named!r:.60}, not {variant.name}")
    found = variants.known(named) if isinstance(named, str) else None
    if found is None:
        raise CheckpointError(
            f"{component.path}: transformer: it is the variant {named!r:.60}, which is not at hand: "
            "--variant FILE names the file that registers it"
        )
    return found


def check_types(config: Mapping[str, Any], usual: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where a value of the component's config.json is not of the type that published ones have."""
    for key, value in config.items():
        # diffusers writes null for its defaults, transformers does not.
        if (
            key in usual
            and usual[key] is not None
            and (value is not None or name not in ("transformer", "vae", "control"))
        ):
            like = usual[key] if isinstance(usual[key], list) else [usual[key]]
            found = value if isinstance(value, list) and isinstance(usual[key], list) else [value]
            if not all(alike(one, like[0]) for one in found):
                raise ValueError(f"{key} is {value!r:.60}, usual is {usual[key]!r}")


def alike(value: Any, usual: Any) -> bool:
    if isinstance(usual, float):
        return type(value) in (int, float) and abs(value) < 1e9  # which neither NaN nor infinity is
    return type(value) is type(usual) and (type(value) is not int or 0 <= value < 1 << 31)
