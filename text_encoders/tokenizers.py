"""Prompts to token ids, for CLIP (byte-pair encoding) and T5 (SentencePiece's unigram model).

The rules are those of the tokenizers that SD3 was published with, as `transformers` runs them:
lower-casing, special tokens that are also found inside a prompt (CLIP-G's padding token is "!", so
every exclamation mark of a prompt gets the padding's id), and T5's normalisation table.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from mmdit.common import jsons
from mmdit.common.errors import UserError
from text_encoders.inversion import Words

HINT = "--tokenizers FOLDER names a folder with tokenizer/, tokenizer_2/ and tokenizer_3/"

# CLIP's words: contractions, runs of letters, single digits, runs of anything else but spaces.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
T5_SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(100))]  # in id order, after the pieces


class TokenizerError(UserError):
    """A tokenizer's files are absent or malformed, or a prompt is no text."""


@dataclass
class Tokens:
    """A batch of tokenized prompts."""

    ids: Tensor  # (B, n) int64, start and end tokens included, padded to n
    lost: list[str]  # for every prompt, the end that did not fit, as it stands in the prompt; "" for none
    weights: Tensor | None = None  # (B, n) float32, of every token; None where all are 1


class Read(NamedTuple):
    """A prompt's tokens, neither framed nor cut."""

    text: str
    ids: list[int]  # -1 - k for row k of the vectors that words stand for
    spans: list[tuple[int, int]]  # where in the text each begins and ends
    weights: list[float] | None = None  # of each; None where all are 1


