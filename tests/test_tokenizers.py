"""The tokenizers against transformers: the published ones, and small trained ones."""

import base64
import io
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from text_encoders import CLIPTokenizer, T5Tokenizer, TokenizerError
from text_encoders.tokenizers import read_spiece

START, END = "<|startoftext|>", "<|endoftext|>"

CORPUS = [
    "A photo of a red fox in the snow, it's 35mm film, f/1.8; don't we've they're I'm I'll he'd!",
    "an astronaut riding a horse on the moon, highly detailed, café, naïve, 1234567890",
    'the quick brown fox jumps over the lazy dog & nothing <else> (was) [seen] {here} -- "ever" again...',
] * 20

PROMPTS = [
    "",
    " ",
    "   two  spaces\tand tabs\n\nand newlines \r\n at the end   ",
    "A PHOTO of a Red FOX",
    "it's we've they're don't I'M I'LL he'd 'tis rock'n'roll 'S ''' ’s",
    "1 23 456,789 3.14 1e-5 ½ ² Ⅷ 5️⃣",
    "wow! wow!! wow!!! a!b !x",
    "&amp; &lt;b&gt; &quot;x&quot; &#39; &nbsp; <b>html</b>",
    "日本語の猫、漢字テスト。고양이 кошка γάτα قطة חתול แมว",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "cafe\u0301 café ﬁ ﬂ Ａｆｕｌｌ ß ẞ İ ı ǅ ª\u0350 º\u0314 ½\u0365",
    "nul\x00 bell\x07 esc\x1b del\x7f nel\x85 zwsp\u200b bom\ufeff nbsp\xa0 ls\u2028 ogham\u1680 idsp\u3000",
    "▁ a▁b ▁▁ _",
    "</w> a</w> <w>",
    f"literal {END} inside{END}out {START} and <|STARTOFTEXT|> <|EndOfText|> <|endoftext",
    "</s> a</s>b <s> <pad> x<pad> <unk> <unk>y",
    "<extra_id_0> a <extra_id_1>b  <extra_id_99>  <extra_id_100> ＜extra_id_3＞ ＜/s＞",
    "<extra_id_1>\u3000\u0301x <extra_id_2>\xa0\u0301 y",
    "\U000f0000 \U0010ffff \ue000 \ufffd",
    "a photo of a cat, " * 60,
    "long!!!" * 100,
    "x" * 3000,
    "猫🙂" * 200,
]
PIECES = [*PROMPTS[:-4], "\u0301", "\x85", "'s", " ", "!", END, "</s>", "<extra_id_5>", "12", "snow"]
# Text that is often not odd: characters of any plane, mixed with pieces of the list above.
ODD_TEXT = st.lists(st.text(max_size=8) | st.sampled_from(PIECES), max_size=8).map("".join)


def train_clip(folder: Path, pad: str) -> Path:
    """A CLIP vocabulary of 600 tokens in the published files' form."""
    folder.mkdir()
    reference = transformers.CLIPTokenizer(vocab={START: 0, END: 1, pad: 2}, merges=[]).backend_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    reference.train_from_iterator(CORPUS, trainer)
    model = json.loads(reference.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    words = [token for token in model["vocab"] if token not in (START, END, "!")]
    single = [t + "</w>" for t in words if len(t) == 1 and t + "</w>" not in words]
    vocab = {token: i for i, token in enumerate(["!", *words, *single, "!</w>", START, END])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")

    def flags(text: str) -> dict:
        rest = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": text == START}
        return {"content": text, **rest}

    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    added = {str(vocab[t]): {**flags(t), "special": True} for t in (pad, START, END)}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "special_tokens_map.json").write_text(json.dumps({k: flags(t) for k, t in special.items()}))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}))
    return folder


def train_t5(folder: Path) -> Path:
    """A unigram model of 150 pieces with T5's special tokens and normaliser."""
    folder.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=150,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    return folder


