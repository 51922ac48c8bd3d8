"""The parity command on a file that diffusers cannot read as it is: converted for it, loaded as it is by the engine."""

import json
import tarfile
from pathlib import Path

import pytest
from sweeps import sampled

from benchmarks import parity, random_checkpoint
from weights.convert import convert

TOKENIZERS = Path(__file__).parent / "data" / "tokenizers.tar.xz"
SMALL = ["--width", "64", "--height", "64", "--steps", "2", "--t5-length", "20"]


@pytest.mark.parametrize("dtype", sampled(["bf16", "fp8-scaled"], 2))
def test_a_single_file_beside_diffusers(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Errors of every stage, in float32, with the published tokenizers; in scaled fp8 both have the same numbers."""
    with tarfile.open(TOKENIZERS) as files:
        files.extractall(tmp_path, filter="data")
    file = tmp_path / "file.safetensors"
    line = [str(file), "--model", "toy", "--layout", "single-file", "--dtype", "bf16", "--clips", "--t5"]
    monkeypatch.setattr("sys.argv", ["random_checkpoint", *line])
    random_checkpoint.main()
    if dtype != "bf16":
        file = convert(file, tmp_path / "smaller.safetensors", "single-file", dtype)
    parity.main([str(file), "--tokenizers", str(tmp_path), *SMALL])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(found[f"tokens {name}"] for name in ("clip_l", "clip_g", "t5"))
    errors = {name: value for name, value in found.items() if isinstance(value, float)}
    assert len(errors) == 12
    assert max(errors.values()) <= 1e-5
    assert found["image"]["most"] <= 1
