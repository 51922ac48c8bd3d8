"""TAESD3 live against diffusers' AutoencoderTiny on the same random weights, and the files that it comes in."""

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import AutoencoderTiny
from reference import randomize, relative_error
from safetensors.torch import save_file
from torch import Tensor

from mmdit.driver.loading import tiny_of
from vae.autoencoder import TOY_VAE
from vae.tiny import HALO, TinyAutoencoder, TinyConfig, TinyDecoder, TinyEncoder
from weights import CheckpointError
from weights.fill import fill
from weights.tiny import open_tiny

CPU = torch.device("cpu")


class Pair(NamedTuple):
    """Two small autoencoders with the same weights."""

    ours: TinyAutoencoder
    theirs: AutoencoderTiny


@lru_cache
def pair(width: int = 8, latent_channels: int = 16) -> Pair:
    """Shared between tests, not to be written to."""
    widths = (width,) * 4
    theirs = AutoencoderTiny(
        latent_channels=latent_channels, encoder_block_out_channels=widths, decoder_block_out_channels=widths
    )
    theirs = randomize(theirs, seed=0)
    config = TinyConfig(width, latent_channels)
    ours = TinyAutoencoder(TinyDecoder(config), TinyEncoder(config))
    ours.load_state_dict({f"{half}.{name}": t for half in ("encoder", "decoder") for name, t in own(theirs, half)})
    return Pair(ours.requires_grad_(False).eval(), theirs)


def own(theirs: AutoencoderTiny, half: str) -> list[tuple[str, Tensor]]:
    """The tensors of a half under the names of madebyollin's files: its decoder begins with a layer without weights."""
    found = []
    for name, tensor in theirs.state_dict().items():
        if name.startswith(f"{half}.layers."):
            number, rest = name.removeprefix(f"{half}.layers.").split(".", 1)
            found.append((f"{int(number) + (half == 'decoder')}.{rest}", tensor))
    return found


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("width", "channels", "batch", "h", "w"), [(8, 16, 2, 5, 9), (12, 4, 1, 8, 3), (64, 16, 1, 4, 6)]
)
def test_it_is_that_of_diffusers(width: int, channels: int, batch: int, h: int, w: int) -> None:
    """Decoder and encoder; latents far beyond 3, where the decoder bounds them."""
    ours, theirs = pair(width, channels)
    latent, image = 4 * random(batch, channels, h, w), random(batch, 3, 8 * h, 8 * w)
    assert relative_error(ours.decode(latent), theirs.decode(latent).sample) <= 1e-6
    assert relative_error(ours.encode(image), theirs.encode(image).latents) <= 1e-6


def test_every_weight_matters() -> None:
    """Without any one of them, diffusers' picture or latents are others: the comparison above sees all."""
    theirs = pair().theirs
    latent, image = random(1, 16, 6, 5), random(1, 3, 32, 24)
    picture, encoded = theirs.decode(latent).sample, theirs.encode(image).latents
    idle = []
    for name, tensor in theirs.state_dict().items():
        kept = tensor.clone()
        tensor.zero_()
        change = relative_error(theirs.decode(latent).sample, picture)
        change = max(change, relative_error(theirs.encode(image).latents, encoded))
        tensor.copy_(kept)
        idle += [name] if change < 1e-4 else []
    assert idle == []


def test_the_halo_is_what_a_row_depends_on() -> None:
    """A latent row that is no number leaves its mark in so many rows of cells above and below, and in no other."""
    decoder = randomize(TinyDecoder(TinyConfig(2, 3)).double(), seed=0)
    latent = random(1, 3, 60, 2).double()
    latent[:, :, 30] = torch.nan
    rows = torch.isnan(decoder(latent)).any(dim=3)[0].any(dim=0).unflatten(0, (60, 8)).any(dim=1)  # (60,)
    assert rows.nonzero().flatten().tolist() == [*range(30 - HALO, 30 + HALO + 1)]
    image = random(1, 3, 480, 16).double()
    image[:, :, 240:248] = torch.nan
    encoder = randomize(TinyEncoder(TinyConfig(2, 3)).double(), seed=0)
    seen = torch.isnan(encoder(image)).any(dim=3)[0].any(dim=0).nonzero().flatten().tolist()
    assert min(seen) >= 30 - HALO and max(seen) == 30 + HALO


@pytest.mark.parametrize("rows", [1, 4, 30])
def test_strips_are_exact(rows: int) -> None:
    model, latent = copy.deepcopy(pair().ours).double(), random(2, 16, 60, 2).double()
    row = 4 * 8 * 64 * 2 * 8  # bytes of a latent row: maps, channels, pixels of a cell, cells, of a number
    assert relative_error(model.decode_within(latent, (rows + 2 * HALO) * row), model.decode(latent)) <= 1e-14
    image = random(1, 3, 8 * 60, 16).double()
    assert relative_error(model.encode_within(image, (rows + 2 * HALO) * row), model.encode(image)) <= 1e-14


