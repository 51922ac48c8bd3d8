"""What a prompt may be: texts for each encoder, weights, any length, and words that stand for vectors."""

import copy
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from reference import relative_error
from safetensors.torch import save_file
from test_pipeline import diffusers_pipeline
from torch import Tensor
from toys import toy_folder

from mmdit.common.errors import SettingsError
from mmdit.driver.loading import Parts, load_parts
from mmdit.driver.loop import Drawing, kind
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.reading import fitted
from mmdit.driver.settings import Settings, identity
from mmdit.driver.texts import texts_of
from text_encoders import EncodesText, Prompt, TextEncoder
from text_encoders.prompts import weighted
from weights import CheckpointError
from weights.embeddings import read_embedding

DEFAULTS = {"width": 64, "height": 48, "steps": 1, "cfg": 4.5, "t5_length": 20}
LENGTH, FRAME = 77, 2  # of a chunk
LONG = "a red horse, " * 60 + "a bear"  # takes chunks, and more of T5's tokens than usual


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("texts"), defaults=DEFAULTS)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.load(folder, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Iterator[StableDiffusion3Pipeline]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    made = diffusers_pipeline(folder).to(torch.float32)
    made.tokenizer.model_max_length = made.tokenizer_2.model_max_length = made.tokenizer_max_length = LENGTH
    yield made
    transformers.logging.set_verbosity(before)


# ---- a text for each encoder -----------------------------------------------------------------------


@pytest.mark.parametrize("own", [
    {"prompt_2": "a bear!", "prompt_3": "a small pig", "negative_prompt_2": "red", "negative_prompt_3": "blue"},
    {"prompt_3": "a fox on a green background", "negative_prompt_2": "a cow"},
])  # fmt: skip
def test_texts_for_each_encoder_are_those_of_diffusers(
    pipe: Pipeline, theirs: StableDiffusion3Pipeline, own: dict[str, str]
) -> None:
    """Live against `encode_prompt`: CLIP-L reads its first prompt, CLIP-G the second, T5 the third."""
    texts = {"prompt_2": None, "prompt_3": None, **own}
    with torch.no_grad():
        context, uncond, pooled, unpooled = theirs.encode_prompt(
            "a horse", negative_prompt="a pig", max_sequence_length=20, do_classifier_free_guidance=True, **texts
        )
    names = {"2": "clip_g", "3": "t5"}
    keywords = {f"{name.split('_')[0]}_{names[name[-1]]}": text for name, text in own.items()}
    trace: dict[str, Tensor] = {}
    pipe.run(pipe.asked({"prompt": "a horse", "negative": "a pig", **keywords}), trace)
    assert (
        relative_error(trace["cond.context"], context) <= 1e-5 and relative_error(trace["cond.pooled"], pooled) <= 1e-5
    )
    assert (
        relative_error(trace["uncond.context"], uncond) <= 1e-5
        and relative_error(trace["uncond.pooled"], unpooled) <= 1e-5
    )
    plain = pipe.encode(["a horse"], 20)
    assert relative_error(trace["cond.context"], plain.context) > 1e-2


def test_a_texts_identity_is_all_that_its_encoding_depends_on(pipe: Pipeline) -> None:
    base = pipe.check(replace(pipe.settings, prompt="a (horse)"))
    changes: list[dict[str, Any]] = [
        {}, {"prompt_clip_l": "x"}, {"prompt_clip_g": "x"}, {"prompt_t5": "x"}, {"emphasis": True},
        {"prompt": LONG}, {"prompt": LONG, "long_prompts": True}, {"t5_length": 21}, {"negative_t5": "x"},
    ]  # fmt: skip
    all_settings = [pipe.check(replace(base, **change)) for change in changes]
    assert (
        len({tuple(texts_of(s).values()) for s in all_settings}) == len({*map(identity, all_settings)}) == len(changes)
    )
    prompts = [texts_of(s)["prompt"] for s in all_settings]
    assert len({*prompts}) == len(changes) - 1 and prompts[-1] == prompts[0]
    # Only lengths keep pictures from being drawn together.
    assert len({kind(s) for s in all_settings}) == 3


def test_what_the_models_encoders_cannot_read_is_refused(pipe: Pipeline) -> None:
    """A text for an encoder that a variant has not, and any of it where a variant reads texts in its own way."""
    assert isinstance(pipe.text, TextEncoder)
    one, none = replace(pipe.text, clip_g=None, tokenizer_g=None), cast("EncodesText", object())
    base = pipe.check(replace(pipe.settings, prompt="a horse"))
    assert fitted(replace(base, prompt_clip_l="x", prompt_t5="y", emphasis=True), one).prompt_t5 == "y"
    assert fitted(replace(base, negative="x"), none).negative == "x"
    with pytest.raises(SettingsError, match=r"^negative_clip_g: the model has no clip_g$"):
        fitted(replace(base, negative_clip_g=""), one)
    for name, value in {"prompt_t5": "x", "emphasis": True, "long_prompts": True}.items():
        with pytest.raises(SettingsError, match=f"^{name}: the model's variant reads texts in a way of its own"):
            fitted(replace(base, **{name: value}), none)


# ---- emphasis --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "parts"), [
    ("a fox", [("a fox", 1)]),
    ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
    ("a (red: 1.25 ) fox", [("a ", 1), ("red", 1.25), (" fox", 1)]),
    ("[red]", [("red", 1 / 1.1)]),
    ("((a) b:0.5)", [("a", 1.1 * 0.5), (" b", 0.5)]),
    ("(a [b:2)]", [("a ", 2), ("b", 2 / 1.1)]),
    (r"\(a\) \[b\] \\c \d", [(r"(a) [b] \c \d", 1)]),
    ("(a", [("a", 1.1)]),
    ("a) ] :2) (b:c)", [("a) ] :2) ", 1), ("b:c", 1.1)]),
    ("(a:-1)(b:+.5)(c:1.2.3)", [("a", -1), ("b", 0.5), ("c:1.2.3", 1.1)]),
    ("()", []), ("", []),
])  # fmt: skip
def test_weights_as_they_are_written(text: str, parts: list[tuple[str, float]]) -> None:
    found = weighted(text)
    assert [part for part, _ in found] == [part for part, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


def by_hand(text: str) -> list[tuple[str, float]]:
    """Every character with its weight: first all pairs of brackets, then for each character those around it."""
    kept, pairs, opened = [], [], {"(": [], "[": []}
    i = 0
    while i < len(text):
        c, rest = text[i], text[i + 1 :]
        i += 1
        if c == "\\" and rest[:1] and rest[0] in "()[]\\":
            kept.append(rest[0])
            i += 1
        elif c in opened:
            opened[c].append(len(kept))
        elif c == ")" and opened["("]:
            pairs.append((opened["("].pop(), len(kept), 1.1))
        elif c == "]" and opened["["]:
            pairs.append((opened["["].pop(), len(kept), 1 / 1.1))
        elif c == ":" and opened["("] and ")" in rest and number(rest[: rest.index(")")]) is not None:
            pairs.append((opened["("].pop(), len(kept), number(rest[: rest.index(")")])))
            i += rest.index(")") + 1
        else:
            kept.append(c)
    pairs += [(begin, len(kept), 1.1) for begin in opened["("]]
    pairs += [(begin, len(kept), 1 / 1.1) for begin in opened["["]]
    return [(c, math.prod(f for begin, end, f in pairs if begin <= k < end)) for k, c in enumerate(kept)]


def number(text: str) -> float | None:
    if not {*text.strip()} <= {*"+-.0123456789"}:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def test_weights_against_a_parser_written_otherwise() -> None:
    """Two thousand random texts of brackets, nested, crossed and alone."""
    random_ = random.Random(0)
    pieces = [
        "(",
        ")",
        "[",
        "]",
        ":",
        ":1.2)",
        ": 0.5 )",
        ":-1)",
        ":+)",
        ":1.",
        "\\",
        "\\(",
        "a",
        "b c",
        " ",
        "2",
        "馬",
    ]
    for _ in range(2000):
        text = "".join(random_.choices(pieces, k=random_.randint(0, 12)))
        found, expected = [(c, w) for part, w in weighted(text) for c in part], by_hand(text)
        assert [c for c, _ in found] == [c for c, _ in expected], text
        assert [w for _, w in found] == pytest.approx([w for _, w in expected]), text


def test_weights_that_are_too_large(pipe: Pipeline) -> None:
    for text in ("(a:101)", "(a:-1000)", "(" * 60 + "a", f"(a:{'9' * 400})"):
        with pytest.raises(SettingsError, match=r'^the prompt gives "a" a weight of .*: expected -100 to 100$'):
            pipe("x", negative_t5=text, emphasis=True)
        pipe.check(replace(pipe.settings, negative_t5=text))
    assert weighted("(a:100)") == [("a", 100)]


@pytest.mark.parametrize("t5", ["on", "omit"])
def test_weights_act_between_the_empty_prompt_and_this(pipe: Pipeline, t5: str) -> None:
    """empty + weight (features - empty), written out token by token; tokens and pooled vector are the plain text's."""
    reader = replace(pipe.text, t5_mode=t5)
    with torch.no_grad():
        found = reader.encode([Prompt("a (red:1.5) [[horse]] (and a:0)", emphasis=True), "a pig"], 12)
        plain, empty = reader.encode(["a red horse and a", "a pig"], 12), reader.encode([""], 12)
    weights = [1.0, 1.5, 1 / 1.21, 0.0, 0.0]  # of the words, one token each
    expected = plain.context.double()
    for first in (1, LENGTH):  # the token after CLIP's start, and T5's first
        for at, weight in enumerate(weights, first):
            if at < expected.shape[1]:
                origin = empty.context[0, at].double()
                expected[0, at] = origin + weight * (expected[0, at] - origin)
    assert all(torch.equal(found.tokens[name], ids) for name, ids in plain.tokens.items())
    assert relative_error(found.context, expected) <= 1e-6
    assert relative_error(found.context[:1], plain.context[:1]) > 1e-2
    assert relative_error(found.context[1:], plain.context[1:]) <= 1e-6  # of the same batch, without weights
    assert relative_error(found.pooled, plain.pooled) <= 1e-6


# ---- prompts of any length -------------------------------------------------------------------------


@torch.no_grad()
def their_chunks(theirs: StableDiffusion3Pipeline, which: str, text: str, chunks: int) -> tuple[Tensor, Tensor]:
    """transformers' features of a text in chunks (1, chunks 77, D), and the pooled vector of the first."""
    tokenizer, encoder = getattr(theirs, f"tokenizer{which}"), getattr(theirs, f"text_encoder{which}")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    rows = []
    for i in range(chunks):
        part = ids[i * (LENGTH - FRAME) : (i + 1) * (LENGTH - FRAME)]
        row = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (LENGTH - len(row)))
    out = encoder(torch.tensor(rows), output_hidden_states=True)
    return out.hidden_states[-2].reshape(1, chunks * LENGTH, -1), out[0][:1]


