"""The 16-channel, 8x autoencoder of SD3: pictures to latents and back.

References: Rombach et al. 2022 (arXiv 2112.10752, appendix on autoencoders); Esser et al. 2024 (arXiv 2403.03206,
section 5.2, 16 channels). Modules and parameters carry the names of the published file
(`decoder.up.3.block.0.conv1.weight`); `up` is indexed by resolution, so `up.3` is the smallest and runs first.

Shapes: B batch, C channels, H W rows and columns of the picture, h w of the latent (H / 8, W / 8 for four levels).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.common.layout import Layout


@dataclass(frozen=True)
class VAEConfig:
    """An autoencoder in numbers. The defaults are SD3's."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # width at each resolution, largest picture first
    layers_per_block: int = 2  # residual blocks per resolution in the encoder; the decoder has one more
    latent_channels: int = 16  # channels of a latent
    image_channels: int = 3  # red, green, blue
    norm_num_groups: int = 32  # groups of every group norm; divides every width
    scaling_factor: float = 1.5305  # latent = (raw - shift_factor) * scaling_factor has about unit variance
    shift_factor: float = 0.0609

    def __post_init__(self) -> None:
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"VAE width {width} is not a multiple of its {self.norm_num_groups} norm groups")

    @property
    def downscale(self) -> int:
        """Picture pixels per latent cell along each side (8 for four resolutions)."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, config: dict) -> "VAEConfig":
        """From the `vae/config.json` of a diffusers folder; what it leaves out keeps SD3's value."""
        known = {
            "block_out_channels": tuple,
            "layers_per_block": int,
            "latent_channels": int,
            "norm_num_groups": int,
            "scaling_factor": float,
            "shift_factor": float,
        }
        values: dict = {name: read(config[name]) for name, read in known.items() if config.get(name) is not None}
        if "in_channels" in config:
            values["image_channels"] = int(config["in_channels"])
        return cls(**values)

    @classmethod
    def from_shapes(cls, shapes: dict[str, tuple[int, ...]]) -> "VAEConfig":
        """From the tensors' shapes of a single file, which carries no config.

        Widths, depths and channels follow from the shapes; the number of norm groups, scale and shift do not, and
        are SD3's (a FLUX autoencoder has the same shapes and another scale: it cannot be told apart).
        """
        levels = len({name.split(".")[2] for name in shapes if name.startswith("encoder.down.")})
        blocks = {name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")}
        return cls(
            block_out_channels=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
            layers_per_block=len(blocks),
            latent_channels=shapes["decoder.conv_in.weight"][1],
            image_channels=shapes["encoder.conv_in.weight"][1],
        )


SD3_VAE = VAEConfig()
TOY_VAE = VAEConfig(block_out_channels=(32, 64, 64, 96), layers_per_block=1)


class Autoencoder(nn.Module):
    """Pictures in [-1, 1] to latents of about unit variance, and back.

    The latents here are those the transformer works on: `(raw - shift) * scale` of the network's own output
    (Stability `process_in`), so nobody outside this class handles the two constants.
    """

    layout = Layout(entries=("encoder", "decoder"), channels_last=True)

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent's Gaussian; the mean is what a deterministic encoding uses.

        image: `(B, 3, H, W)` in [-1, 1], H and W multiples of `config.downscale`.
        Returns two tensors `(B, latent_channels, h, w)`.
        """
        return self.gaussian(self.encoder(image))

    def gaussian(self, told: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` returns, of what the encoder tells, `(B, 2 * latent_channels, h, w)`."""
        mean, logvar = told.chunk(2, dim=1)  # (B, C, h, w) each
        std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))  # the clamp is part of the published definition
        scale, shift = self.config.scaling_factor, self.config.shift_factor
        return (mean - shift) * scale, std * scale

    def decode(self, latent: Tensor) -> Tensor:
        """latent `(B, latent_channels, h, w)` to a picture `(B, 3, H, W)`, about [-1, 1], not clamped."""
        return self.decoder(self.raw(latent))

    def raw(self, latent: Tensor) -> Tensor:
        """The latent in the units of the decoder's own input, same shape."""
        return latent / self.config.scaling_factor + self.config.shift_factor


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(widths[max(i - 1, 0)], width, config.layers_per_block, groups, last=i == len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)  # (B, C0, H, W)
        for step in self.steps():
            x = step(x)
        return self.told(x)

    def steps(self) -> Iterator[nn.Module]:
        """What comes before the middle, in order, one by one as in `Decoder.steps`."""
        for level in self.down:
            assert isinstance(level, DownLevel)
            yield from (*level.block, level.downsample)

    def told(self, x: Tensor) -> Tensor:
        """The middle and the end: x `(B, C3, h, w)` to mean and log variance, `(B, 2 * latent_channels, h, w)`."""
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            UpLevel(widths[min(i + 1, len(widths) - 1)], width, config.layers_per_block + 1, groups, last=i == 0)
            for i, width in enumerate(widths)
        )
        self.norm_out = GroupNorm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latent))  # (B, C3, h, w)
        for step in self.steps():
            x = step(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))  # (B, 3, H, W)

    def steps(self) -> Iterator[nn.Module]:
        """What follows the middle, in order: residual blocks and steps to twice the resolution.

        One by one, because a call of a whole level would hold the level's input in memory until it returns.
        """
        for level in reversed(self.up):
            assert isinstance(level, UpLevel)
            yield from (*level.block, level.upsample)


class DownLevel(nn.Module):
    """The encoder's residual blocks at one resolution, then the step to half of it, except after the last."""

    def __init__(self, width_in: int, width: int, blocks: int, groups: int, last: bool) -> None:
        super().__init__()
        self.block = residual_blocks(width_in, width, blocks, groups)
        self.downsample = nn.Identity() if last else Downsample(width)


class UpLevel(nn.Module):
    """The decoder's residual blocks at one resolution, then the step to twice it, except after the last."""

    def __init__(self, width_in: int, width: int, blocks: int, groups: int, last: bool) -> None:
        super().__init__()
        self.block = residual_blocks(width_in, width, blocks, groups)
        self.upsample = nn.Identity() if last else Upsample(width)


def residual_blocks(width_in: int, width: int, blocks: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*(ResnetBlock(width_in if i == 0 else width, width, groups) for i in range(blocks)))


class Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups)
        self.attn_1 = AttentionBlock(width, groups)
        self.block_2 = ResnetBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResnetBlock(nn.Module):
    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        y = F.silu(self.norm2(y), inplace=True)  # on a line of its own, which lets go of conv1's result
        y = self.conv2(y)
        y += self.nin_shortcut(x)
        return y


QUERIES = 4096  # latent cells whose scores are taken at a time: all of a 512x512 picture's


class AttentionBlock(nn.Module):
    """One head of attention over all latent cells; the projections are 1x1 convolutions in the published file."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # Contiguous, for only then attention needs no table of all scores (4 GB at 1440x1440 in float32).
        q, k, v = (
            rearrange(project(normed), "b c h w -> b 1 (h w) c").contiguous() for project in (self.q, self.k, self.v)
        )
        # In parts, because a backend without a fused kernel for so wide a head makes that table all the same.
        y = torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(QUERIES, dim=2)], dim=2)
        return x + self.proj_out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[2]))  # y: (B, 1, h * w, C)


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # padded right and below only, as it was trained


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class GroupNorm(nn.GroupNorm):
    def __init__(self, groups: int, width: int) -> None:
        super().__init__(groups, width, eps=1e-6)
