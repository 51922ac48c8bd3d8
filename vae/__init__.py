"""The autoencoder between pictures and latents."""

from typing import TYPE_CHECKING

from mmdit.common.lazy import lazy

if TYPE_CHECKING:
    from vae.autoencoder import SD3_VAE, Autoencoder, VAEConfig
    from vae.channels import keep_channels_last
    from vae.colours import Colours, fitted_colours
    from vae.cpu import cpu_rows
    from vae.memory import decode_peak, encode_peak, locked_places, rows_for
    from vae.strips import decode_in_strips, encode_in_strips
    from vae.tiny import TinyAutoencoder

__all__ = [
    "SD3_VAE",
    "Autoencoder",
    "Colours",
    "TinyAutoencoder",
    "VAEConfig",
    "cpu_rows",
    "decode_in_strips",
    "decode_peak",
    "encode_in_strips",
    "encode_peak",
    "fitted_colours",
    "keep_channels_last",
    "locked_places",
    "rows_for",
]
__getattr__ = lazy(__name__, {
    "autoencoder": ["SD3_VAE", "Autoencoder", "VAEConfig"],
    "channels": ["keep_channels_last"],
    "colours": ["Colours", "fitted_colours"],
    "cpu": ["cpu_rows"],
    "memory": ["decode_peak", "encode_peak", "locked_places", "rows_for"],
    "strips": ["decode_in_strips", "encode_in_strips"],
    "tiny": ["TinyAutoencoder"],
})  # fmt: skip
