"""Damaged tokenizers: ids that their vocabulary has, the right ones where it says the same; or one line."""

import base64
import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from fuzzing import Files, Trial, fuzz
from sweeps import sampled

from text_encoders import CLIPTokenizer, T5Tokenizer, TokenizerError

START, END = "<|startoftext|>", "<|endoftext|>"
PROMPTS = ["", "A cab, a bac!  ca ½", "b" * 40, f"a{END}b </s> <extra_id_1> 日\u0301"]
WORDS = (
    *(
        START,
        END,
        "!",
        "a",
        "b</w>",
        "c a",
        "<pad>",
        "</s>",
        "<unk>",
        "Precompiled",
        "Sequence",
        "model",
        "vocab",
        "AAAA",
    ),
    *("normalizers", "model_max_length", "lstrip", "content", "pad_token", "<extra_id_3>"),
)


def clip_files() -> Files:
    tokens = ["!", *"abc,", *(f"{letter}</w>" for letter in "abc,!"), "ca", "cab</w>", START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    special = {"bos_token": {"content": START, **flags}, "eos_token": END, "unk_token": END, "pad_token": "!"}
    config = {"model_max_length": 12, "added_tokens_decoder": {str(vocab[END]): {"content": END, **flags}}}
    return {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": b"#version: 0.2\nc a\nca b</w>\n",
        "special_tokens_map.json": json.dumps(special).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def clip_json_files() -> Files:
    """What transformers 5 saves."""
    files = clip_files()
    model = {"vocab": json.loads(files.pop("vocab.json")), "merges": [["c", "a"], "ca b</w>"]}
    del files["merges.txt"]
    return {**files, "tokenizer.json": json.dumps({"model": model}).encode()}


def t5_files(tmp_path: Path) -> Files:
    """A unigram model of a few pieces, its table of a few rules."""
    rules, model = tmp_path / "rules.tsv", io.BytesIO()
    rules.write_text("41\t61\nBD\t61 2C 62\n42\t62\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cab, a bac", "b ca, cab"] * 5), model_writer=model, vocab_size=20,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2, num_threads=1,
        normalization_rule_tsv=str(rules),
    )  # fmt: skip
    return {"spiece.model": model.getvalue(), "tokenizer_config.json": b'{"model_max_length": 16}'}


def t5_json_files(tmp_path: Path) -> Files:
    folder = tmp_path / "t5"
    folder.mkdir()
    for name, raw in t5_files(tmp_path).items():
        (folder / name).write_bytes(raw)
    T5Tokenizer.load(folder).backend.save(str(folder / "tokenizer.json"))
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    shutil.rmtree(folder)
    return files


def trial(kind: type[CLIPTokenizer] | type[T5Tokenizer], files: Files) -> Trial:
    valid: list[list[list[int]]] = []

    def load(path: Path) -> tuple[list[list[int]], set[int]]:
        tokenizer = kind.load(path)
        ids = [tokenizer(PROMPTS).ids, tokenizer(PROMPTS, 5).ids]
        assert [tuple(some.shape) for some in ids] == [(len(PROMPTS), tokenizer.max_length), (len(PROMPTS), 5)]
        return [row for some in ids for row in some.tolist()], set(tokenizer.backend.get_vocab().values())

    def check(files: Files, found: tuple[list[list[int]], set[int]]) -> None:
        ids, vocabulary = found
        valid.append(ids)
        if says(files) == says_valid:
            assert ids == valid[0]
        if "vocab.json" in files:
            vocabulary = set(json.loads(files["vocab.json"]).values())
        assert {i for row in ids for i in row} <= vocabulary
        assert all(0 <= i < 1 << 32 for i in vocabulary)

    def says(files: Files) -> dict[str, Any]:
        return {name: json.loads(raw) if name.endswith(".json") else raw for name, raw in files.items()}

    says_valid = says(files)
    return Trial(files, load, check, WORDS, errors=(TokenizerError,), facts=None)


TRIALS: dict[str, Callable[[Path], Trial]] = {
    "CLIP's tokenizer": lambda _: trial(CLIPTokenizer, clip_files()),
    "CLIP's tokenizer.json": lambda _: trial(CLIPTokenizer, clip_json_files()),
    "T5's tokenizer": lambda tmp_path: trial(T5Tokenizer, t5_files(tmp_path)),
    "T5's tokenizer.json": lambda tmp_path: trial(T5Tokenizer, t5_json_files(tmp_path)),
}


@pytest.mark.parametrize("kind", sampled(TRIALS, 2))
def test_damaged(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # threads' stacks are address space too
    fuzz(kind, TRIALS[kind](tmp_path))


@pytest.mark.parametrize("length", [4, 5, 1 << 31, (1 << 32) - 4])
def test_a_table_that_claims_too_much(tmp_path: Path, length: int) -> None:
    """The package would allocate it, and abort."""
    files = t5_json_files(tmp_path)
    table = base64.b64encode(struct.pack("<I", length) + b"abc").decode()
    content = json.loads(files["tokenizer.json"]) | {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="table claims"):
        T5Tokenizer.load(tmp_path)
