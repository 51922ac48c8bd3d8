"""Options of the tests, and what all of them may ask for.

    pytest          a sample: of long sweeps a few cases, of damaged files 40 of each kind; FUZZ_SEED=N takes others
    pytest --all    all cases, and 1500 damaged files of each kind

    pytest -m gpu   the tests that need CUDA, and no others

A case that belongs to a long sweep and not to its sample is marked `sweep`, one that needs CUDA `gpu`.
"""

import gc
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from manifests import DATA

# Files whose tests take longest, which begin first: the last to end is a short one, and no core waits long for it.
# Among them those that wait most themselves: what runs beside the tests has the core meanwhile.
LONG = (
    "compiled", "variants", "vae_strips", "layouts_table", "batch", "variant_page", "plans", "kept", "edits",
    "page_browser", "claims", "parallel",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="long sweeps as a whole, not a sample of them")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sweep: one of many like it; runs with --all")
    config.addinivalue_line("markers", "gpu: needs CUDA; skipped where there is none, alone with -m gpu")
    if config.getoption("--all"):
        os.environ.setdefault("FUZZ", "1500")  # see fuzzing


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU with CUDA"))
    if not config.getoption("--all"):
        left = [item for item in items if item.get_closest_marker("sweep")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def pytest_collection_finish() -> None:
    settle()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        settle()
    return result


def settle() -> None:
    """Let the garbage collector look no more through what is there: packages, and what they and a file's tests keep.

    Else it does that again and again, for a ninth of all the time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Programs that a test begins heed SIGINT: those of a shell that runs tests in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def published_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with tokenizer/, tokenizer_2/ and tokenizer_3/ of SD3; not to be written to."""
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(DATA / "tokenizers.tar.xz") as files:
        files.extractall(folder, filter="data")
    return folder
