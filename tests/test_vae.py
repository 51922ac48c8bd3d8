"""The autoencoder live against diffusers' on the same random weights."""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from manifests import manifest, meta, shapes
from reference import VAEPair, autoencoders, relative_error, rounded, vae_json
from sweeps import sampled
from torch import Tensor, nn

from vae.autoencoder import SD3_VAE, TOY_VAE, Autoencoder, VAEConfig

# Several channels to a group at every width: alone in its group, a channel would lose its bias to the norm.
TWO_LAYERS = VAEConfig(
    block_out_channels=(32, 64, 64, 96),
    layers_per_block=2,
    norm_num_groups=8,
    scaling_factor=0.7,
    shift_factor=-0.4,
)
OTHER_GROUPS = replace(TOY_VAE, block_out_channels=(12, 24, 36), norm_num_groups=4, latent_channels=4, image_channels=1)
RGBA = VAEConfig((32, 96), 3, latent_channels=8, image_channels=4, scaling_factor=0.5)
CONFIGS = pytest.mark.parametrize(
    ("config", "rows", "columns", "batch"),
    [
        (TOY_VAE, 24, 40, 1),
        (TOY_VAE, 64, 64, 3),
        (TOY_VAE, 8, 8, 1),
        (TWO_LAYERS, 24, 40, 3),
        (TWO_LAYERS, 64, 64, 1),
        (OTHER_GROUPS, 20, 12, 3),
        (SD3_VAE, 32, 48, 1),
    ],
    ids=["toy-24x40", "toy-64x64", "toy-8x8", "two-24x40", "two-64x64", "groups-20x12", "sd3-32x48"],
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- the two networks ----------------------------------------------------------------------------


@CONFIGS
def test_encoder_is_that_of_diffusers(config: VAEConfig, rows: int, columns: int, batch: int) -> None:
    """Mean and deviation, each against diffusers' own with scale and shift applied by hand."""
    ours, theirs = autoencoders(config)
    image = _image(config, rows, columns, batch)
    mean, std = ours.encode(image)
    expected_mean, expected_std = _encode(theirs, config, image)
    assert relative_error(mean, expected_mean) <= 1e-5
    assert relative_error(std, expected_std) <= 1e-5


@CONFIGS
def test_decoder_is_that_of_diffusers(config: VAEConfig, rows: int, columns: int, batch: int) -> None:
    ours, theirs = autoencoders(config)
    latent = _latent(config, rows, columns, batch)
    image = ours.decode(latent)
    assert image.shape == (batch, config.image_channels, rows, columns)
    assert relative_error(image, _decode(theirs, config, latent)) <= 1e-5


def test_faint_signals_are_those_of_diffusers() -> None:
    """First convolutions a thousand times weaker, so that the epsilon of the group norms counts."""
    pair = VAEPair(*(copy.deepcopy(module) for module in autoencoders(TOY_VAE)))
    for module in pair:
        for conv in (module.encoder.conv_in, module.decoder.conv_in):
            for parameter in conv.parameters():
                parameter.mul_(1e-3)
    image, latent = _image(TOY_VAE, 24, 40, 1), _latent(TOY_VAE, 24, 40, 1)
    assert relative_error(pair.ours.encode(image)[0], _encode(pair.theirs, TOY_VAE, image)[0]) <= 1e-5
    assert relative_error(pair.ours.decode(latent), _decode(pair.theirs, TOY_VAE, latent)) <= 1e-5


@pytest.mark.parametrize("config", sampled([TWO_LAYERS, OTHER_GROUPS], 2))
def test_every_weight_matters_in_these_comparisons(config: VAEConfig) -> None:
    """Without any one matrix, bias or norm, diffusers' latent or picture is another."""
    model = copy.deepcopy(autoencoders(config).theirs)
    image, latent = _image(config, 24, 40, 1), _latent(config, 24, 40, 1)
    mean, std = _encode(model, config, image)
    picture = _decode(model, config, latent)
    idle = []
    for name, tensor in model.state_dict().items():
        if name.endswith("to_k.bias"):  # it is the same for all keys and drops out of the softmax
            continue
        kept = tensor.clone()
        tensor.fill_(1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0)
        if name.startswith("encoder"):
            found_mean, found_std = _encode(model, config, image)
            change = max(relative_error(found_mean, mean), relative_error(found_std, std))
        else:
            change = relative_error(_decode(model, config, latent), picture)
        if change < 1e-3:
            idle.append(name)
        tensor.copy_(kept)
    assert not idle


@pytest.mark.parametrize("config", sampled([TOY_VAE, TWO_LAYERS], 2))
def test_bfloat16_is_as_near_to_the_exact_result_as_diffusers_is(config: VAEConfig) -> None:
    """Errors of both in bfloat16 against float64 with the same rounded weights, mean over seeds."""
    off: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(6):
        ours, theirs, exact = rounded(autoencoders(config, seed), torch.bfloat16)
        image = _image(config, 32, 32, 1, seed).bfloat16()
        latent = _latent(config, 32, 32, 1, seed).bfloat16()
        mean, picture = _encode(exact, config, image.double())[0], _decode(exact, config, latent.double())
        assert ours.decode(latent).dtype == torch.bfloat16
        off["ours"] += [
            relative_error(ours.encode(image)[0], mean),
            relative_error(ours.decode(latent), picture),
        ]
        off["theirs"] += [
            relative_error(_encode(theirs, config, image)[0], mean),
            relative_error(_decode(theirs, config, latent), picture),
        ]
    for which in (0, 1):  # the encoder's, the decoder's
        assert sum(off["ours"][which::2]) <= 1.05 * sum(off["theirs"][which::2]), off
    assert max(off["ours"]) <= 0.05


def test_deviation_is_clamped_at_both_ends() -> None:
    """Against exp by hand: the logarithm of the variance is kept within -30 and 20."""
    ours = copy.deepcopy(autoencoders(TWO_LAYERS).ours)
    channels = TWO_LAYERS.latent_channels
    ours.encoder.conv_out.bias[channels:] = torch.tensor([1e4, -1e4]).repeat(channels // 2)
    _, std = ours.encode(_image(TWO_LAYERS, 24, 40, 1))
    assert torch.allclose(std[:, ::2], torch.tensor(22026.4657948 * 0.7), rtol=1e-5, atol=0.0)
    assert torch.allclose(std[:, 1::2], torch.tensor(3.0590232e-7 * 0.7), rtol=1e-5, atol=0.0)


def test_scale_and_shift_are_those_of_sd3() -> None:
    """Against the published numbers: raw 0.0609 is latent 0, and 1.5305 of latent is 1 of raw."""
    ours, theirs = autoencoders(TOY_VAE)
    latent = _latent(TOY_VAE, 24, 40, 1)
    raw = latent / 1.5305 + 0.0609
    assert relative_error(ours.decode(latent), theirs.decode(raw, return_dict=False)[0]) <= 1e-5
    image = _image(TOY_VAE, 24, 40, 1)
    expected = (theirs.encode(image, return_dict=False)[0].mean - 0.0609) * 1.5305
    assert relative_error(ours.encode(image)[0], expected) <= 1e-5


def test_batch_is_its_samples_one_by_one() -> None:
    ours, _ = autoencoders(TWO_LAYERS)
    image, latent = _image(TWO_LAYERS, 24, 40, 3), _latent(TWO_LAYERS, 24, 40, 3)
    means = torch.cat([ours.encode(one)[0] for one in image.split(1)])
    assert relative_error(ours.encode(image)[0], means) <= 1e-5
    pictures = torch.cat([ours.decode(one) for one in latent.split(1)])
    assert relative_error(ours.decode(latent), pictures) <= 1e-5


# ---- names and configs ---------------------------------------------------------------------------


def test_names_and_shapes_are_the_published_ones() -> None:
    assert _shapes(SD3_VAE) == shapes("vae.stability")


def test_published_json_gives_the_named_config() -> None:
    assert VAEConfig.from_json(manifest("configs")["vae/config.json"]) == SD3_VAE


@pytest.mark.parametrize("config", [SD3_VAE, TOY_VAE, TWO_LAYERS, OTHER_GROUPS, RGBA])
def test_shapes_and_json_give_the_config_back(config: VAEConfig) -> None:
    """From shapes all but the groups, the scale and the shift, which are then SD3's."""
    assert VAEConfig.from_json(vae_json(config)) == config
    if config.norm_num_groups == 32:
        found = VAEConfig.from_shapes(_shapes(config))
        assert found == replace(config, scaling_factor=1.5305, shift_factor=0.0609)


def test_json_without_numbers_is_sd3() -> None:
    assert VAEConfig.from_json({}) == VAEConfig.from_json({"shift_factor": None}) == SD3_VAE == VAEConfig()
    assert (SD3_VAE.downscale, OTHER_GROUPS.downscale) == (8, 4)


def test_widths_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="width 48 is not a multiple of its 32 norm groups"):
        VAEConfig(block_out_channels=(32, 48))


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TOY_VAE.latent_channels = 4  # type: ignore[misc]


# ---- the reference, by hand ----------------------------------------------------------------------


def _encode(theirs: nn.Module, config: VAEConfig, image: Tensor) -> tuple[Tensor, Tensor]:
    """diffusers' mean and deviation in our latent's units."""
    raw = theirs.encode(image, return_dict=False)[0]
    return (raw.mean - config.shift_factor) * config.scaling_factor, raw.std * config.scaling_factor


def _decode(theirs: nn.Module, config: VAEConfig, latent: Tensor) -> Tensor:
    return theirs.decode(latent / config.scaling_factor + config.shift_factor, return_dict=False)[0]


def _image(config: VAEConfig, rows: int, columns: int, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(batch, config.image_channels, rows, columns, generator=generator) - 1


def _latent(config: VAEConfig, rows: int, columns: int, batch: int, seed: int = 0) -> Tensor:
    shape = (batch, config.latent_channels, rows // config.downscale, columns // config.downscale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in meta(Autoencoder, config).state_dict().items()}
