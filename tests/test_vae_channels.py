"""Group norms that keep channels last: PyTorch's own in float64 is the truth, and the layout stays."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import autoencoders, relative_error
from torch import Tensor, nn

from mmdit import Pipeline
from vae import channels, keep_channels_last
from vae.autoencoder import TOY_VAE, GroupNorm, VAEConfig
from vae.channels import group_norm

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAST = {"memory_format": torch.channels_last}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "groups", "mean"), [((1, 96, 7, 13), 32, 0.0), ((3, 64, 16, 5), 8, 30.0), ((2, 32, 1, 1), 4, 1.0)]
)
def test_it_is_group_norm_rounded_once(
    shape: tuple[int, ...], groups: int, mean: float, dtype: torch.dtype, device: str
) -> None:
    """Pictures of a batch have statistics of their own; each channel has another mean and spread."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * torch.rand(1, shape[1], 1, 1, generator=generator)
    x = (x + mean * torch.arange(1, 1 + shape[0])[:, None, None, None]).to(device, dtype).contiguous(**LAST)
    norm = GroupNorm(groups, shape[1]).to(device, dtype)
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, generator=torch.Generator(device).manual_seed(1))
    with torch.no_grad():
        found, weights = group_norm(x, norm), (norm.weight.double(), norm.bias.double())
        exact = F.group_norm(x.double(), groups, *weights, eps=1e-6)
    assert found.dtype == dtype and found.is_contiguous(**LAST)
    assert (found.double() - exact).abs().le(torch.finfo(dtype).eps * (exact.abs() + 1e-2)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_whole_decode_never_gives_the_layout_up(device: str) -> None:
    """Every convolution's input is channels last; the picture is as near to float32's as without."""
    ours = copy.deepcopy(autoencoders(TOY_VAE).ours).to(device)
    latent = torch.randn(2, 16, 6, 9, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        exact = ours.decode(latent).float()
        ours.to(torch.bfloat16)
        for p in ours.parameters():
            p.data = p.data.contiguous(**LAST) if p.ndim == 4 else p.data
        plain = ours.decode(latent.bfloat16())
        keep_channels_last(ours)
        seen: list[bool] = []
        for module in ours.decoder.modules():
            if isinstance(module, nn.Conv2d) and module is not ours.decoder.conv_in:
                module.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous(**LAST)))
        called = len([m for m in ours.decoder.modules() if isinstance(m, nn.Conv2d)]) - 1
        found = ours.decode(latent.bfloat16())
    assert seen == [True] * called
    assert relative_error(found.float(), exact) <= 1.05 * relative_error(plain.float(), exact)
    assert not torch.equal(found, plain)


def test_who_else_computes_a_norm_is_heeded() -> None:
    """Float32, another layout, gradients and a norm that is somebody's own are left to it."""
    vae = copy.deepcopy(autoencoders(VAEConfig(block_out_channels=(32,), layers_per_block=1)).ours)
    norm = vae.decoder.norm_out
    x = torch.randn(1, 32, 4, 6, generator=torch.Generator().manual_seed(0)).contiguous(**LAST)

    class Own(GroupNorm):
        def forward(self, input: Tensor) -> Tensor:
            return 0 * input

    vae.decoder.mid.block_1.norm1.__class__ = Own
    keep_channels_last(vae)
    assert torch.equal(norm(x), F.group_norm(x, 32, norm.weight, norm.bias, 1e-6))
    assert not vae.decoder.mid.block_1.norm1(x).any()
    vae.bfloat16()
    with torch.no_grad():
        usual, narrow = x.bfloat16().contiguous(), x.bfloat16()
        assert torch.equal(norm(usual), F.group_norm(usual, 32, norm.weight, norm.bias, 1e-6))
        assert torch.equal(norm(narrow), group_norm(narrow, norm))
    assert norm(x.bfloat16().requires_grad_()).requires_grad


@pytest.mark.gpu
def test_a_pipeline_on_a_gpu_decodes_so(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    whole = channels.whole_norm
    monkeypatch.setattr(channels, "whole_norm", lambda x, norm: called.append(len(x)) or whole(x, norm))
    pipe = Pipeline.load(dtype="bf16", t5="off", device="cuda")
    pipe.decode(pipe.noise(64, 64, [0]))
    assert len(called) == sum(isinstance(module, GroupNorm) for module in pipe.vae.decoder.modules())
