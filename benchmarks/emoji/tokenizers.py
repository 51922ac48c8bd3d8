"""Train the demo model's tokenizers on its captions, in the file formats of the published ones.

CLIP: byte-level BPE, `vocab.json` and `merges.txt`; T5: a sentencepiece unigram model, `spiece.model`.
"""

import io
import json
from collections import Counter
from pathlib import Path
from random import Random
from tempfile import NamedTemporaryFile

import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks.emoji.scenes import random_scene
from text_encoders import T5Tokenizer

CLIP_LENGTH = 22  # the longest caption has 17 words, three commas, and the start and end tokens
T5_LENGTH = 22
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def write_tokenizers(folder: Path, captions: int = 20_000) -> None:
    """Write `tokenizer/`, `tokenizer_2/` and `tokenizer_3/` into `folder`."""
    rng = Random(0)
    texts = [random_scene(rng).caption for _ in range(captions)]
    vocabulary, merges = clip_vocabulary(texts)
    write_clip(folder / "tokenizer", vocabulary, merges, pad=EOS)
    write_clip(folder / "tokenizer_2", vocabulary, merges, pad="!")
    write_t5(folder / "tokenizer_3", texts)


def clip_vocabulary(texts: list[str]) -> tuple[list[str], list[str]]:
    """Tokens in the order of their ids, and merges in the order of their rank, as CLIP's files have them.

    First come all bytes, so that "!" is 0, then all bytes that end a word, the merges, start and end of text.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    words = (text.replace(",", " ,") for text in texts)  # as CLIP's own pattern takes them apart
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False)
    )
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    alphabet = byte_alphabet()
    tokens = alphabet + [char + "</w>" for char in alphabet] + [left + right for left, right in pairs]
    return [*dict.fromkeys(tokens), BOS, EOS], [f"{left} {right}" for left, right in pairs]


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes (GPT-2): printable ones for themselves, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def write_clip(folder: Path, tokens: list[str], merges: list[str], pad: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    write_json(folder / "special_tokens_map.json", special)
    config = {
        **special,
        "model_max_length": CLIP_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
    }
    added = {
        str(vocabulary[token]): {
            "content": token, "lstrip": False, "normalized": token == BOS, "rstrip": False,
            "single_word": False, "special": True,
        }
        for token in dict.fromkeys((pad, BOS, EOS))
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": added})


def write_t5(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    with NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as seeds:
        # Whole words to begin with: left to itself, the trainer takes the captions' few words apart.
        words = Counter(word for text in texts for word in text.replace(",", "").split())
        seeds.writelines(f"▁{word}\t{count}\n" for word, count in words.most_common())
        seeds.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=400,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_name="nmt_nfkc_cf",  # capitals read as small letters
            seed_sentencepieces_file=seeds.name,
            # Letters that no caption has, so that other words become pieces instead of one unknown.
            required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-",
            minloglevel=2,
            num_threads=1,
        )
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "special_tokens_map.json", special)
    config = {"model_max_length": T5_LENGTH, "tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    write_json(folder / "tokenizer_config.json", {**special, **config})
    # The same once more in the form that transformers reads without sentencepiece and protobuf.
    fast = T5Tokenizer.load(folder).backend
    end = ("</s>", fast.token_to_id("</s>"))
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end])
    fast.save(str(folder / "tokenizer.json"))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
