"""Words of a prompt that a user names: found in it, and in the transformer's context."""

import random
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conditioning import TINY_G, TINY_L

from mmdit.common.errors import SettingsError
from mmdit.driver.loading import DEMO
from mmdit.driver.pipeline import Pipeline
from text_encoders import CLIPTextEncoder, CLIPTokenizer, EncodesText, Prompt, T5Tokenizer, TextEncoder, Words
from text_encoders.subjects import Found, Subject, apart, find, occurrences, subjects_of

FOLDERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}
LENGTH, ROOM = 77, 75  # of a chunk, and of that what a prompt has


@pytest.fixture(scope="module")
def published(published_tokenizers: Path) -> TextEncoder:
    """The published tokenizers, and CLIPs that are as long as theirs."""
    clip_l, clip_g = (CLIPTokenizer.load(published_tokenizers / FOLDERS[name]) for name in ("clip_l", "clip_g"))
    t5 = T5Tokenizer.load(published_tokenizers / FOLDERS["t5"])
    return TextEncoder(clip_l, clip_g, t5, CLIPTextEncoder(TINY_L), CLIPTextEncoder(TINY_G), None)


@pytest.fixture(scope="module")
def theirs(published_tokenizers: Path) -> dict[str, Any]:
    kinds = {"clip_l": transformers.CLIPTokenizer, "clip_g": transformers.CLIPTokenizer}
    kinds["t5"] = transformers.T5TokenizerFast
    return {name: kinds[name].from_pretrained(published_tokenizers / folder) for name, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def demo() -> TextEncoder:
    reader = Pipeline.load(DEMO, dtype="fp32", device="cpu").text
    assert isinstance(reader, TextEncoder)
    return reader


def refused(*given: Any, **named: Any) -> str:
    """The message of `find`, of these arguments."""
    with pytest.raises(SettingsError) as caught:
        find(*given, **named)
    return str(caught.value)


# ---- the list ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "subjects"),
    [
        ("horse", [("horse", 1)]),
        ("red horse; bear;horse#2 ", [("red horse", 1), ("bear", 1), ("horse", 2)]),
        ("horse #1; horse # 12", [("horse", 1), ("horse", 12)]),
        (r"a\;b; C\#; C\#\#2#3", [("a;b", 1), ("C#", 1), ("C##2", 3)]),
        (r"a\\;b\c; \ ;d\\#2", [("a\\", 1), (r"b\c", 1), ("\\", 1), ("d\\", 2)]),
        ("d\\", [("d\\", 1)]),
    ],
)
def test_lists(text: str, subjects: list[tuple[str, int]]) -> None:
    assert subjects_of(text) == subjects


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, f"focus is '{text}': expected words of the prompt") for text in ("", " ", "a;", ";a", "a; ;b", "#2")),
        *(
            (f"a; b#{n}", f'focus: "b#{n}": expected a number from 1')
            for n in ("0", "", "x", "-1", "1#2", "²", "99999")
        ),
        ("horse; bear; HORSE", 'focus: "HORSE" is named twice'),
        ("a  b#2; A\tb#02", 'focus: "A\\\\tb#2" is named twice'),
        ("caf\u00e9; cafe\u0301#1", 'focus: "café" is named twice'),
        (";".join(f"a{i}" for i in range(33)), "focus names 33 subjects: expected 32 at most"),
    ],
)
def test_lists_that_are_none(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        subjects_of(text, "focus")
    told = unicodedata.normalize("NFC", str(caught.value))
    assert told.startswith(message.replace("\\\\", "\\")) and told.isprintable()
    assert len(subjects_of(";".join(f"a{i}" for i in range(32)))) == 32


def test_lists_answer_without_pytorch() -> None:
    code = "import sys, text_encoders.subjects; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# ---- in a text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("A horse, a HORSE; horses, seahorse horse2 2horse _horse_", "horse", [(2, 7), (11, 16), (50, 55)]),
        ("horse-bear (bear's)", "bear", [(6, 10), (12, 16)]),
        ("a red\t\u00a0\nhorse", "Red  horse", [(2, 13)]),
        ("no no no no no", "no no", [(0, 5), (6, 11)]),  # which do not overlap
        ("STRASSE, straße", "Straße", [(0, 7), (9, 15)]),
        ("ß ſs x", "s", []),  # no part of a character
        ("ß", "ss", [(0, 1)]),
        ("İ i", "i", [(2, 3)]),
        ("İİİ İ bear", "bear", [(6, 10)]),  # whose small letters are longer
        ("cafe\u0301 caf\u00e9 cafe", "caf\u00e9", [(0, 5), (6, 10)]),
        ("cafe\u0301 caf\u00e9 cafe", "cafe", [(11, 15)]),
        ("e\u0301horse", "horse", []),
        ("ΟΔΟΣ οδος οδοσ", "οδος", [(0, 4), (5, 9), (10, 14)]),
        ("一匹馬と熊", "馬", [(2, 3)]),
        ("a 🙂🙃 b", "🙃", [(3, 4)]),
        ("", "a", []),
        ("\ud800 a", "a", [(2, 3)]),
    ],
)
def test_where_a_phrase_is(text: str, phrase: str, found: list[tuple[int, int]]) -> None:
    assert occurrences(text, phrase) == found


