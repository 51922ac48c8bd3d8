"""What tells one set of weights from another, and that a list is drawn anew by other weights under the same names."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from adapters import FC1, WIDTH, lora
from safetensors.torch import load_file, save_file
from sweeps import sampled
from toys import toy_folder

from mmdit.driver.loading import load_parts
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import Settings, identity
from mmdit.run import main
from weights import CheckpointError
from weights.fingerprint import of_adapter, of_file, with_adapters


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return toy_folder(
        tmp_path_factory.mktemp("prints"), defaults={"width": 32, "height": 32, "steps": 1, "t5_length": 20}
    )


def of(model: Path, **more: object) -> Settings:
    """What a picture by this model has for settings."""
    settings = Settings("a horse", model=str(model), device="cpu", dtype="fp32", **more)  # type: ignore[arg-type]
    return load_parts(settings).check(settings)


def changed(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change a file in place; its size and its time are as before."""
    before, raw = path.stat(), bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def flip(raw: bytearray) -> None:
    raw[-1] ^= 1


def other_vocabulary(raw: bytearray) -> None:
    raw += b" "


PARTS = {
    "transformer/diffusion_pytorch_model.safetensors": flip,
    "vae/diffusion_pytorch_model.safetensors": flip,
    "text_encoder/model.safetensors": flip,
    "text_encoder_2/model.safetensors": flip,
    "text_encoder_3/model.safetensors": flip,
    "tokenizer/vocab.json": other_vocabulary,
    "tokenizer_3/tokenizer_config.json": other_vocabulary,
}


@pytest.mark.parametrize("name", sampled(PARTS, 2))
def test_another_file_under_the_same_name(model: Path, tmp_path: Path, name: str) -> None:
    """A copy elsewhere is the same; one bit in any part is another model."""
    copy = shutil.copytree(model, tmp_path / "copy")
    before = of(copy)
    assert identity(before) == identity(of(model)) != identity(Settings("a horse", model=str(copy)))
    changed(copy / name, PARTS[name])
    assert identity(of(copy)) != identity(before)
    without = [of(folder, t5="omit") for folder in (copy, model)]
    assert (identity(without[0]) == identity(without[1])) == ("_3" in name)  # T5 is not there then


def test_a_configuration_counts(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    for file, key, value in (
        ("vae/config.json", "shift_factor", 0.05),
        ("scheduler/scheduler_config.json", "shift", 2.0),
    ):
        before = of(copy)
        path = copy / file
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        assert identity(of(copy)) != identity(before), file


def test_a_separate_file_counts_by_what_it_holds(model: Path, tmp_path: Path) -> None:
    """Not by its name."""
    tensors = load_file(model / "text_encoder" / "model.safetensors")
    shutil.copy(model / "text_encoder" / "model.safetensors", tmp_path / "copy.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    shutil.copy(tmp_path / "other.safetensors", tmp_path / "again.safetensors")
    seen = [identity(of(model, clip_l=str(tmp_path / f"{name}.safetensors"))) for name in ("copy", "other", "again")]
    assert seen[0] != seen[1] == seen[2]


def test_adapters(tmp_path: Path) -> None:
    """By what they hold, their order and their strength; a PEFT folder by its configuration too."""
    (tmp_path / "b").mkdir()
    for name, text in {"a": "1", "c": "1", "d": "2", "b/x.safetensors": "1", "b/adapter_config.json": "{}"}.items():
        (tmp_path / name).write_text(text)

    def seen(*loras: str) -> object:
        contents = [of_adapter(tmp_path / lora[0]) for lora in loras]
        return identity(Settings(lora=loras, weights=with_adapters("model", contents)))

    assert seen("a") == seen("c") == seen("a:1")
    assert len({seen(), seen("a"), seen("d"), seen("a", "d"), seen("d", "a"), seen("a:0.5"), seen("b")}) == 7
    before = seen("b")
    (tmp_path / "b" / "adapter_config.json").write_text('{"r": 2}')
    assert seen("b") != before
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        seen("none")


def test_adapters_that_come_and_go(model: Path, tmp_path: Path) -> None:
    """A loaded pipeline tells what is in it, also after an adapter's file was replaced or is gone."""
    for name, rank in (("a", 4), ("b", 3)):
        save_file(lora(FC1, 4 * WIDTH, WIDTH, rank=rank), tmp_path / f"{name}.safetensors")
    one, other = (tmp_path / f"{name}.safetensors" for name in "ab")
    pipe = Pipeline.load(model, lora=[str(one)], device="cpu", dtype="fp32")
    seen = [pipe.actual["weights"]]
    assert seen == [of(model, lora=(str(one),)).weights]
    pipe.adapters.remove()
    assert pipe.actual["weights"] == of(model).weights
    shutil.move(other, one)
    pipe.adapters.add(one)
    seen.append(pipe.actual["weights"])
    assert seen[0] != seen[1] == of(model, lora=(str(one),)).weights
    one.unlink()
    assert pipe.actual["weights"] == seen[1]
    assert pipe.check(replace(pipe.settings, prompt="a horse")).prompt == "a horse"


def test_large_files(tmp_path: Path) -> None:
    """Blocks of them are read; the beginning, with all names and shapes, and the end among them."""
    path, size = tmp_path / "large", 200 << 20
    seen = set()
    for at, end in ((None, size), (0, size), (size - 1, size), (size // 2, size), (None, size + 1)):
        with path.open("wb") as file:  # nothing but a hole, but for one place
            file.truncate(end)
            if at is not None:
                file.seek(at - at % (1 << 20))
                file.write(b"x" * (1 << 20))
        os.utime(path, ns=(0, len(seen)))
        seen.add(of_file(path))
    assert len(seen) == 5


def test_a_list_is_drawn_anew_by_other_weights(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model and another adapter under the names of the first; back again nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("a horse\na bear")
    shutil.copytree(model, "model")
    save_file(lora(FC1, 4 * WIDTH, WIDTH), "a.safetensors")

    def written(*options: str) -> int:
        assert main(["--prompts", "list.txt", "--model", "model", "--dtype", "fp32", "--device", "cpu", *options]) == 0
        return len(capsys.readouterr().out.splitlines())

    weights = Path("model/transformer/diffusion_pytorch_model.safetensors")
    assert [written(), written()] == [2, 0]
    changed(weights, flip)
    assert [written(), written()] == [2, 0]
    changed(weights, flip)
    assert written() == 0
    assert [written("--lora", "a.safetensors"), written("--lora", "a.safetensors:1")] == [2, 0]
    shutil.move("a.safetensors", "b.safetensors")
    assert written("--lora", "b.safetensors") == 0
    save_file(lora(FC1, 4 * WIDTH, WIDTH, rank=3), "a.safetensors")
    assert [written("--lora", "a.safetensors"), written("--lora", "a.safetensors:0.5")] == [2, 2]
