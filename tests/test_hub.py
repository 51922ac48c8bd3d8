"""Models of the Hugging Face hub: what is fetched for a run, what the cache gives offline, and every refusal."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors
from manifests import SMALL

from benchmarks.emoji.tokenizers import write_tokenizers
from benchmarks.random_checkpoint import write_checkpoint
from mmdit import Pipeline
from mmdit.run import main
from weights import CheckpointError, hub, open_checkpoint

ROOT = Path(__file__).parents[1]
ID = "stabilityai/stable-diffusion-3.5-medium"
COMMIT = "b940f670f0eda2d07fbb75229e779da1ad11eb80"
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
WEIGHTS = {"transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
           "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"}  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with the published files: T5 in shards, an fp16 variant of every encoder, single files, pictures."""
    root = tmp_path_factory.mktemp("hub")
    write_tokenizers(root / "words", captions=500)
    sizes = {"clip_vocab": 1024, "t5_vocab": 512}
    write_checkpoint(root / "model", tokenizers=root / "words", **sizes)
    sharded = write_checkpoint(root / "sharded", max_shard_bytes=100_000, **sizes)
    t5 = root / "model" / "text_encoder_3"
    shutil.rmtree(t5)
    shutil.copytree(sharded / "text_encoder_3", t5)
    for file in sorted(t5.glob("*.safetensors")):
        shutil.copy(file, t5 / file.name.replace("model-", "model.fp16-"))
    shutil.copy(t5 / "model.safetensors.index.json", t5 / "model.safetensors.index.fp16.json")
    for name in ("text_encoder", "text_encoder_2"):
        shutil.copy(root / "model" / name / "model.safetensors", root / "model" / name / "model.fp16.safetensors")
    for name in ("sd3.5_medium.safetensors", "README.md", "mmdit_x.png", "text_encoders/t5xxl_fp16.safetensors"):
        (root / "model" / name).parent.mkdir(exist_ok=True)
        (root / "model" / name).write_text("not needed")
    return root / "model"


class Hub:
    """A hub with one model, and a cache laid out as the package's: blobs, and links to them in a snapshot."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache, self.online = repository, cache, True
        self.asked: list[str] = []
        self.snapshot = cache / ("models--" + ID.replace("/", "--")) / "snapshots" / COMMIT

    def names(self) -> list[str]:
        return sorted(p.relative_to(self.repository).as_posix() for p in self.repository.rglob("*") if p.is_file())

    def list_repo_files(self, model: str) -> list[str]:
        assert model == ID
        if not self.online:
            raise errors.OfflineModeIsEnabled("offline")
        return self.names()

    def hf_hub_download(self, model: str, name: str, revision: str | None = None) -> str:
        assert model == ID
        # All after the first by its commit: the model may change in between.
        assert revision == (None if name == "model_index.json" else COMMIT), name
        link = self.snapshot / name
        if not link.exists():
            if not self.online:
                raise errors.LocalEntryNotFoundError("Cannot find the requested files in the disk cache")
            if name not in self.names():
                raise errors.EntryNotFoundError("404")
            self.asked.append(name)
            blob = self.cache / "blobs" / name.replace("/", "--")
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / name, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return str(link)


@pytest.fixture
def served(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The package's functions replaced by those of a Hub; nothing else of the machine's cache is seen."""
    it = Hub(repository, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", it.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", it.list_repo_files)
    monkeypatch.setenv("HF_HUB_CACHE", str(it.cache))
    monkeypatch.chdir(tmp_path)
    return it


RUN: dict[str, Any] = {"width": 64, "height": 64, "steps": 1}
LOAD: dict[str, Any] = {"dtype": "fp32", "device": "cpu"}


# ---- fetching ------------------------------------------------------------------------------------