def test_long_prompts_in_chunks(pipe: Pipeline, theirs: StableDiffusion3Pipeline) -> None:
    """Against transformers' encoders, chunk by chunk; the negative prompt has as many, the last of them empty ones."""
    trace: dict[str, Tensor] = {}
    result = pipe.run(pipe.asked({"prompt": LONG, "negative": "a pig", "long_prompts": True}), trace)
    chunks, t5_tokens = result.settings.clip_chunks, result.settings.t5_tokens
    t5 = theirs.tokenizer_3(LONG).input_ids
    assert (chunks, t5_tokens) == (-(-len(theirs.tokenizer(LONG, add_special_tokens=False).input_ids) // 75), len(t5))
    assert chunks >= 3 and t5_tokens > 100
    for name, text in (("cond", LONG), ("uncond", "a pig")):
        (features_l, pooled_l), (features_g, pooled_g) = (their_chunks(theirs, w, text, chunks) for w in ("", "_2"))
        context, clip = trace[f"{name}.context"], chunks * LENGTH
        assert context.shape[1] == clip + t5_tokens
        assert relative_error(context[:, :clip, : features_l.shape[-1]], features_l) <= 1e-5
        width = features_l.shape[-1] + features_g.shape[-1]
        assert relative_error(context[:, :clip, features_l.shape[-1] : width], features_g) <= 1e-5
        assert relative_error(trace[f"{name}.pooled"], torch.cat([pooled_l, pooled_g], 1)) <= 1e-5
        ids = theirs.tokenizer_3(text, padding="max_length", max_length=t5_tokens).input_ids
        with torch.no_grad():
            assert relative_error(context[:, clip:], theirs.text_encoder_3(torch.tensor([ids]))[0]) <= 1e-5
    empty = pipe.encode([""], 20).context[:, :LENGTH]
    assert relative_error(trace["uncond.context"][:, LENGTH : 2 * LENGTH], empty) <= 1e-6


def test_nothing_is_lost_and_short_prompts_stay_as_they_are(pipe: Pipeline, recwarn: pytest.WarningsRecorder) -> None:
    """Lists of mixed lengths: each picture is the one that it is alone, with no warning."""
    rows = [{"prompt": LONG}, {"prompt": "a horse"}, {"prompt": "a pig", "negative": LONG, "seed": 1}]
    found = {s.seed: image for s, image in pipe.draw_many(rows[1:], long_prompts=True)}
    lengths = [pipe.check(pipe.asked({**row, "long_prompts": True})) for row in rows]
    assert [s.clip_chunks for s in lengths][1:] == [1, lengths[0].clip_chunks]
    assert pipe("a horse")[0].tobytes() == pipe("a horse", long_prompts=True)[0].tobytes() == found[0].tobytes()
    assert not [w for w in recwarn if "too long" in str(w.message)]
    assert pipe.check(replace(lengths[0], prompt="a horse")).clip_chunks == 1
    assert pipe.check(lengths[0]) == lengths[0] and pipe.check(replace(lengths[0], cfg=1)) == replace(lengths[0], cfg=1)
    assert pipe.check(replace(lengths[2], cfg=1)).clip_chunks == 1  # the negative prompt is not read


def test_plans_know_the_length(pipe: Pipeline) -> None:
    s = pipe.check(replace(pipe.settings, prompt=LONG, long_prompts=True, emphasis=True))
    job = pipe.job(s)
    assert s.clip_chunks and s.t5_tokens
    assert job.context == s.clip_chunks * LENGTH + s.t5_tokens == texts_length(pipe, s)
    assert (job.texts, job.chunks, job.blank, job.t5_length) == (2, s.clip_chunks, 1, s.t5_tokens)
    read = pipe.planner.costs.activations._read
    assert read("clip_l", job) == (2 * s.clip_chunks + 1, LENGTH) and read("t5", job) == (3, s.t5_tokens)
    with pytest.raises(SettingsError, match=r"memory: .* do not suffice"):
        Drawing(pipe, [pipe.check(replace(s, prompt="a red horse, " * 6_000, memory="1GB"))])


def texts_length(pipe: Pipeline, s: Settings) -> int:
    text = texts_of(s)["prompt"]
    return pipe.encode([text.prompt], text.t5_length, text.chunks).context.shape[1]


# ---- textual inversions ----------------------------------------------------------------------------


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def parts_with(folder: Path, *files: Path) -> Parts:
    """Of the model, with textual inversions, its weights not read."""
    return load_parts(Settings(model=str(folder), dtype="fp32", device="cpu", embedding=(*map(str, files),)))


@pytest.fixture(scope="module")
def widths(pipe: Pipeline) -> dict[str, int]:
    assert isinstance(pipe.text, TextEncoder)
    return {name: clip.config.hidden_size for name, (_, clip) in pipe.text.clips.items()}


def test_a_word_is_its_vectors(
    folder: Path, theirs: StableDiffusion3Pipeline, widths: dict[str, int], tmp_path: Path
) -> None:
    """Against transformers' encoders with the vectors in the table, in the place of tokens that the prompt has not."""
    vectors = {"clip_l": drawn(3, widths["clip_l"]), "clip_g": drawn(2, widths["clip_g"])}
    save_file(vectors, tmp_path / "my-style.safetensors")
    save_file({"emb_params": drawn(1, widths["clip_g"])}, tmp_path / "my.safetensors")
    files = [str(tmp_path / "my.safetensors"), str(tmp_path / "my-style.safetensors")]
    with torch.no_grad():
        ours = Pipeline.load(folder, dtype="fp32", device="cpu", embedding=files)
        found = ours.encode(["a horse, My-Style!my, a bear my-styles"], 40)
    at = {"clip_l": 0, "clip_g": widths["clip_l"]}
    for name, which in (("clip_l", ""), ("clip_g", "_2")):
        tokenizer, encoder = (
            getattr(theirs, f"tokenizer{which}"),
            copy.deepcopy(getattr(theirs, f"text_encoder{which}")),
        )
        own = {"my-style": vectors[name], **({"my": drawn(1, widths["clip_g"])} if name == "clip_g" else {})}
        ids, free = [], iter(range(300, 320))  # of the alphabet that ends words: in no caption
        for part in ("a horse,", "my-style", "!", "my", ", a bear my-styles"):
            for vector in own.get(part, ()):
                ids.append(next(free))
                encoder.text_model.embeddings.token_embedding.weight.data[ids[-1]] = vector
            ids += [] if part in own else tokenizer(part, add_special_tokens=False).input_ids
        ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        row = torch.tensor([ids + [tokenizer.pad_token_id] * (LENGTH - len(ids))])
        with torch.no_grad():
            expected = encoder(row, output_hidden_states=True).hidden_states[-2]
        assert relative_error(found.context[:, :LENGTH, at[name] : at[name] + widths[name]], expected) <= 1e-5
        assert int((found.tokens[name] < 0).sum()) == sum(map(len, own.values()))


@pytest.mark.parametrize("form", ["emb_params", "<style>", "one vector"])
def test_files_for_one_clip(folder: Path, widths: dict[str, int], tmp_path: Path, form: str) -> None:
    """It is for the CLIP that is as wide; the other reads the word."""
    vectors = drawn(widths["clip_l"]) if form == "one vector" else drawn(2, widths["clip_l"])
    save_file({form: vectors.half()}, tmp_path / "style.safetensors")
    reader = parts_with(folder, tmp_path / "style.safetensors").text
    assert isinstance(reader, TextEncoder) and {*reader.words} == {"clip_l"}
    assert torch.equal(reader.words["clip_l"].table, vectors.half().float().reshape(-1, widths["clip_l"]))
    ids = {name: reader.read(name, [Prompt("a style")])[0].ids for name in ("clip_l", "clip_g", "t5")}
    assert ids["clip_l"][1:] == [-1, -2][: vectors.ndim]
    assert min(ids["clip_g"]) >= 0 and ids["t5"] == reader.tokenizer_t5.split("a style")[0]


def test_files_that_are_none(folder: Path, widths: dict[str, int], tmp_path: Path) -> None:
    """One line that names file and tensor, and both widths; before any weight is read."""
    wide, wrong = widths["clip_l"], widths["clip_l"] + 8
    files: dict[str, tuple[dict[str, Tensor], str]] = {
        "width": ({"clip_l": drawn(2, wrong)}, f"clip_l: vectors of {wrong}, the model's clip_l has {wide}"),
        "any": (
            {"emb_params": drawn(2, wrong)},
            f"emb_params: vectors of {wrong}, the model's clip_l has {wide} and the",
        ),
        "more": ({"clip_l": drawn(2, wide), "t5xxl": drawn(2, 4)}, "no textual inversion: it holds clip_l, t5xxl; exp"),
        "none": ({}, "no textual inversion: it holds nothing"),
        "long": ({"clip_l": drawn(76, wide)}, "clip_l: 76 vectors, expected 1 to 75"),
        "empty": ({"clip_l": torch.zeros(0, wide)}, "clip_l: 0 vectors, expected 1 to 75"),
        "whole": ({"clip_l": torch.zeros(1, wide).int()}, "clip_l is I32; vectors must be one of"),
        "cube": ({"clip_l": torch.zeros(1, 1, wide)}, r"clip_l: shape \(1, 1, "),
        "nan": ({"clip_l": torch.full((1, wide), math.nan)}, "clip_l: NaN or infinity"),
    }
    for name, (tensors, message) in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=f"{name}.safetensors: {message}"):
            read_embedding(tmp_path / f"{name}.safetensors", widths, 75)
    with pytest.raises(CheckpointError, match="no such file"):
        parts_with(folder, tmp_path / "gone.safetensors")
    with pytest.raises(SettingsError, match=r"embedding: .* have the same word, NONE: rename one"):
        parts_with(folder, tmp_path / "none.safetensors", tmp_path / "NONE.pt")


def test_what_an_embedding_holds_tells_pictures_apart(folder: Path, widths: dict[str, int], tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> str:
        save_file({"clip_l": drawn(seed, widths["clip_l"])}, tmp_path / name)
        return parts_with(folder, tmp_path / name).weights

    found = [weights("a.safetensors", 1), weights("a.safetensors", 2), weights("b.safetensors", 2)]
    assert len({*found, parts_with(folder).weights}) == 4 and weights("a.safetensors", 2) == found[1]
