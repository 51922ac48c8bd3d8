"""The ControlNets of a model: opened and checked against its transformer, and their pictures against them."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.common.errors import SettingsError
from mmdit.common.paths import user_path
from mmdit.config import MMDiTConfig
from mmdit.control.network import ControlConfig, ControlNet
from mmdit.driver.building import build
from mmdit.driver.settings import Settings
from mmdit.images.read import look
from weights import CheckpointError, Component
from weights.control import open_control


class Opened(NamedTuple):
    """A ControlNet before it has weights."""

    component: Component
    module: ControlNet
    type: str | None  # which of `weights.control.TYPES` its file says that it is


def open_controls(settings: Settings, transformer: MMDiTConfig) -> dict[str, Opened]:
    """The ControlNets of the settings by their networks' names, in order.

    Reads headers. Raises CheckpointError for what is none, or one of another model.
    """
    found: dict[str, Opened] = {}
    for i, text in enumerate(settings.control):
        file = open_control(user_path("control", text))
        module = build(file.component)
        check_fits(module.config, transformer, file.component.path)
        found[f"control {i + 1}" if i else "control"] = Opened(file.component, module, file.type)
    return found


def check_fits(net: ControlConfig, transformer: MMDiTConfig, path: Path) -> None:
    """Raise CheckpointError where a ControlNet is for another transformer than this."""
    sizes = {
        "tokens": "hidden_size",
        "pooled vectors": "pooled_size",
        "latents": "in_channels",
        "patches": "patch_size",
    }
    if net.context_size:
        sizes["contexts"] = "context_size"
    wrong = [
        f"{what} of {getattr(net, name)}, expected {getattr(transformer, name)}"
        for what, name in sizes.items()
        if getattr(net, name) != getattr(transformer, name)
    ]
    if net.depth > transformer.depth:
        wrong.append(f"{net.depth} blocks, expected at most {transformer.depth}")
    if net.context_size and net.qk_norm != transformer.qk_norm:
        wrong.append(f"{'a' if net.qk_norm else 'no'} norm of queries and keys, unlike the model")
    if wrong:
        raise CheckpointError(f"{path}: a ControlNet for another model: {'; '.join(wrong)}")
    if net.extra_channels not in (0, 1):
        raise CheckpointError(
            f"{path}: {net.extra_channels} channels beside a latent's: expected none, or 1 for a mask"
        )


def check_pictures(settings: Settings, nets: Mapping[str, Any]) -> Settings:
    """With a hash of the pictures that control; SettingsError where one is missing, too many, or cannot be read."""
    settings.check_pictures()
    if not settings.control:
        return settings
    masked = any(net.config.extra_channels for net in nets.values())
    if masked != (settings.control_mask is not None):
        raise SettingsError(
            "control_mask is missing: this ControlNet fills in what is white in it"
            if masked
            else "control_mask: none of the ControlNets fills in by a mask"
        )
    if settings.control_type and all(net.config.context_size for net in nets.values()):
        raise SettingsError("control_type: none of the ControlNets is of a type: those without a text are")
    seen = [look("control_image", given).content for given in settings.control_image]
    seen += [look("control_mask", settings.control_mask).content] if settings.control_mask else []
    found = hashlib.sha256(" ".join(seen).encode()).hexdigest()[:16]
    return replace(settings, control_pictures=found)