WORDS = ["horse", "Horse", "HORSE", "horses", "seahorse", "bear", "café", "cafe\u0301", "ß", "SS", "ﬁne", "FINE", "馬"]
WORDS += ["İ", "red-horse", "horse's", "½", "x1", "1", "🙂", "🙂🙃", "(bear)", "...", "\u200b", "ㅎ", "ﷺ", "naïve"]
BLANKS = [" ", "  ", "\t", "\n", "\u00a0", "\u3000 ", ", ", " - ", " ! "]
PROMPTS = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(BLANKS)), max_size=14)


def is_like(word: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", word).casefold())


@settings(max_examples=150, deadline=None)
@given(PROMPTS, st.sampled_from([word for word in WORDS if word[-1].isalnum() and "-" not in word and "'" not in word]))
def test_words_by_counting_characters(parts: list[tuple[str, str]], word: str) -> None:
    """Against the places where words were put; a word with a mark inside has words inside."""
    expected, at = [], 0
    for own, blank in parts:
        inside = 0
        for piece in own.replace("-", " ").replace("'", " ").replace("(", " ").replace(")", " ").split(" "):
            if is_like(piece) == is_like(word):
                expected.append((at + inside, at + inside + len(piece)))
            inside += len(piece) + 1
        at += len(own + blank)
    assert occurrences("".join(own + blank for own, blank in parts), word) == expected


# ---- in the context ----------------------------------------------------------------------------------


def test_the_places_that_are_known(published: TextEncoder) -> None:
    """FOCUS's example: CLIP's beginning counts, T5 has none and takes " a" in two pieces."""
    horse, bear = find(published, "A horse and a bear", subjects_of("horse; bear"), 77)
    assert (horse.columns, bear.columns) == ((2, LENGTH + 1), (5, LENGTH + 5))
    assert bear == Found("bear", (5, LENGTH + 5), {"clip_l": ["bear"], "clip_g": ["bear"], "t5": ["bear"]})
    (both,) = find(published, "A Horse and a bear", [Subject("horse AND a")])
    assert both.columns == (2, 3, 4, *(LENGTH + i for i in (1, 2, 3, 4)))
    assert both.pieces == {"clip_l": ["Horse", "and", "a"], "clip_g": ["Horse", "and", "a"], "t5": both.pieces["t5"]}
    assert [word for word in both.pieces["t5"] if word != "a"] == ["Horse", "and"]


def column(encoder: str, token: int, chunks: int) -> int:
    return chunks * LENGTH + token if encoder == "t5" else token // ROOM * LENGTH + 1 + token % ROOM


@pytest.mark.parametrize("chunks", [1, 3])
def test_tokens_by_counting_those_of_words(published: TextEncoder, theirs: dict[str, Any], chunks: int) -> None:
    """Against transformers: tokens of words that blanks surround are those that each has alone."""
    draw, found = random.Random(chunks), 0
    counts = {name: {w: len(t(w, add_special_tokens=False).input_ids) for w in WORDS} for name, t in theirs.items()}
    for _ in range(60):
        words = draw.choices(WORDS, k=draw.randint(1, 12 if chunks == 1 else 70))
        text = " ".join(words)
        for _ in range(draw.randint(0, 5)):
            at = draw.randrange(len(text) + 1)
            blank = draw.choice([" ", "\t", "\n ", "\u00a0", "\u2003"])
            text = text[:at] + blank + text[at:] if text[max(0, at - 1) : at + 1].count(" ") else blank + text
        word = draw.choice([w for w in words if w.isalnum()] or ["-"])
        places = [i for i, other in enumerate(words) if is_like(other) == is_like(word)]
        inner = any(is_like(word) in is_like(w) for w in words if not is_like(w).isalnum())
        if not places or inner:
            continue
        which, expected = draw.randrange(len(places)), set()
        for name, count in counts.items():
            first = sum(count[w] for w in words[: places[which]])
            expected |= {column(name, first + i, chunks) for i in range(count[words[places[which]]])}
        (ours,) = find(published, text, [Subject(word, which + 1)], 512, chunks)
        assert ours.columns == (*sorted(expected),), (text, word)
        found += 1
    assert found > 20


TEXTS = [
    "  two  words\tand\n\nmore ",
    "A HORSE-bear, (horse's) cafe\u0301 ﬁne ½ ﷺ İstanbul 馬🙂🙃x wow!!!",
    " <extra_id_1>  bear</s>horse <|endoftext|>fox, <|startoftext|> ！",
    "\u200bbear\u200b a▁horse \x00 y\x85z",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", FOLDERS)
def test_spans_are_those_of_transformers(published: TextEncoder, theirs: dict[str, Any], text: str, name: str) -> None:
    """And so are the tokens of any words in it; a blank beside a word is none of its characters."""
    draw, checked = random.Random(0), 0
    spans = theirs[name](text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    assert published.read(name, [Prompt(text)])[0].spans == spans
    prompt = Prompt("", **{name: text})  # no words for the others
    for _ in range(60):
        begin, end = sorted(draw.sample(range(len(text) + 1), 2))
        phrase = text[begin:end].strip()
        places = occurrences(text, phrase) if phrase else []
        solid = {i for i in range(*places[-1]) if not text[i].isspace()} if places else set()
        expected = [column(name, i, 1) for i, (first, last) in enumerate(spans) if solid & {*range(first, last)}]
        if expected:
            (ours,) = find(published, prompt, [Subject(phrase, len(places))], 77)
            assert [*ours.columns] == expected, phrase
            checked += 1
    assert checked


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("mode", ["on", "off", "omit"])
def test_a_weight_changes_these_columns_and_no_other(demo: TextEncoder, mode: str, chunks: int) -> None:
    """Weights act on the features of their tokens alone, so they show where these are in what is encoded."""
    reader = replace(demo, t5_mode=mode, warn=lambda _: None)
    fill = "a red fox, " * (5 * (chunks - 1))
    for text, name in (
        (f"A {fill}(horse:1.5) and a bear, a horse", "horse"),
        (f"a horse and a, {fill}[owl]", "owl"),
        (f"horse, {fill}(horse-Bear:3)", "horse-bear"),
        (f"horse\\(, {fill}(horse:3)!", "horse#2"),
    ):
        marked = Prompt(text, emphasis=True)
        plain = marked.of("t5")[0]
        with torch.no_grad():
            ours, other = (reader.encode([one], 100, chunks).context[0] for one in (plain, marked))
        moved = (ours != other).any(dim=1).nonzero().flatten().tolist()
        (found,) = find(reader, marked, subjects_of(name), 100, chunks)
        assert moved and [*found.columns] == moved, text
        assert found.columns == find(reader, plain, subjects_of(name), 100, chunks)[0].columns
        assert ("t5" in found.pieces) == (mode == "on") and found.phrase == name


def test_texts_for_each_encoder(published: TextEncoder) -> None:
    """Those that have the words count, each by its own text."""
    prompt = Prompt("a horse", clip_g="a red big (horse:1.2)", t5="a bear. the horse, the horse", emphasis=True)

    def columns(list: str) -> list[tuple[int, ...]]:
        return [found.columns for found in find(published, prompt, subjects_of(list), 77)]

    t5 = [LENGTH + i for i, _ in enumerate(published.read("t5", [prompt])[0].ids)]
    assert published.read("t5", [prompt])[0].spans[-1] == (23, 28)
    assert columns("red; horse; horse#2") == [(2,), (2, 4, t5[-4]), (t5[-1],)]
    assert columns("bear") == [(t5[2],)]
    assert [*find(published, prompt, [Subject("red")])[0].pieces] == ["clip_g"]
    told = refused(published, prompt, [Subject("horse", 3)], option="focus")
    assert told == 'focus: "horse#3": the prompt has "horse" 2 times'
    told = refused(replace(published, t5_mode="off"), prompt, [Subject("bear")], option="focus")
    assert told == 'focus: "bear" is not in the prompt, where it has to be a word, or words, of its own'


def test_words_that_are_not_there(published: TextEncoder) -> None:
    for subject, message in (
        (Subject("bear"), "is not in"),
        (Subject("hors"), "is not in"),
        (Subject("fox", 2), "once"),
    ):
        told = refused(published, "two horses, a fox", [Subject("horses"), subject], option="attention_maps")
        assert told.startswith(f'attention_maps: "{subject.name}') and message in told
    nothing = refused(published, Prompt("a \u200b b", clip_l="a", clip_g="a"), [Subject("\u200b")])
    assert nothing == 'subjects: "\\u200b": the tokenizers leave it out'


def test_words_that_are_cut_off(published: TextEncoder) -> None:
    """By the first token that an encoder has no room for; with room for all of them nothing is."""
    text = "a " * (ROOM - 1) + "horse bear"

    def cut(name: str, t5_length: int, chunks: int = 1) -> str:
        return refused(published, text, [Subject(name)], t5_length, chunks, option="focus")

    (horse,) = find(published, text, [Subject("horse")], 512)
    assert horse.columns[0] == ROOM and cut("bear", 512).startswith('focus: "bear" is cut off for CLIP-L and CLIP-G:')
    assert "--long-prompts reads all of it" in cut("bear", 512)
    t5 = len(published.read("t5", [Prompt(text)])[0].ids) + 1  # with the end
    assert cut("bear", t5 - 1, 2).startswith('focus: "bear" is cut off for T5:')
    chunks, needed = published.needs([text])
    assert (chunks, needed) == (2, t5)
    (bear,) = find(published, text, [Subject("bear")], needed, chunks)
    assert bear.columns == (LENGTH + 1, 2 * LENGTH + t5 - 2)


def test_words_that_stand_for_vectors(published: TextEncoder) -> None:
    """Their vectors are tokens to the encoder that has them; others read the word."""
    words = {"clip_l": Words({"my-style": torch.zeros(3, 64), "x": torch.zeros(1, 64)})}
    reader = replace(published, words=words)
    text = "a X, My-Style!  horse"
    read = reader.read("clip_l", [Prompt(text)])[0]
    assert read.ids[1:2] + read.ids[3:6] == [-4, -1, -2, -3]
    assert [text[a:b] for a, b in read.spans] == ["a", "X", ",", *["My-Style"] * 3, "!", "horse"]
    style, horse, x = find(replace(reader, t5_mode="omit"), text, subjects_of("my-style; horse; x"))
    assert style.pieces == {"clip_l": ["My-Style"] * 3, "clip_g": ["My", "-", "Style"]} and style.columns == (4, 5, 6)
    assert (horse.columns, x.columns) == ((8,), (2,))
    more = replace(reader, words={"clip_l": Words({"my-style": torch.zeros(5, 64)})}, t5_mode="omit")
    assert find(more, text, [Subject("horse")])[0].columns == (8, 10)


def test_subjects_that_share_tokens(published: TextEncoder) -> None:
    def check(names: str, text: str = "a red horse, a 🙂🙃 and a horse") -> Sequence[Found]:
        found = find(published, text, subjects_of(names))
        apart(found, "focus")
        return found

    assert len(check("red; horse; horse#2; 🙂")) == 4
    for names in ("red horse; horse", "horse#2; and a horse", "🙂; 🙃"):  # T5 has one token for what it does not know
        with pytest.raises(SettingsError, match=r'^focus: ".*" and ".*" have tokens in common'):
            check(f"red; {names}" if "red" not in names else names)


def test_a_reader_of_another_kind() -> None:
    class Own:
        width = 8

    told = refused(cast(EncodesText, Own()), "a horse", [Subject("horse")], option="focus")
    assert told == "focus: the model's variant reads texts in a way of its own"
