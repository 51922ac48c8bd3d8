"""The autoencoder between pictures and latents."""

from vae.autoencoder import SD3_VAE, Autoencoder, VAEConfig
from vae.cpu import cpu_rows
from vae.memory import decode_peak, encode_peak, locked_places, rows_for
from vae.strips import decode_in_strips, encode_in_strips

__all__ = [
    "SD3_VAE",
    "Autoencoder",
    "VAEConfig",
    "cpu_rows",
    "decode_in_strips",
    "decode_peak",
    "encode_in_strips",
    "encode_peak",
    "locked_places",
    "rows_for",
]