def test_only_the_files_of_the_run_are_fetched(served: Hub) -> None:
    """Without T5 none of its weights nor its tokenizer; no variants, no single files."""
    pictures = Pipeline.load(ID, t5="off", **LOAD)("a horse", **RUN)
    weights = {name for name in served.asked if name.endswith(".safetensors")}
    assert weights == WEIGHTS
    others = {name for name in served.asked if "." in name and name not in weights}
    folders = ("transformer", "vae", "text_encoder", "text_encoder_2")
    expected = {"model_index.json", "scheduler/scheduler_config.json", *(f"{name}/config.json" for name in folders)}
    assert {name for name in others if not name.startswith("tokenizer")} == expected
    assert {name.split("/")[0] for name in others} >= {"tokenizer", "tokenizer_2"}
    assert not any(name.startswith(("tokenizer_3", "text_encoder_3")) for name in served.asked)
    local = Pipeline.load(served.repository, t5="off", **LOAD)("a horse", **RUN)
    assert pictures[0].tobytes() == local[0].tobytes()


def test_t5_comes_in_its_shards(served: Hub) -> None:
    Pipeline.load(ID, **LOAD)
    t5 = sorted(name for name in served.asked if name.startswith("text_encoder_3/"))
    assert len([name for name in t5 if name.endswith(".safetensors")]) > 1
    assert "text_encoder_3/model.safetensors.index.json" in t5
    assert not any("fp16" in name for name in t5)
    assert {name.split("/")[0] for name in served.asked} >= set(TOKENIZERS)


def test_what_is_given_apart_is_not_fetched(served: Hub, repository: Path) -> None:
    vae = repository / "vae" / "diffusion_pytorch_model.safetensors"
    Pipeline.load(ID, vae=vae, tokenizers=repository, t5="omit", **LOAD)
    assert not any(name.startswith(("vae", "tokenizer")) for name in served.asked)