@dataclass
class PromptTokenizer:
    """What CLIP's and T5's tokenizers have in common: frame the ids, cut and pad them."""

    backend: Tokenizer
    start: list[int]  # ids put before a prompt
    end: list[int]  # ids put after it, also where it is cut
    pad: int  # id that fills up the batch
    max_length: int  # n where a call does not say

    file: ClassVar[str]  # the file that a folder of this kind of tokenizer has to have

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a tokenizer's folder of a diffusers repository. Raises TokenizerError."""
        folder = Path(folder)
        if not folder.is_dir():
            raise TokenizerError(f"{folder}: no such folder; {HINT}")
        if not (folder / cls.file).is_file() and not (folder / "tokenizer.json").is_file():
            raise TokenizerError(f"{folder / cls.file}: no such file (nor tokenizer.json); {HINT}")
        try:
            return cls.build(folder)
        except TokenizerError:
            raise
        except BaseException as error:
            if not of_package(error):
                raise
            raise TokenizerError(f"{folder}: not the files of a tokenizer: {error}") from None

    @classmethod
    def build(cls, folder: Path) -> Self:
        raise NotImplementedError

    def __call__(self, texts: list[str], length: int | None = None) -> Tokens:
        """Tokenize prompts to `length` ids each (default: `max_length`), start and end tokens included.

        Equal to transformers' call with padding="max_length", truncation=True. Raises TokenizerError for
        a prompt that is not valid Unicode and ValueError for a length without room for a prompt.
        """
        length = self.max_length if length is None else length
        return self.framed([self.read(text) for text in texts], length)

    def room(self, length: int) -> int:
        """Tokens of a prompt that `length` ids have room for; ValueError for none."""
        room = length - len(self.start) - len(self.end)
        if room < 1:
            raise ValueError(f"a token length of {length} leaves no room for a prompt")
        return room

    def read(self, text: str, weights: Sequence[float] | None = None, words: Words | None = None) -> Read:
        """The tokens of a text, which has no brackets any more.

        weights: of its characters; a token has that of the first one it stands for. So weights change no token; ComfyUI
        takes a word apart where a bracket is inside. words: those that stand for vectors.
        """
        ids, spans = list[int](), list[tuple[int, int]]()
        for begin, end, rows in words.split(text) if words else [(0, len(text), None)]:
            if rows is None:
                more, places = self.split(text[begin:end])
                ids += more
                spans += [(begin + first, begin + last) for first, last in places]
            else:
                ids += [-1 - row for row in rows]
                spans += [(begin, end)] * len(rows)
        heavy = None if weights is None else [weights[min(start, len(weights) - 1)] for start, _ in spans]
        return Read(text, ids, spans, heavy)

    def split(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and where in it each token begins and ends."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise TokenizerError(f"the prompt {text!a} is not valid Unicode") from None
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        except BaseException as error:
            if not of_package(error):
                raise
            raise TokenizerError(f"the prompt {text!a} cannot be split: {error}") from None
        return encoding.ids, encoding.offsets

    def framed(self, read: Sequence[Read], length: int, chunks: int = 1) -> Tokens:
        """Prompts as `chunks` of `length` ids, side by side, each with start, end and padding of its own.

        What a chunk has no room for goes on in the next; chunks that are left are those of an empty prompt.
        """
        room = self.room(length)
        ids, weights, lost = list[list[int]](), list[list[float]](), list[str]()
        for one in read:
            row, weighed = list[int](), list[float]()
            for begin in range(0, chunks * room, room):
                framed = [*self.start, *one.ids[begin : begin + room], *self.end]
                heavy = [1.0] * len(self.start) + (one.weights or [])[begin : begin + room]
                row += framed + [self.pad] * (length - len(framed))
                weighed += heavy + [1.0] * (length - len(heavy))
            ids.append(row)
            weights.append(weighed)
            lost.append(one.text[one.spans[chunks * room][0] :].strip() if len(one.ids) > chunks * room else "")
        plain = all(weight == 1 for row in weights for weight in row)
        tokens = torch.tensor(ids, dtype=torch.int64).reshape(len(read), chunks * length)
        return Tokens(tokens, lost, None if plain else torch.tensor(weights))


@dataclass
class CLIPTokenizer(PromptTokenizer):
    """CLIP's tokenizer, from `vocab.json` and `merges.txt` (or `tokenizer.json`)."""

    file: ClassVar[str] = "vocab.json"

    @classmethod
    def build(cls, folder: Path) -> Self:
        config = read_json(folder / "tokenizer_config.json")
        special = clip_special_tokens(folder, config)
        vocab, merges = read_clip_vocabulary(folder)
        for token in special.values():
            if token.content not in vocab:
                raise TokenizerError(f"{folder}: the vocabulary lacks the special token {token.content!r}")
        strange = next((left + right for left, right in merges if left + right not in vocab), None)
        if strange is not None:  # where it is longer than all tokens the package panics
            raise TokenizerError(f"{folder}: merges that do not fit the vocabulary: it lacks {strange!r:.60}")
        try:
            model = models.BPE(
                vocab=vocab,
                merges=merges,
                end_of_word_suffix="</w>",
                unk_token=special["unk_token"].content,
            )
        except Exception as error:  # the package raises no narrower class
            raise TokenizerError(f"{folder}: merges that do not fit the vocabulary: {error}") from None
        backend = Tokenizer(model)
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.add_special_tokens(list(special.values()))
        start, end, pad = (vocab[special[role].content] for role in ("bos_token", "eos_token", "pad_token"))
        return cls(backend, [start], [end], pad, max_length(config, 77))


@dataclass
class T5Tokenizer(PromptTokenizer):
    """T5's tokenizer, from `spiece.model` (or `tokenizer.json`).

    The pieces run in the package `tokenizers`, as in transformers, and not in SentencePiece, which finds
    no special tokens in a prompt and normalises differently: it keeps a combining mark after "ª" or "½".
    """

    file: ClassVar[str] = "spiece.model"

    @classmethod
    def build(cls, folder: Path) -> Self:
        binary = folder / cls.file
        pieces, table = read_spiece(binary) if binary.is_file() else read_t5_json(folder)
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        for token in ("<pad>", "</s>", "<unk>"):
            if token not in ids:
                raise TokenizerError(f"{folder}: the vocabulary lacks the special token {token!r}")
        pieces += [(sentinel, 0.0) for sentinel in T5_SENTINELS if sentinel not in ids]
        backend = Tokenizer(models.Unigram(pieces, unk_id=ids["<unk>"], byte_fallback=False))
        if table:
            check_table(table)
            backend.normalizer = normalizers.Precompiled(table)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
            ]
        )
        backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<pad>", "</s>", "<unk>")])
        backend.add_special_tokens([AddedToken(t, normalized=False, lstrip=True, rstrip=True) for t in T5_SENTINELS])
        config = read_json(folder / "tokenizer_config.json")
        return cls(backend, [], [ids["</s>"]], ids["<pad>"], max_length(config, 512))


