"""The demo's ControlNet before it is trained: what it begins as, and the edges that it learns from."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.emoji.train_control import LARGEST, begun, edges, transformer_of
from mmdit.control.adding import Added, adding
from mmdit.driver.building import build
from mmdit.driver.loading import DEMO
from weights.control import open_control


@torch.no_grad()
def test_it_begins_as_the_transformers_first_block_and_adds_nothing(tmp_path: Path) -> None:
    transformer = transformer_of(DEMO)
    net = begun(transformer, 1)
    draw = torch.Generator().manual_seed(0)
    latent, drawn = torch.randn(2, 2, 16, 8, 12, generator=draw)
    context, pooled = torch.randn(2, 9, 192, generator=draw), torch.randn(2, 192, generator=draw)
    given = (latent, torch.tensor([0.9, 0.2]), context, pooled)
    seen = []
    handle = transformer.joint_blocks[0].register_forward_hook(lambda *told: seen.append(told[2][0]))
    plain = transformer(*given)
    handle.remove()
    handle = net.joint_blocks[0].register_forward_hook(lambda *told: seen.append(told[2][0]))
    residuals = net(*given, drawn)
    handle.remove()
    assert torch.equal(seen[0], seen[1])
    with adding(transformer, [Added(residuals)]):
        assert torch.equal(transformer(*given), plain)
    assert 2 * sum(tensor.numel() for tensor in net.state_dict().values()) <= LARGEST
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, tmp_path / "net")
    config = build(open_control(tmp_path / "net").component).config
    assert (config.depth, config.hidden_size, config.dual_attention_blocks) == (1, 256, (0,))


def test_edges_of_a_square_are_its_border() -> None:
    """On both sides of it, by hand; none where the brightness changes little."""
    picture = np.full((8, 10, 3), 20, dtype=np.uint8)
    picture[2:6, 3:8] = 220
    found = edges(picture)
    assert found.shape == picture.shape and set(np.unique(found)) == {0, 255}
    expected = np.zeros((8, 10), dtype=bool)
    expected[1:7, 3:8] = expected[2:6, 2:9] = True
    expected[3:5, 4:7] = False
    assert (found[..., 0] > 0).tolist() == expected.tolist()
    faint = np.where(picture > 100, 40, 20).astype(np.uint8)
    assert not edges(faint).any()