def test_both_spellings_of_a_variant_index() -> None:
    """Its shards, and those of no other variant."""
    for index in ("model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"):
        own = [f"text_encoder_3/model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
        other = ["text_encoder_3/model.bf16-00001-of-00001.safetensors", "text_encoder_3/README.md"]
        names = [f"text_encoder_3/{index}", *own, *other]
        found = hub.needed(ID, {"text_encoder_3": ["transformers", "T5EncoderModel"]}, names, ["t5"], ())
        assert found == names[:3]


def test_a_model_that_leaves_a_part_out() -> None:
    assert hub.needed(ID, {"text_encoder_3": [None, None]}, ["README.md"], ["t5"], ()) == []
    with pytest.raises(CheckpointError, match=r"the model on the hub has no vae/diffusion_pytorch_model\.safetensors"):
        hub.needed(ID, {"vae": ["diffusers", "AutoencoderKL"]}, ["README.md"], ["vae"], ())


# ---- offline -------------------------------------------------------------------------------------


def test_offline_the_cache_serves(served: Hub) -> None:
    """After a run without T5: the same run again, and with T5 a line that says what is missing."""
    first = Pipeline.load(ID, t5="omit", **LOAD)("a horse", **RUN)[0]
    served.online, served.asked = False, []
    second = Pipeline.load(ID, t5="omit", **LOAD)("a horse", **RUN)[0]
    assert first.tobytes() == second.tobytes()
    assert served.asked == []
    with pytest.raises(CheckpointError, match=r"the hub cannot be reached, and the cache has no text_encoder_3/model"):
        Pipeline.load(ID, **LOAD)


def test_offline_with_an_empty_cache(served: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    served.online = False
    assert main(["a horse", "--model", ID]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {ID}: the hub cannot be reached, and model_index.json is not in the cache\n"


def test_offline_with_the_package_itself(served: Hub, tmp_path: Path) -> None:
    """In a process of its own, its cache as the package lays it out; nothing of the package is replaced."""
    hub.fetch(ID, ["transformer", "vae", "clip_l", "clip_g"], TOKENIZERS[:2])
    refs = served.snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    command = [sys.executable, "-m", "mmdit.run", "a horse", "--model", ID, "--device", "cpu", "--dtype", "fp32"]
    size = ["--width", "64", "--height", "64", "--steps", "1", "--out", str(tmp_path / "x.png")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(served.cache)}
    for t5, code, message in (("omit", 0, ""), ("on", 2, "the cache has no text_encoder_3/model.safetensors")):
        ran = subprocess.run([*command, *size, "--t5", t5], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (ran.returncode, message in ran.stderr) == (code, True), ran.stderr
    assert (tmp_path / "x.png").exists()


# ---- refusals ------------------------------------------------------------------------------------


def response(status: int) -> Mock:
    return Mock(status_code=status, headers={}, request=Mock())


REFUSALS: dict[str, tuple[Callable[[], Exception], str]] = {
    "gated": (lambda: errors.GatedRepoError("403", response=response(403)),
              f"gated: accept its licence at https://huggingface.co/{ID}, then log in here with: hf auth login"),
    "absent": (lambda: errors.RepositoryNotFoundError("404", response=response(404)),
               f"no such file or folder here, and no such model at https://huggingface.co/{ID}"),
    "no folder": (lambda: errors.EntryNotFoundError("404"), "has no model_index.json; expected a diffusers folder"),
    "server": (lambda: errors.HfHubHTTPError("502 Bad\nGateway", response=response(502)), "could not be fetched: 502"),
    "disk": (lambda: OSError("No space left on device"), "could not be fetched: No space left"),
}  # fmt: skip


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, message = REFUSALS[case]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=make()))
    assert main(["a horse", "--model", ID]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"error: {ID}: ")
    assert error.count("\n") == 1


def test_without_the_package(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.online
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"no such file or folder; for a model of .* pip install 'mmdit\[hub\]'"):
        Pipeline.load(ID)


def test_mistakes_come_before_the_download(served: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a horse", "--model", ID, "--steps", "0"]) == 2
    assert "steps is 0" in capsys.readouterr().err
    assert served.asked == []


@pytest.mark.parametrize(
    ("model", "expected"),
    [(ID, True), ("a/b", True), ("a/b.safetensors", False), ("x/y.gguf", False), ("/a/b", False), ("./a", False),
     ("../a", False), ("a", False), ("a/b/c", False), ("~/a", False), ("here/there", False)],
)  # fmt: skip
def test_what_reads_as_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, expected: bool) -> None:
    """What is on the machine is not fetched."""
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.is_id(model) == expected


# ---- tokenizers ----------------------------------------------------------------------------------


def test_tokenizers_for_a_single_file(served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--tokenizers, else the cache of any Stable Diffusion 3, as far as it has those that are needed."""
    sizes = {"clip_vocab": 1024, "t5_vocab": 512}
    single = write_checkpoint(tmp_path / "single.safetensors", layout="single-file", **sizes)
    assert main(["a horse", "--model", str(single)]) == 2
    assert "has no tokenizers: --tokenizers FOLDER names a folder with tokenizer/" in capsys.readouterr().err
    cached = served.cache / "models--stabilityai--stable-diffusion-3.5-large" / "snapshots" / "abc"
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(served.repository / name, cached / name)
    assert hub.cached_tokenizers(TOKENIZERS[:2]) == cached
    assert hub.cached_tokenizers(TOKENIZERS) is None
    from_cache = Pipeline.load(single, t5="omit", **LOAD)("a horse", **RUN)[0]
    told = Pipeline.load(single, t5="omit", tokenizers=served.repository, **LOAD)("a horse", **RUN)[0]
    assert from_cache.tobytes() == told.tobytes()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the package documents it."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub._cache() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hub._cache() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/h")
    assert hub._cache() == Path("/h/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/c")
    assert hub._cache() == Path("/c")


def test_a_snapshot_of_links_opens_as_a_folder(served: Hub, tmp_path: Path) -> None:
    """The cache's own layout, given as a folder."""
    hub.fetch(ID, ["transformer", "vae"], ())
    checkpoint = open_checkpoint(served.snapshot)
    assert checkpoint.component("vae").shapes
    assert json.loads((served.snapshot / "model_index.json").read_text())["vae"]
    whole = write_checkpoint(tmp_path / "again", **SMALL)
    assert checkpoint.component("transformer").shapes == open_checkpoint(whole).component("transformer").shapes