def max_length(config: dict[str, Any], default: int) -> int:
    """Ids of a prompt where a call does not say. Raises ValueError where it is no number or has no room."""
    length = config.get("model_max_length", default)
    if length > 10_000:  # transformers writes 10**30 for "unknown"; no encoder here reads as many
        return default
    if type(length) is not int or length < 3:
        raise ValueError(f"model_max_length is {length!r}: expected a whole number from 3")
    return length


def clip_special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, AddedToken]:
    """The start, end, unknown and padding tokens by role, with the flags of how they match in a prompt."""
    named = {**config, **read_json(folder / "special_tokens_map.json")}
    flags = {token["content"]: token for token in config.get("added_tokens_decoder", {}).values()}
    special = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = named.get(role)
        if token is None:  # no default: the two CLIPs differ in padding, and a wrong one shows in the picture
            raise TokenizerError(f"{folder}: special_tokens_map.json and tokenizer_config.json lack {role}; {HINT}")
        token = flags.get(token, {"content": token}) if isinstance(token, str) else token
        matching = {key: token.get(key, False) for key in ("lstrip", "rstrip", "single_word", "normalized")}
        special[role] = AddedToken(token["content"], special=True, **matching)
    return special


def read_clip_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if (folder / "vocab.json").is_file():
        vocab = read_json(folder / "vocab.json")
        path = folder / "merges.txt"
        if not path.is_file():
            raise TokenizerError(f"{path}: no such file; {HINT}")
        lines = read_text(path).split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    else:
        path = folder / "tokenizer.json"
        model = read_json(path).get("model", {})
        vocab = model.get("vocab")
        merges = [line.split(" ") if isinstance(line, str) else line for line in model.get("merges", [])]
    if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
        raise TokenizerError(f"{folder}: malformed vocabulary, not an object of tokens and integer ids")
    if not all(len(merge) == 2 for merge in merges):
        raise TokenizerError(f"{path}: malformed, a merge is not two tokens with a space between")
    return vocab, [(left, right) for left, right in merges]


def read_spiece(path: Path) -> tuple[list[tuple[str, float]], bytes]:
    """The pieces with their scores, and the normaliser's table."""
    data = path.read_bytes()
    try:
        if not data:
            raise RuntimeError("empty, which sentencepiece would take for no model given")
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
        # sentencepiece does not hand out the table: ModelProto.normalizer_spec.precompiled_charsmap
        spec = dict(protobuf_fields(data)).get(3, b"")
        return pieces, dict(protobuf_fields(spec)).get(2, b"")
    except (RuntimeError, IndexError):
        raise TokenizerError(f"{path}: malformed, not a SentencePiece model; {HINT}") from None


def check_table(table: bytes) -> None:
    """Raise ValueError where the normaliser's table, the length of a trie, the trie and texts, is shorter than that.

    The package allocates what the length says, and ends the program where it cannot.
    """
    length = int.from_bytes(table[:4], "little")
    if len(table) < 4 + length or length % 4:
        raise ValueError(f"the normaliser's table claims {length} bytes of trie and has {max(0, len(table) - 4)}")


def protobuf_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of the length-delimited fields of a protocol-buffer message; passes over others."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            varint()
            continue
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        if kind == 2:
            yield number, data[at : at + size]
        at += size


def read_t5_json(folder: Path) -> tuple[list[tuple[str, float]], bytes]:
    """As `read_spiece`, from a `tokenizer.json`."""
    path = folder / "tokenizer.json"
    content = read_json(path)
    try:
        model = content["model"]
        pieces = [(str(piece), float(score)) for piece, score in model["vocab"]]
        normalizer = content.get("normalizer") or {}
        for step in normalizer.get("normalizers", [normalizer]):
            if step.get("type") == "Precompiled":
                return pieces, base64.b64decode(step["precompiled_charsmap"])
        return pieces, b""
    except (KeyError, TypeError, ValueError):
        raise TokenizerError(f"{path}: malformed, not the tokenizer of a T5") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    return jsons.read_json(path, TokenizerError)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path}: malformed, not UTF-8 text") from None


def of_package(error: BaseException) -> bool:
    """Whether an error can come of a tokenizer's files: the package raises bare Exceptions, and panics are none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
