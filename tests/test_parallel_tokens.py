"""Image tokens split between processes: the velocity of one process, whatever the sizes."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from reference import draw, relative_error, transformers
from several import several, velocities

from mmdit.config import TOY

TWELVE = replace(TOY, hidden_size=96, num_heads=12, depth=3, dual_attention_blocks=(0, 2))
SIGMAS = (0.98738, 0.11, 0.5)
# rows and columns of the latent, text tokens, batch
SIZES = [(10, 6, 77, 1), (14, 18, 5, 2), (6, 2, 1, 1), (26, 22, 33, 3)]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_and_tokens(size: int) -> None:
    """Bit for bit where each process has 16 tokens: float32 products of fewer rows sum in another order."""
    model = transformers(TWELVE)[0]
    cases = [draw(TWELVE, rows, columns, text, SIGMAS[:batch]) for rows, columns, text, batch in SIZES]
    for own in several(size, velocities, model, [tuple(inputs) for inputs in cases]):
        assert not isinstance(own, Exception), own
        for found, inputs in zip(own, cases):
            expected = model(*inputs)
            assert relative_error(found, expected) < 1e-6
            if inputs.latent[0, 0].numel() // 4 >= 16 * size:
                assert torch.equal(found, expected)
