"""What all tests may ask for."""

import tarfile
from pathlib import Path

import pytest
from manifests import DATA


@pytest.fixture(scope="session")
def published_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with tokenizer/, tokenizer_2/ and tokenizer_3/ of SD3; not to be written to."""
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(DATA / "tokenizers.tar.xz") as files:
        files.extractall(folder, filter="data")
    return folder