def t5_reference(folder: Path) -> transformers.T5TokenizerFast:
    """transformers' tokenizer of a spiece.model; reading one by itself, it would need protobuf."""
    pieces, table = read_spiece(folder / "spiece.model")
    sentinels = [
        tokenizers.AddedToken(f"<extra_id_{i}>", normalized=False, lstrip=True, rstrip=True, special=True)
        for i in range(100)
    ]
    return transformers.T5TokenizerFast(
        vocab=[*pieces, *((str(token), 0.0) for token in reversed(sentinels))],
        _spm_precompiled_charsmap=table,
        additional_special_tokens=sentinels,
        model_max_length=512,
    )


@pytest.fixture(scope="module", params=["clip_l", "clip_g", "t5", "trained_clip_l", "trained_clip_g", "trained_t5"])
def pair(request, published_tokenizers, tmp_path_factory):
    """Our tokenizer and transformers' of the same folder."""
    at = tmp_path_factory.mktemp("tokenizers") / "folder"
    folder = {
        "clip_l": lambda: published_tokenizers / "tokenizer",
        "clip_g": lambda: published_tokenizers / "tokenizer_2",
        "t5": lambda: published_tokenizers / "tokenizer_3",
        "trained_clip_l": lambda: train_clip(at, END),
        "trained_clip_g": lambda: train_clip(at, "!"),
        "trained_t5": lambda: train_t5(at),
    }[request.param]()
    if "clip" in request.param:
        return CLIPTokenizer.load(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    if request.param == "trained_t5":
        return T5Tokenizer.load(folder), t5_reference(folder)
    return T5Tokenizer.load(folder), transformers.T5TokenizerFast.from_pretrained(folder)


def expected(reference, texts, length):
    return reference(texts, padding="max_length", max_length=length, truncation=True).input_ids


@pytest.mark.parametrize("length", [77, 256, 5])
def test_prompts_as_in_transformers(pair, length):
    ours, reference = pair
    ids = ours(PROMPTS, length).ids
    assert ids.shape == (len(PROMPTS), length)
    assert str(ids.dtype) == "torch.int64"
    assert ids.tolist() == expected(reference, PROMPTS, length)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=ODD_TEXT, length=st.sampled_from([8, 77]))
def test_any_text_as_in_transformers(pair, text, length):
    ours, reference = pair
    assert ours([text], length).ids.tolist() == expected(reference, [text], length)


def test_random_characters_as_in_transformers(pair):
    """Characters of all planes, which hypothesis draws rarely."""
    ours, reference = pair
    draw = random.Random(0)
    limits = [(1, 0x7F), (0x80, 0x2FF), (0x300, 0x36F), (0x370, 0x3FFF), (0x4000, 0xD7FF), (0xE000, 0x1FFFF)]
    texts = ["".join(chr(draw.randint(*draw.choice(limits))) for _ in range(24)) for _ in range(500)]
    assert ours(texts, 120).ids.tolist() == expected(reference, texts, 120)


def test_default_length_is_the_folders(pair):
    ours, reference = pair
    assert ours(["a fox"]).ids.shape == (1, reference.model_max_length)


def test_no_prompts(pair):
    assert pair[0]([], 9).ids.shape == (0, 9)


def test_truncation_keeps_the_end_token(pair):
    ours, reference = pair
    row = ours(["a red fox in the snow " * 50], 20).ids[0].tolist()
    assert row[-1] == reference.eos_token_id
    assert reference.pad_token_id not in row[:-1]


def test_lost_text_is_the_end_of_the_prompt(pair):
    ours, reference = pair
    text = "a Red FOX, in the snow & 日本 café " * 40 + "THE END"
    before, exact = text, 0
    for length in range(6, 40):
        fits, lost = ours(["a", text], length).lost
        kept = text[: len(text) - len(lost)]
        assert fits == ""
        assert lost.endswith("THE END")
        assert text == kept + lost
        assert len(lost) <= len(before)
        before = lost
        frame = len(ours.start) + len(ours.end)
        whole = len(ours.backend.encode(kept, add_special_tokens=False).ids) + frame == length
        if kept.endswith(" ") and whole:  # a cut within a word tokenizes otherwise than the whole word
            exact += 1
            assert ours([kept], length).ids.tolist() == expected(reference, [text], length)
    assert exact >= 2


