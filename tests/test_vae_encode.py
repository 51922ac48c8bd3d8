"""Encoding in strips against the plain encode and diffusers', and the memory that it takes against a count."""

import copy
from collections.abc import Iterator

import pytest
import torch
from live_storages import LiveStorages
from reference import autoencoders, relative_error, rounded
from sweeps import sampled
from test_vae import RGBA, _encode, _image
from test_vae_strips import FEW_GROUPS, WIDENING, many
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vae import maps, strips
from vae.autoencoder import SD3_VAE, TOY_VAE, Autoencoder, VAEConfig
from vae.maps import Place, Store
from vae.memory import encode_peak, peak, rows_for
from vae.strips import encode_in_strips

CASES = pytest.mark.parametrize(
    ("config", "h", "w", "batch", "rows"),
    [
        *((TOY_VAE, 6, 5, 2, rows) for rows in (1, 2, 4, 5)),
        (TOY_VAE, 17, 9, 1, 8),
        *((FEW_GROUPS, 7, 5, 2, rows) for rows in (1, 3, 6)),
        *((WIDENING, 9, 4, 1, rows) for rows in (1, 4, 8)),
        (RGBA, 5, 3, 2, 2),
        (TOY_VAE, 2, 1, 1, 1),
    ],
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def _picture(config: VAEConfig, h: int, w: int, batch: int, seed: int = 0) -> Tensor:
    return _image(config, config.downscale * h, config.downscale * w, batch, seed)


@CASES
def test_strips_are_the_plain_encode_and_that_of_diffusers(
    config: VAEConfig, h: int, w: int, batch: int, rows: int
) -> None:
    """Mean and deviation."""
    ours, theirs = autoencoders(config)
    image = _picture(config, h, w, batch)
    found = encode_in_strips(ours, image, rows)
    for mine, plain, other in zip(found, ours.encode(image), _encode(theirs, config, image)):
        assert relative_error(mine, other) <= 1e-5
        assert relative_error(mine, plain) <= 1e-5


@CASES
def test_in_float64_only_the_last_digits_differ(config: VAEConfig, h: int, w: int, batch: int, rows: int) -> None:
    """What is not rounding, a wrong edge of one strip say, is far above 1e-13; rounding is below."""
    exact = copy.deepcopy(autoencoders(config).ours).double()
    image = _picture(config, h, w, batch).double()
    assert relative_error(encode_in_strips(exact, image, rows, store="cpu")[0], exact.encode(image)[0]) <= 1e-13


@pytest.mark.parametrize("dtype", sampled([torch.bfloat16, torch.float16], 2))
def test_half_precision_is_as_near_to_the_exact_result_as_the_plain_encode(dtype: torch.dtype) -> None:
    plain, stripped = [], []
    for seed in range(3):
        ours, theirs, exact = rounded(autoencoders(FEW_GROUPS, seed), dtype)
        image = _picture(FEW_GROUPS, 8, 5, 1, seed).to(dtype)
        mean = _encode(exact, FEW_GROUPS, image.double())[0]
        plain += [relative_error(_encode(theirs, FEW_GROUPS, image)[0], mean)]
        for rows in (1, 3):
            found = encode_in_strips(ours, image, rows)[0]
            assert found.dtype == dtype
            stripped += [relative_error(found, mean)]
    assert sum(stripped) / 6 <= 1.02 * sum(plain) / 3
    assert max(stripped) <= 0.05


def test_what_is_equal_bit_for_bit() -> None:
    """Strips as high as the picture and the plain encode; pictures of a batch and each alone."""
    ours, image = autoencoders(TOY_VAE).ours, _picture(TOY_VAE, 6, 5, 2)
    for rows in (6, 1000):
        assert torch.equal(encode_in_strips(ours, image, rows)[0], ours.encode(image)[0])
    alone = torch.cat([encode_in_strips(ours, one, 4)[0] for one in image.split(1)])
    assert torch.equal(encode_in_strips(ours, image, 4)[0], alone)


def test_strips_without_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="a strip of 0 rows: it needs at least 1"):
        encode_in_strips(autoencoders(TOY_VAE).ours, _picture(TOY_VAE, 2, 2, 1), 0)


