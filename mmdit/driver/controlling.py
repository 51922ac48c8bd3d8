"""How ControlNets control one picture: their own pictures encoded, and in which steps."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmdit.control.network import ControlConfig
from mmdit.control.options import interval_of
from mmdit.driver.settings import Settings
from mmdit.driver.stages import Stages
from mmdit.images.read import read_mask, read_picture
from mmdit.images.shape import fitted


class Controlling(NamedTuple):
    """A ControlNet's part in one picture."""

    net: str  # the network's name
    latent: Tensor  # (1, C', h, w), float32
    scale: float
    interval: tuple[float, float]  # shares of the steps
    way: str  # how its residuals are spread

    def controls(self, step: int, steps: int) -> bool:
        """Whether it does in this step, of so many: where all of it lies in the interval, as diffusers counts."""
        low, high = self.interval
        return not (step / steps < low or (step + 1) / steps > high)


def controlling(stages: Stages, s: Settings) -> list[Controlling]:
    """What controls a picture, its settings as they were checked: every ControlNet with its picture's latent."""
    assert s.width and s.height
    found = []
    for i, (name, type_) in enumerate(stages.parts.controls.items()):
        config: ControlConfig = stages.parts.networks[name].module.config
        image = fitted(read_picture("control_image", s.control_image[i]), (s.width, s.height), "stretch")
        type_ = s.control_type[i] if s.control_type else type_
        if config.extra_channels:
            assert s.control_mask is not None
            mask = fitted(read_mask("control_mask", s.control_mask), (s.width, s.height), "stretch")
            latent = filling_in(stages, image, mask)
        else:
            values = values_of(image, None if config.context_size else type_)
            latent = latent_of(stages, values, shifted=not config.pooled_zeros)
        found.append(
            Controlling(
                name,
                latent,
                float(s.control_scale[i]) if s.control_scale else 1.0,
                interval_of(s.control_interval[i]) if s.control_interval else (0.0, 1.0),
                config.way if s.control_map == "auto" else s.control_map,
            )
        )
    return found


def values_of(image: Image.Image, type_: str | None = None) -> Tensor:
    """A picture "RGB" as the autoencoder is given it, float32 `(1, 3, H, W)`: from -1 to 1.

    type_: of Stability AI's ControlNets for SD3.5-Large. The one for canny edges was trained on numbers from 0.5 to 128
    and has to see them (sd3.5, sd3_infer.py, `vae_encode`; diffusers' page of the net has the same).
    """
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    return x * 255 * 0.5 + 0.5 if type_ == "canny" else 2 * x - 1


def latent_of(stages: Stages, values: Tensor, shifted: bool) -> Tensor:
    """The mean of its latents, `(1, C, h, w)`. shifted: as the transformer's are; else scaled alone.

    The nets that see no pooled text were trained without the shift (diffusers,
    pipelines/controlnet_sd3/pipeline_stable_diffusion_3_controlnet.py).
    """
    latent, vae = stages.encode_values(values), stages.vae.config
    return latent if shifted else latent + vae.shift_factor * vae.scaling_factor


def filling_in(stages: Stages, image: Image.Image, mask: Image.Image) -> Tensor:
    """The latents of a picture that is black where a mask "L" is white, and a channel that is 0 there and 1 elsewhere.

    As diffusers' pipeline for it does (pipeline_stable_diffusion_3_controlnet_inpainting.py).
    """
    white = torch.from_numpy(np.array(mask))[None, None].float() / 255 >= 0.5  # (1, 1, H, W)
    values = values_of(image).masked_fill(white, -1)
    latent = latent_of(stages, values, shifted=True)
    kept = 1 - F.interpolate(white.float(), size=latent.shape[2:]).to(latent)
    return torch.cat([latent, kept], dim=1)
