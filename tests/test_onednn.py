"""Linear layers by oneDNN's function. In float32, which it computes on every processor: few multiply bfloat16."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import draw, relative_error, transformers
from torch import Tensor, nn

from mmdit.config import TOY
from mmdit.kernels import onednn
from mmdit.kernels.onednn import by_onednn, fused
from mmdit.model import MLP

CPU = torch.device("cpu")
CONFIG = replace(TOY, depth=3)
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Linear, str]]:
    """As on a processor that multiplies float32 in the place of bfloat16; what is computed by `fused`, as it is."""
    monkeypatch.setattr(onednn, "available", lambda device, dtype: (device.type, dtype) == ("cpu", torch.float32))
    found: list[tuple[nn.Linear, str]] = []

    def watched(layer: nn.Linear, x: Tensor, after: str, algorithm: str) -> Tensor:
        found.append((layer, after))
        return fused(layer, x, after, algorithm)

    monkeypatch.setattr(onednn, "fused", watched)
    return found


def layer(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs)
    return nn.Linear(inputs, outputs, bias).requires_grad_(False)


def exact(linear: nn.Linear, x: Tensor) -> Tensor:
    product = torch.einsum("...i,oi->...o", x.double(), linear.weight.double())
    return product if linear.bias is None else product + linear.bias.double()


def gelu(x: Tensor) -> Tensor:
    """By the tanh, as written by Hendrycks and Gimpel (arXiv 1606.08415)."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("shape", [(37,), (5, 37), (2, 3, 37)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_formula(shape: tuple[int, ...], bias: bool) -> None:
    linear, x = layer(37, 19, bias), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert relative_error(fused(linear, x, "none", ""), exact(linear, x)) <= 1e-6
    assert relative_error(fused(linear, x, "gelu", "tanh"), gelu(exact(linear, x))) <= 1e-6


@pytest.mark.skipif(not onednn.available(CPU, torch.bfloat16), reason="needs bfloat16 in oneDNN")
def test_bfloat16_is_rounded_once() -> None:
    """Half a last place, 2^-8, at most; of a product, a bias and GELU rounded each, more is lost."""
    linear, x = layer(64, 19).bfloat16(), torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for found, wanted in (
        (fused(linear, x, "none", ""), exact(linear, x)),
        (fused(linear, x, "gelu", "tanh"), gelu(exact(linear, x))),
    ):
        assert float(((found.double() - wanted).abs() / wanted.abs()).max()) <= 2**-8 * 1.01


def test_every_layer_of_a_model_is_computed_so(calls: list[tuple[nn.Linear, str]]) -> None:
    """Once each, GELU where it belongs, and the velocity is that of the plain layers."""
    plain, _ = transformers(CONFIG)
    model, inputs = copy.deepcopy(plain), draw(CONFIG, 6, 4, 9, (0.9, 0.1))
    by_onednn(model)
    with torch.no_grad():
        assert relative_error(model(*inputs), plain(*inputs)) <= 1e-6
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert sorted(id(one) for one, _ in calls) == sorted(map(id, layers))
    firsts = [module.fc1 for module in model.modules() if isinstance(module, MLP)]
    assert len(firsts) > 2
    assert sorted(id(one) for one, after in calls if after == "gelu") == sorted(map(id, firsts))


@pytest.mark.parametrize("what", ["input", "weight"])
def test_gradients_take_the_plain_layers(what: str, calls: list[tuple[nn.Linear, str]]) -> None:
    model = copy.deepcopy(transformers(CONFIG)[0])
    by_onednn(model)
    inputs = draw(CONFIG, 6, 4, 9, (0.9,))
    model.requires_grad_(what == "weight")
    context = inputs.context.requires_grad_(what == "input")
    wanted: Any = context if what == "input" else model.context_embedder.weight
    (gradient,) = torch.autograd.grad(model(*inputs).square().sum(), wanted)
    assert float(gradient.norm()) > 0
    seen = [one for one, _ in calls]
    assert model.context_embedder not in seen
    assert (model.t_embedder.mlp[0] in seen) == (what == "input")  # which sees neither


def test_other_formats_take_the_plain_layers(calls: list[tuple[nn.Linear, str]]) -> None:
    model = copy.deepcopy(transformers(CONFIG)[0]).double()
    by_onednn(model)
    latent, sigma, context, pooled = draw(CONFIG, 6, 4, 9, (0.9,))
    with torch.no_grad():
        model(latent.double(), sigma, context.double(), pooled.double())
    assert calls == []