# ---- memory --------------------------------------------------------------------------------------


COUNTED = [
    *((SD3_VAE, 512, 384, rows, torch.bfloat16) for rows in (None, 8)),
    (SD3_VAE, 512, 384, 32, torch.float32),
    *((TOY_VAE, 256, 128, rows, torch.float32) for rows in (None, 31, 4, 2)),
    *((WIDENING, 128, 64, rows, torch.float32) for rows in (None, 7)),
]


@pytest.mark.parametrize(
    ("config", "height", "width", "rows", "dtype"),
    [
        *sampled(COUNTED, 3),
        *(many(SD3_VAE, 1024, 1024, rows, torch.bfloat16) for rows in (None, 64, 13)),
        many(SD3_VAE, 1920, 1024, 48, torch.bfloat16),
    ],
)
def test_predicted_peaks_are_those_counted(
    config: VAEConfig, height: int, width: int, rows: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors through the real code at full size; a store apart is played by copying what is loaded."""
    h, w = height // config.downscale, width // config.downscale
    expected = peak(config, h, w, rows, dtype, encode=True)
    same = _count(config, h, w, rows or h, dtype)
    assert same.together == pytest.approx(expected.together, rel=0.01)
    assert same.together == pytest.approx(encode_peak(config, h, w, rows, dtype, False), rel=0.01)
    load = maps.Map.rows
    monkeypatch.setattr(maps.Map, "rows", lambda *args: load(*args).clone())
    monkeypatch.setattr(strips, "CACHED", strips.LAUNCHED)
    apart = _count(config, h, w, rows or h, dtype)
    if rows is not None:
        expected = peak(config, h, w, rows, dtype, gpu=True, encode=True)
        assert apart.peak["device"] == pytest.approx(encode_peak(config, h, w, rows, dtype), rel=0.01)
    assert apart.peak["device"] == pytest.approx(expected.device, rel=0.01)
    assert apart.peak.get("store", 0) == pytest.approx(expected.store, rel=0.01)


@pytest.mark.parametrize("rows", [32, 10, 3])
def test_predicted_peaks_are_those_of_a_real_encode(rows: int) -> None:
    ours = autoencoders(TOY_VAE).ours
    with LiveStorages(ignored=ours.parameters()) as count:
        encode_in_strips(ours, torch.zeros(1, 3, 256, 256), rows)
    assert count.together == pytest.approx(peak(TOY_VAE, 32, 32, rows, torch.float32, encode=True).together, rel=0.05)


def test_rows_are_the_most_that_fit() -> None:
    peaks = [encode_peak(SD3_VAE, 64, 48, rows, torch.bfloat16) for rows in range(1, 65)]
    for budget in (peaks[-1], peaks[40], peaks[40] - 1, peaks[0], peaks[0] - 1):
        fitting = [rows for rows, found in enumerate(peaks, start=1) if found <= budget]
        assert rows_for(SD3_VAE, 64, 48, torch.bfloat16, budget, True, encode_peak) == max(fitting, default=None)


def _count(config: VAEConfig, h: int, w: int, rows: int, dtype: torch.dtype) -> LiveStorages:
    """All that an encode of fake tensors makes, whole maps in the pool "store"."""
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        normal = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            vae = Autoencoder(config)
        finally:
            torch.set_default_dtype(normal)
        pools, place = ["device"], Store.place

        def stored(store: Store, numbers: int) -> Place:
            pools.append("store")
            values = place(store, numbers)
            pools.pop()
            return values

        patch.setattr(Store, "place", stored)
        with LiveStorages(ignored=vae.parameters(), pool=lambda: pools[-1]) as count:
            shape = (1, config.image_channels, config.downscale * h, config.downscale * w)
            encode_in_strips(vae, torch.empty(shape, dtype=dtype), rows)
    return count
