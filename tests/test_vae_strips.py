"""Decoding in strips against the plain decode and diffusers', and the memory that it takes against a count."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_storages import LiveStorages
from reference import autoencoders, relative_error, rounded
from sweeps import sampled
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vae import keep_channels_last, maps, strips
from vae.autoencoder import SD3_VAE, TOY_VAE, Autoencoder, VAEConfig
from vae.cpu import cpu_rows
from vae.maps import Place, Store, largest_map
from vae.memory import decode_peak, library_peak, locked_places, peak, rows_for
from vae.strips import decode_in_strips

# Groups of several channels, and another number of levels; one config grows wider towards the picture.
FEW_GROUPS = replace(TOY_VAE, layers_per_block=2, norm_num_groups=8, scaling_factor=0.7, shift_factor=-0.4)
WIDENING = VAEConfig((48, 24, 32), layers_per_block=1, latent_channels=4, image_channels=1, norm_num_groups=4)
CASES = [
    *((TOY_VAE, 6, 10, 2, rows) for rows in (1, 2, 3, 4, 5)),
    *((TOY_VAE, 17, 9, 1, rows) for rows in (1, 8, 16)),
    *((FEW_GROUPS, 7, 5, 2, rows) for rows in (1, 2, 6)),
    *((WIDENING, 9, 4, 1, rows) for rows in (1, 4, 8)),
    (TOY_VAE, 2, 1, 1, 1),
]
FULL = (SD3_VAE, 5, 6, 1, 2)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- the same picture ----------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "h", "w", "batch", "rows"), [*sampled(CASES, 5), FULL])
def test_strips_are_the_plain_decode_and_that_of_diffusers(
    config: VAEConfig, h: int, w: int, batch: int, rows: int
) -> None:
    ours, theirs = autoencoders(config)
    latent = _latent(config, h, w, batch)
    picture = decode_in_strips(ours, latent, rows)
    assert relative_error(picture, theirs.decode(ours.raw(latent), return_dict=False)[0]) <= 1e-5
    assert relative_error(picture, ours.decode(latent)) <= 1e-5


@pytest.mark.parametrize(("config", "h", "w", "batch", "rows"), sampled([*CASES, FULL], 5))
def test_in_float64_only_the_last_digits_differ(config: VAEConfig, h: int, w: int, batch: int, rows: int) -> None:
    """What is not rounding, a wrong edge of one strip say, is far above 1e-13; rounding is below."""
    exact = copy.deepcopy(autoencoders(config).ours).double()
    latent = _latent(config, h, w, batch).double()
    assert relative_error(decode_in_strips(exact, latent, rows, store="cpu"), exact.decode(latent)) <= 1e-13


@pytest.mark.parametrize(
    ("config", "dtype"),
    sampled([(TOY_VAE, torch.bfloat16), (FEW_GROUPS, torch.bfloat16), (TOY_VAE, torch.float16)], 3),
)
def test_half_precision_is_as_near_to_the_exact_result_as_the_plain_decode(
    config: VAEConfig, dtype: torch.dtype
) -> None:
    """Errors of both against float64 with the same rounded weights, mean over seeds and strip heights."""
    plain, stripped = [], []
    for seed in range(6):
        ours, _, exact = rounded(autoencoders(config, seed), dtype)
        assert isinstance(ours, Autoencoder)
        latent = _latent(config, 6, 5, 1, seed).to(dtype)
        picture = exact.decode(latent.double() / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        plain += [relative_error(ours.decode(latent), picture)]
        for rows in (1, 3, 4):
            found = decode_in_strips(ours, latent, rows)
            assert found.dtype == dtype
            stripped += [relative_error(found, picture)]
    assert sum(stripped) / 18 <= 1.02 * sum(plain) / 6
    assert max(stripped) <= 0.05


def test_decoding_on_a_cpu_changes_the_layout_alone() -> None:
    """Same names, same numbers, channels last; the picture is diffusers'."""
    ours, theirs = autoencoders(FEW_GROUPS)
    prepared = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    assert prepared.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    before, after = ours.state_dict(), prepared.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    for h, w in ((1, 2), (2, 3), (9, 4)):
        latent = _latent(FEW_GROUPS, h, w, 2)
        expected = theirs.decode(ours.raw(latent), return_dict=False)[0]
        assert relative_error(decode_in_strips(prepared, latent, cpu_rows(*latent.shape[2:])), expected) <= 1e-5


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 900), (3, 5), (64, 64), (180, 180)])
def test_strips_on_a_cpu_are_low(h: int, w: int) -> None:
    """At least one row, at most 768 cells unless that is one row, and two strips wherever there are two rows."""
    rows = cpu_rows(h, w)
    assert rows == 1 or rows * w <= 768
    assert 1 <= rows <= max(1, h // 2)
    assert rows == h // 2 or h == 1 or (rows + 1) * w > 768


def test_large_means_cost_no_digits() -> None:
    """With biases of 300 before the norms, differences of sums of squares in float32 are off by 3e-4 and more."""
    ours = copy.deepcopy(autoencoders(TOY_VAE).ours)
    for name, parameter in ours.decoder.named_parameters():
        if name.endswith(("conv1.bias", "conv_in.bias")):
            parameter.fill_(300.0)
    latent = _latent(TOY_VAE, 11, 6, 1)
    exact = copy.deepcopy(ours).double().decode(latent.double())
    for rows in (1, 4, 7):
        assert relative_error(decode_in_strips(ours, latent, rows), exact) <= 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_equal_bit_for_bit(dtype: torch.dtype) -> None:
    """Strips as high as the latent and the plain decode; pictures of a batch and each alone."""
    ours = copy.deepcopy(autoencoders(TOY_VAE).ours).to(dtype)
    latent = _latent(TOY_VAE, 6, 10, 2).to(dtype)
    for rows in (6, 7, 1000):
        assert torch.equal(decode_in_strips(ours, latent, rows), ours.decode(latent))
    alone = torch.cat([decode_in_strips(ours, one, 4) for one in latent.split(1)])
    assert torch.equal(decode_in_strips(ours, latent, 4), alone)


def test_statistics_without_batch_norms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of other devices, taken here."""
    ours, latent = autoencoders(FEW_GROUPS).ours, _latent(FEW_GROUPS, 7, 5, 1)
    expected = decode_in_strips(ours, latent, 3)
    monkeypatch.setattr(maps, "UPDATE_STATS", ())
    assert 0 < relative_error(decode_in_strips(ours, latent, 3), expected) <= 1e-5


@pytest.mark.parametrize("rows", [0, -1])
def test_strips_without_rows_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"a strip of {rows} rows: it needs at least 1"):
        decode_in_strips(autoencoders(TOY_VAE).ours, _latent(TOY_VAE, 6, 10, 1), rows)


def test_attention_in_parts_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, latent = copy.deepcopy(autoencoders(TOY_VAE).ours).double(), _latent(TOY_VAE, 6, 10, 1).double()
    expected = exact.decode(latent)
    monkeypatch.setattr("vae.autoencoder.QUERIES", 7)  # does not divide 60
    assert relative_error(exact.decode(latent), expected) <= 1e-13


# ---- memory --------------------------------------------------------------------------------------


def many(*case: Any) -> Any:
    """One of a long sweep."""
    return pytest.param(*case, marks=pytest.mark.sweep)


COUNTED = [
    *((SD3_VAE, 512, 512, rows, torch.bfloat16) for rows in (None, 40)),
    (TOY_VAE, 64, 256, 3, torch.float32),
    (SD3_VAE, 192, 256, 8, torch.bfloat16),
    *((TOY_VAE, 256, 256, rows, torch.float32) for rows in (None, 31)),
    (SD3_VAE, 1024, 1024, 64, torch.float32),
    *((WIDENING, 128, 64, rows, torch.float32) for rows in (None, 7)),
    (TOY_VAE, 128, 256, 1, torch.float32),
]


@pytest.mark.parametrize(
    ("config", "height", "width", "rows", "dtype"),
    [
        *sampled(COUNTED, 5),
        many(SD3_VAE, 512, 512, 8, torch.bfloat16),
        *(many(SD3_VAE, 1024, 1024, rows, torch.bfloat16) for rows in (None, 64, 13)),
        *(many(SD3_VAE, 1440, 1440, rows, torch.bfloat16) for rows in (None, 100, 32)),
        *(many(SD3_VAE, 1920, 1024, rows, torch.bfloat16) for rows in (None, 48)),
        *(many(TOY_VAE, 256, 256, rows, torch.float32) for rows in (4, 1)),
    ],
)
def test_predicted_peaks_are_those_counted(
    config: VAEConfig, height: int, width: int, rows: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors through the real code at full size; a store apart is played by copying what is loaded."""
    h, w = height // config.downscale, width // config.downscale
    expected = peak(config, h, w, rows, dtype)
    same = _count(config, h, w, rows or h, dtype)
    assert same.together == pytest.approx(expected.together, rel=0.01)
    library = library_peak(config, h, w, rows, dtype)
    assert same.together == pytest.approx(decode_peak(config, h, w, rows, dtype, store_apart=False) - library, rel=0.01)
    load = maps.Map.load
    monkeypatch.setattr(maps.Map, "load", lambda *args, **options: load(*args, **options).clone())
    monkeypatch.setattr(strips, "CACHED", strips.LAUNCHED)
    apart = _count(config, h, w, rows or h, dtype)
    if rows is not None:
        expected = peak(config, h, w, rows, dtype, gpu=True)
        assert apart.peak["device"] == pytest.approx(decode_peak(config, h, w, rows, dtype), rel=0.01)
    assert apart.peak["device"] == pytest.approx(expected.device, rel=0.01)
    assert apart.peak.get("store", 0) == pytest.approx(expected.store, rel=0.01)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_whole_decode_on_a_gpu_holds_each_norm_once(batch: int) -> None:
    """Input of 256 channels, norm, result of 128, at the picture's size; so it is with norms that keep the layout."""
    assert decode_peak(SD3_VAE, 128, 90, None, torch.bfloat16) == 2 * (2 * 256 + 128) * 1024 * 720
    assert decode_peak(SD3_VAE, 128, 90, None, torch.float32) == 4 * (2 * 256 + 128) * 1024 * 720
    found = _count(SD3_VAE, 128, 90, 128, torch.bfloat16, kept=True, batch=batch).together
    one = decode_peak(SD3_VAE, 128, 90, None, torch.bfloat16)
    assert found == pytest.approx(batch * one, rel=0.01)


class Locking:
    """A host that page-locks so many tensors and no more, and has so many numbers of memory otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tensors: int, numbers: int = 10**9) -> None:
        self.tensors, self.numbers, self.locked = tensors, numbers, []
        self.make = torch.empty
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(Tensor, "is_pinned", lambda x: any(x is each for each in self.locked))

    def empty(self, *size: Any, pin_memory: bool = False, **more: Any) -> Tensor:
        if pin_memory and len(self.locked) == self.tensors:
            raise RuntimeError("CUDA error: out of memory")
        if torch.Size(size[0] if isinstance(size[0], tuple) else size).numel() > self.numbers:
            raise RuntimeError("can't allocate memory")
        made = self.make(*size, **more)
        self.locked += [made] if pin_memory else []
        return made


@pytest.mark.parametrize(
    ("config", "h", "w"), [(TOY_VAE, 6, 10), (TOY_VAE, 3, 2), (FEW_GROUPS, 7, 5), (WIDENING, 9, 4)]
)
@pytest.mark.parametrize("most", [9, 1, 0])
def test_page_locked_places_are_used_again(
    config: VAEConfig, h: int, w: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are predicted and no more, each for the largest map; a host that allows fewer gives what it has."""
    ours, latent = autoencoders(config).ours, _latent(config, h, w, 1)
    expected = decode_in_strips(ours, latent, 2)
    host, (places, numbers) = Locking(monkeypatch, most), locked_places(config, h, w)
    store = Store(torch.device("cpu"), torch.float32, largest_map(config, h, w))
    assert torch.equal(strips._decode(ours, latent, 2, store), expected)
    assert [tensor.numel() for tensor in host.locked] == [numbers] * min(most, places)
    assert len(store._free) == len(host.locked)  # all are free again


def test_places_by_hand() -> None:
    """SD3's largest map has 256 channels at the picture's size, two maps at a time; a decoder that widens has three."""
    assert locked_places(SD3_VAE, 64, 48) == (2, 256 * 512 * 384)
    assert locked_places(WIDENING, 9, 4) == (3, 48 * 36 * 16)


def test_a_host_without_any_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Locking(monkeypatch, 0, numbers=1000)
    store = Store(torch.device("cpu"), torch.float32, 900)
    assert store.place(900).memory.shape == (900,)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        store.place(1001)


def test_nothing_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of a GPU, played on "meta" with the store there too: nothing else comes from the host or goes there.

    It would wait for all that the GPU has still to do.
    """
    with torch.device("meta"):
        vae, latent = Autoencoder(TOY_VAE).requires_grad_(False), torch.empty(1, 16, 6, 10)
    moved: list[str] = []

    class Moves(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            every = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            if len({t.device for t in every}) > 1:
                moved.append(str(func))
            return result

    monkeypatch.setattr(maps, "UPDATE_STATS", ())
    with Moves():
        decode_in_strips(vae, latent, 2, store="meta")
    assert not moved


@pytest.mark.parametrize("rows", [32, 10, 3])
def test_predicted_peaks_are_those_of_a_real_decode(rows: int) -> None:
    ours, latent = autoencoders(TOY_VAE).ours, _latent(TOY_VAE, 32, 32, 1)
    with LiveStorages(ignored=[*ours.parameters(), latent]) as count:
        decode_in_strips(ours, latent, rows)
    assert count.together == pytest.approx(peak(TOY_VAE, 32, 32, rows, torch.float32).together, rel=0.05)


@pytest.mark.parametrize(("height", "width", "gigabytes"), [(512, 512, 1.0), (1024, 1024, 1.3), (1440, 1440, 1.7)])
def test_pictures_fit_small_devices(height: int, width: int, gigabytes: float) -> None:
    """With the decoder's weights, in bfloat16."""
    with torch.device("meta"):
        weights = sum(2 * parameter.numel() for parameter in Autoencoder(SD3_VAE).decoder.parameters())
    rows = rows_for(SD3_VAE, height // 8, width // 8, torch.bfloat16, int(gigabytes * 1e9) - weights)
    assert rows is not None and rows >= 64


def test_a_library_of_a_cpu_copies_float32() -> None:
    """At SD3's step to the picture's size: 256 channels read and 256 written; strips of a quarter, a quarter of it."""
    assert library_peak(SD3_VAE, 64, 48, None, torch.float32) == 4 * (256 + 256) * 512 * 384
    assert library_peak(SD3_VAE, 64, 48, 16, torch.float32) == (256 + 256) * 512 * 384
    assert library_peak(SD3_VAE, 64, 48, None, torch.bfloat16) == 0


@pytest.mark.parametrize("store_apart", [True, False])
def test_rows_are_the_most_that_fit(store_apart: bool) -> None:
    peaks = [decode_peak(SD3_VAE, 64, 48, rows, torch.bfloat16, store_apart) for rows in range(1, 65)]
    for budget in (peaks[-1], peaks[-1] - 1, peaks[40], peaks[40] + 1000, peaks[0], peaks[0] - 1):
        fitting = [rows for rows, found in enumerate(peaks, start=1) if found <= budget]
        assert rows_for(SD3_VAE, 64, 48, torch.bfloat16, budget, store_apart) == max(fitting, default=None)


def _count(
    config: VAEConfig, h: int, w: int, rows: int, dtype: torch.dtype, kept: bool = False, batch: int = 1
) -> LiveStorages:
    """All that a decode of fake tensors makes, whole maps in the pool "store"; kept: its norms keep channels last."""
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        normal = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            vae = Autoencoder(config)
        finally:
            torch.set_default_dtype(normal)
        if kept:
            for p in vae.parameters():
                p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data
            keep_channels_last(vae)
        latent = torch.empty(batch, config.latent_channels, h, w, dtype=dtype)
        pools, place = ["device"], Store.place

        def stored(store: Store, numbers: int) -> Place:
            pools.append("store")
            values = place(store, numbers)
            pools.pop()
            return values

        patch.setattr(Store, "place", stored)
        with LiveStorages(ignored=[*vae.parameters(), latent], pool=lambda: pools[-1]) as count:
            decode_in_strips(vae, latent, rows)
    return count


def _latent(config: VAEConfig, h: int, w: int, batch: int, seed: int = 0) -> Tensor:
    shape = (batch, config.latent_channels, h, w)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