def test_nothing_is_lost_at_the_limit(pair):
    ours, _ = pair
    words = "a a a a a a"
    count = len(ours.backend.encode(words, add_special_tokens=False).ids)
    frame = len(ours.start) + len(ours.end)
    assert ours([words], count + frame).lost == [""]
    assert ours([words], count + frame - 1).lost == ["a"]


def test_a_length_without_room(pair):
    with pytest.raises(ValueError, match="no room"):
        pair[0](["a"], 1)


def test_a_prompt_that_is_no_unicode(pair):
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        pair[0](["a \ud800 b"], 9)


def test_padding_of_the_published_tokenizers(published_tokenizers):
    """CLIP-L pads with its end token, CLIP-G with id 0, which is also what it reads for every "!"."""
    clip_l = CLIPTokenizer.load(published_tokenizers / "tokenizer")(["wow! ok"]).ids[0].tolist()
    clip_g = CLIPTokenizer.load(published_tokenizers / "tokenizer_2")(["wow! ok"]).ids[0].tolist()
    t5 = T5Tokenizer.load(published_tokenizers / "tokenizer_3")(["wow"], 6).ids[0].tolist()
    assert clip_l == [49406, 2781, 256, 2481] + [49407] * 73
    assert clip_g == [49406, 2781, 0, 2481, 49407] + [0] * 72
    assert t5 == [2275, 210, 1, 0, 0, 0]


@pytest.mark.parametrize("name", ["tokenizer_3", "trained"])
def test_t5_from_either_file(published_tokenizers, tmp_path, name):
    """A folder with only spiece.model and one with only tokenizer.json give the same ids."""
    both = tmp_path / "both"
    if name == "trained":
        t5_reference(train_t5(both)).save_pretrained(both)
        assert (both / "tokenizer.json").is_file()
    else:
        shutil.copytree(published_tokenizers / name, both)
    folders = []
    for file in ("spiece.model", "tokenizer.json"):
        folder = tmp_path / file.replace(".", "_")
        folder.mkdir()
        shutil.copy(both / file, folder)
        folders.append(folder)
    one, other = (T5Tokenizer.load(folder) for folder in folders)
    assert one(PROMPTS, 200).ids.tolist() == other(PROMPTS, 200).ids.tolist()
    assert one.max_length == 512


def test_plain_text_as_in_sentencepiece(tmp_path):
    """The table and the scores that our reader takes from spiece.model are those that SentencePiece uses."""
    folder = train_t5(tmp_path / "t5")
    ours, model = T5Tokenizer.load(folder), sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    for text in [*CORPUS[:3], *PROMPTS[:10], "ﬁne Ａｆｕｌｌ ½ Ⅷ ①"]:
        assert ours([text], 400).ids[0].tolist()[: len(model.encode(text))] == model.encode(text)


def test_clip_from_tokenizer_json(tmp_path):
    """What transformers 5 saves has no vocab.json."""
    folder = train_clip(tmp_path / "clip", "!")
    saved = tmp_path / "saved"
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(saved)
    assert not (saved / "vocab.json").exists()
    reference = transformers.CLIPTokenizer.from_pretrained(saved)
    lower = [prompt.lower() for prompt in PROMPTS]
    assert CLIPTokenizer.load(saved)(lower).ids.tolist() == expected(reference, lower, 77)


def test_unknown_length_in_the_config(tmp_path):
    folder = train_clip(tmp_path / "clip", "!")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 10**30}))
    assert CLIPTokenizer.load(folder).max_length == 77