def test_memory_bounds_the_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many rows as there is room for beside the halo, and one where there is no room."""
    model, seen = pair().ours, list[int]()
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda latent: seen.append(latent.shape[2]) or decode(latent))
    row = 4 * 8 * 64 * 3 * 4
    latent = random(1, 16, 100, 3)
    model.decode_within(latent, 60 * row)
    assert seen == [22 + 19, 60, 60, 100 - 47, 100 - 69]
    seen.clear()
    model.decode_within(latent, 0)
    assert len(seen) == 100 and max(seen) == 39


# ---- files ---------------------------------------------------------------------------------------


def files(root: Path, change: Callable[[dict[str, Tensor]], object] = id) -> dict[str, Path]:
    """Every layout, by its name."""
    theirs = pair().theirs
    halves = {half: {name: t.clone() for name, t in own(theirs, half)} for half in ("decoder", "encoder")}
    change(halves["decoder"])
    whole = {f"{half}.{name}": t for half, tensors in halves.items() for name, t in tensors.items()}
    made = {
        "decoder alone": ({"alone": halves["decoder"]}),
        "side by side": {f"taesd3_{half}": tensors for half, tensors in halves.items()},
        "both": {"both": whole},
        "ComfyUI": {"vae": {f"taesd_{name}": tensor for name, tensor in whole.items()}},
    }
    paths = {}
    for name, parts in made.items():
        (root / name).mkdir()
        for file, tensors in parts.items():
            save_file(tensors, root / name / f"{file}.safetensors")
        paths[name] = root / name / f"{next(iter(parts))}.safetensors"
    theirs.save_pretrained(root / "folder")
    return paths | {"folder": root / "folder", "its file": root / "folder" / "diffusion_pytorch_model.safetensors"}


def test_every_layout(tmp_path: Path) -> None:
    ours, latent, image = pair().ours, random(1, 16, 3, 5), random(1, 3, 16, 24)
    for name, path in files(tmp_path).items():
        model = tiny_of(path, TOY_VAE, CPU, torch.float32)[0]()
        assert torch.equal(model.decode(latent), ours.decode(latent)), name
        if name == "decoder alone":
            with pytest.raises(ValueError, match="a decoder alone"):
                model.encode(image)
        else:
            assert torch.equal(model.encode(image), ours.encode(image)), name


def test_published_names() -> None:
    """Width 64, 16 channels: diffusers' own state dict, which is that of madebyollin/taesd3, is read without a rest."""
    theirs = AutoencoderTiny(latent_channels=16).state_dict()
    config = TinyConfig()
    ours = {"decoder": TinyDecoder(config).state_dict(), "encoder": TinyEncoder(config).state_dict()}
    for half, tensors in ours.items():
        expected = {name: t.shape for name, t in own(AutoencoderTiny(latent_channels=16), half)}
        assert {name: t.shape for name, t in tensors.items()} == expected
    assert sum(t.numel() for tensors in ours.values() for t in tensors.values()) == sum(
        t.numel() for t in theirs.values()
    )


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("19.weight"), "no TAESD3: the first or the last layer of its decoder"),
    (lambda t: t.update({"1.weight": torch.zeros(8)}), "no TAESD3: the first or the last layer of its decoder"),
    (lambda t: t.update({"1.weight": torch.zeros(0, 16, 3, 3)}), "does not fit this TinyDecoder"),
    (lambda t: t.pop("7.weight"), "1 missing: 7.weight"),
    (lambda t: t.update({"30.weight": torch.zeros(1)}), "1 unexpected: 30.weight"),
    (lambda t: t.update({"7.weight": torch.zeros(8, 8, 1, 1)}), r"7.weight \[8, 8, 1, 1\] should be \[8, 8, 3, 3\]"),
    (lambda t: t.update({"1.weight": torch.zeros(8, 4, 3, 3)}), "latents of 4 channels, expected 16"),
    (lambda t: t.clear(), "no TAESD; expected TAESD3, as taesd3_decoder.safetensors"),
])  # fmt: skip
def test_what_is_no_taesd3(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tiny_of(files(tmp_path, change)["decoder alone"], TOY_VAE, CPU, torch.float32)


def test_other_files_are_refused(tmp_path: Path) -> None:
    found = files(tmp_path)
    encoder = found["side by side"].with_name("taesd3_encoder.safetensors")
    for path, message in (
        (encoder.rename(tmp_path / "x.safetensors"), "the encoder of a TAESD alone"),
        (tmp_path / "none", "no such file"), (tmp_path, "no diffusion_pytorch_model.safetensors"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            open_tiny(path)
    (pickle := tmp_path / "taesd3_decoder.pth").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(CheckpointError, match="pickles are never opened"):
        open_tiny(pickle)
    config = found["folder"] / "config.json"
    config.write_text(config.read_text().replace('"relu"', '"silu"'))
    with pytest.raises(CheckpointError, match="act_fn is 'silu', expected 'relu'"):
        open_tiny(found["folder"])


def test_number_formats(tmp_path: Path) -> None:
    """bfloat16 as diffusers in bfloat16, from the same file."""
    part = open_tiny(files(tmp_path)["both"])["decoder"]
    with torch.device("meta"):
        module = TinyDecoder(TinyConfig(8))
    model, latent = TinyAutoencoder(fill(module, part, torch.bfloat16)), random(1, 16, 5, 4)
    exact = pair().theirs.decode(latent).sample
    ours = relative_error(model.decode(latent.bfloat16()), exact)
    theirs = AutoencoderTiny.from_pretrained(tmp_path / "folder", torch_dtype=torch.bfloat16).requires_grad_(False)
    assert ours <= 1.5 * relative_error(theirs.decode(latent.bfloat16()).sample, exact) and ours < 0.05
