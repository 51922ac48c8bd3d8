"""Decoding fast on a CPU: the strips of `vae.strips`, low enough for the processor's cache.

Convolutions take three quarters of the time. They are fastest with channels last in memory, the weights' too; the rest
is faster on what the cache still holds. Measured: benchmarks/results/vae-decode-2026-11-22.md.
"""

CELLS = 768  # latent cells in a strip; twice or half as many take a few per cent longer


def cpu_rows(h: int, w: int) -> int:
    """The strip height for latents of h rows and w columns that is fastest on a CPU, for `decode_in_strips`."""
    return max(1, min(CELLS // w, h // 2))
