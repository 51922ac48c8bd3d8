"""The autoencoder between pictures and latents."""

from vae.autoencoder import SD3_VAE, Autoencoder, VAEConfig

__all__ = ["SD3_VAE", "Autoencoder", "VAEConfig"]
