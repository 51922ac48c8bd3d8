"""The strips of a picture, decoded by several processes."""

import pytest
import torch
from several import several
from torch import Tensor

from mmdit.parallel.decoding import StripsOf
from mmdit.parallel.ranks import Layout, Ranks
from vae import Autoencoder, decode_in_strips
from vae.autoencoder import TOY_VAE

# Rows and columns of the latent, and rows of a strip; of the last there are fewer strips than processes.
SIZES = [(11, 6, 2), (13, 5, 3), (8, 4, 1), (9, 4, 5)]


def built() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(TOY_VAE).eval().requires_grad_(False)


def latents(rows: int, columns: int) -> Tensor:
    return torch.randn(2, TOY_VAE.latent_channels, rows, columns, generator=torch.Generator().manual_seed(rows))


def decoded(ranks: Ranks) -> list[Tensor]:
    _, line = ranks.lines(Layout(tokens=ranks.size))
    share, vae = StripsOf(line, ranks.agree, torch.device("cpu")), built()
    return [decode_in_strips(vae, latents(h, w), rows, share=share) for h, w, rows in SIZES]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.sweep), 4])
def test_the_strips_of_one_process(size: int) -> None:
    """Bit for bit."""
    threads, vae = torch.get_num_threads(), built()
    torch.set_num_threads(1)
    expected = [decode_in_strips(vae, latents(h, w), rows) for h, w, rows in SIZES]
    torch.set_num_threads(threads)
    for found in several(size, decoded):
        assert not isinstance(found, Exception), found
        assert all(map(torch.equal, found, expected))