# Every broken folder: what is done to it, and what the message names.
CLIP_FAULTS = {
    "no vocab.json": (lambda f: (f / "vocab.json").unlink(), r"vocab\.json: no such file.*--tokenizers"),
    "no merges.txt": (lambda f: (f / "merges.txt").unlink(), r"merges\.txt: no such file.*--tokenizers"),
    "cut vocab.json": (lambda f: (f / "vocab.json").write_text('{"a": 1,'), r"vocab\.json: not valid JSON"),
    "binary vocab.json": (
        lambda f: (f / "vocab.json").write_bytes(b"\xff\xfe{"),
        r"vocab\.json: .*not UTF-8",
    ),
    "list in vocab.json": (
        lambda f: (f / "vocab.json").write_text("[1]"),
        r"vocab\.json: expected a JSON object, found list",
    ),
    "a token twice": (
        lambda f: (f / "vocab.json").write_text('{"a": 1, "a": 2}'),
        r"vocab\.json: .*'a' is there twice",
    ),
    "a large vocab.json": (
        lambda f: (f / "vocab.json").write_bytes(b" " * 16_000_001),
        r"vocab\.json: 16000001 bytes of JSON, at most 16000000 are read",
    ),
    "words for ids": (lambda f: (f / "vocab.json").write_text('{"a": "b"}'), "malformed vocabulary"),
    "other vocab.json": (lambda f: (f / "vocab.json").write_text('{"a": 1}'), "lacks the special token"),
    "merge of three": (lambda f: (f / "merges.txt").write_text("a b c\n"), r"merges\.txt: malformed"),
    "unknown merge": (lambda f: (f / "merges.txt").write_text("qqq zzz\n"), "merges that do not fit"),
    "no special tokens": (
        lambda f: [(f / n).unlink() for n in ("special_tokens_map.json", "tokenizer_config.json")],
        "lack bos_token",
    ),
}


@pytest.mark.parametrize("fault", CLIP_FAULTS)
def test_broken_clip_folder(tmp_path, fault):
    folder = train_clip(tmp_path / "clip", "!")
    spoil, message = CLIP_FAULTS[fault]
    spoil(folder)
    with pytest.raises(TokenizerError, match=message) as error:
        CLIPTokenizer.load(folder)
    assert "\n" not in str(error.value)


T5_FAULTS = {
    "no spiece.model": (
        lambda f: (f / "spiece.model").unlink(),
        r"spiece\.model: no such file.*--tokenizers",
    ),
    "empty": (lambda f: (f / "spiece.model").write_bytes(b""), r"spiece\.model: malformed"),
    "text": (
        lambda f: (f / "spiece.model").write_text("version https://git-lfs"),
        r"spiece\.model: malformed",
    ),
    "cut": (
        lambda f: (f / "spiece.model").write_bytes((f / "spiece.model").read_bytes()[:-7]),
        r"spiece\.model: malformed",
    ),
}


@pytest.mark.parametrize("fault", T5_FAULTS)
def test_broken_t5_folder(tmp_path, fault):
    folder = train_t5(tmp_path / "t5")
    spoil, message = T5_FAULTS[fault]
    spoil(folder)
    with pytest.raises(TokenizerError, match=message) as error:
        T5Tokenizer.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    ["{}", '{"model": []}', '{"model": {"vocab": {"a": 1}}}', '{"model": {"vocab": [["a", "b"]]}}', "{"],
)
def test_broken_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: (malformed|not valid JSON)"):
        T5Tokenizer.load(tmp_path)


def test_t5_without_its_special_tokens(tmp_path):
    table = base64.b64encode(b"").decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
    content = {"model": {"vocab": [["<pad>", 0.0], ["</s>", 0.0]]}, "normalizer": normalizer}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="lacks the special token '<unk>'"):
        T5Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", [CLIPTokenizer, T5Tokenizer])
def test_absent_folder(tmp_path, kind):
    with pytest.raises(TokenizerError, match=r"no such folder.*--tokenizers FOLDER"):
        kind.load(tmp_path / "nowhere")
