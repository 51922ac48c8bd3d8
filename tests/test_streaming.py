"""Weights that come and go with the module that runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdit import streaming


def test_a_stream_begins_anew_after_a_break() -> None:
    """Three layers, broken off in the second: the third's weights, on their way then, are not taken for the first's."""
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).requires_grad_(False)
    stored = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    source: Any = stored.__getitem__

    def bind(name: str, tensor: Tensor | None) -> None:
        layers.get_submodule(name.split(".")[0])._parameters["weight"] = tensor  # type: ignore[assignment]

    units = [streaming.Unit(layer, (f"{i}.weight",)) for i, layer in enumerate(layers)]
    x = torch.randn(2, 4)
    expected = layers(x)
    stream = streaming.Stream(units, source, bind, torch.device("cpu"), rounds=True)
    assert torch.equal(layers(x), expected)
    hook = layers[1].register_forward_pre_hook(lambda *_: pytest.fail("broken off"))
    with pytest.raises(pytest.fail.Exception):
        layers(x)
    hook.remove()
    assert torch.equal(layers(x), expected)
    stream.close()
    assert all(layer.weight is None for layer in layers)
