"""How the text encoders' outputs are joined, and running without T5."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from text_encoders import (
    CLIPConfig,
    CLIPTextEncoder,
    Conditioning,
    T5Config,
    T5Encoder,
    TextEncoder,
    join,
)
from text_encoders.tokenizers import PromptTokenizer

TINY_L = CLIPConfig(99, 64, 160, 3, 4, 77, 64, "quick_gelu")
TINY_G = CLIPConfig(99, 96, 200, 4, 6, 77, 40, "gelu")


class WordTokenizer(PromptTokenizer):
    """Stands in for a real one: a word is a token, its length the id; "!" splits words for CLIP-G only."""

    def __init__(self, splits: bool = False) -> None:
        self.start, self.end, self.pad, self.splits = [], [61], 0, splits

    def split(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        words = [*re.finditer(r"!|[^\s!]+" if self.splits else r"\S+", text)]
        return [min(len(word[0]), 60) for word in words], [word.span() for word in words]


WIDTH = 200
T5_TINY = T5Config(70, WIDTH, 16, 96, 2, 4)


@pytest.fixture
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    warnings: list[str] = []
    made = TextEncoder(
        tokenizer_l=WordTokenizer(),
        tokenizer_g=WordTokenizer(splits=True),
        tokenizer_t5=WordTokenizer(),
        clip_l=CLIPTextEncoder(TINY_L),
        clip_g=CLIPTextEncoder(TINY_G),
        t5=T5Encoder(T5_TINY),
        t5_length=100,
        width=WIDTH,
        warn=warnings.append,
    )
    made.warnings = warnings  # pyright: ignore[reportAttributeAccessIssue]
    return made


HINT = ": --long-prompts reads all of it"
TEXTS = ["a fox", "", "in the snow of a winter"]


def test_encode(encoder):
    result = encoder.encode(TEXTS)
    assert isinstance(result, Conditioning)
    assert result.context.shape == (3, 177, WIDTH)
    assert result.pooled.shape == (3, 104)
    assert {name: tuple(ids.shape) for name, ids in result.tokens.items()} == {
        "clip_l": (3, 77),
        "clip_g": (3, 77),
        "t5": (3, 100),
    }
    hidden_l, pooled_l = encoder.clip_l(result.tokens["clip_l"])
    hidden_g, pooled_g = encoder.clip_g(result.tokens["clip_g"])
    assert torch.equal(result.context[:, :77, :64], hidden_l)
    assert torch.equal(result.context[:, :77, 64:160], hidden_g)
    assert not result.context[:, :77, 160:].any()
    assert torch.equal(result.context[:, 77:], encoder.t5(result.tokens["t5"]))
    assert torch.equal(result.pooled, torch.cat([pooled_l, pooled_g], dim=1))
    assert encoder.warnings == []


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize(("mode", "length"), [("off", 177), ("omit", 77)])
def test_encode_without_t5(encoder, mode, length, held):
    full = encoder.encode(TEXTS)
    encoder.t5_mode = mode
    if not held:
        encoder.t5 = encoder.tokenizer_t5 = None
    result = encoder.encode(TEXTS)
    assert result.context.shape == (3, length, WIDTH)
    assert torch.equal(result.context[:, :77], full.context[:, :77])
    assert not result.context[:, 77:].any()
    assert torch.equal(result.pooled, full.pooled)
    assert set(result.tokens) == {"clip_l", "clip_g"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", ["on", "off", "omit"])
def test_encode_gives_clips_dtype(encoder, dtype, mode):
    encoder.clip_l, encoder.clip_g = encoder.clip_l.to(dtype), encoder.clip_g.to(dtype)
    encoder.t5_mode = mode
    result = encoder.encode(TEXTS)
    assert result.context.dtype == result.pooled.dtype == dtype
    assert result.context.isfinite().all()


def test_encode_refuses_t5_in_float16(encoder):
    encoder.t5 = copy.deepcopy(encoder.t5).half()
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        encoder.encode(TEXTS)


def test_encode_needs_t5_where_it_is_on(encoder):
    encoder.t5 = None
    with pytest.raises(ValueError, match="'on' but there is no T5"):
        encoder.encode(TEXTS)


def test_encode_refuses_an_unknown_mode(encoder):
    encoder.t5_mode = "none"
    with pytest.raises(ValueError, match="'none', not 'on', 'off' or 'omit'"):
        encoder.encode(TEXTS)


def test_one_warning_for_both_clips(encoder):
    encoder.encode(["fits", "word " * 76 + "THE END"])
    assert encoder.warnings == [
        'prompt too long for the 77 tokens of CLIP-L and CLIP-G, which lost "THE END": --long-prompts reads all of it',
    ]


def test_a_warning_for_every_other_cut(encoder):
    """CLIP-G spends more tokens on exclamation marks than CLIP-L, so it may lose more."""
    encoder.encode(["word! " + "word " * 73 + "LAST END", "word " * 100 + "T5"])
    assert encoder.warnings == [
        'prompt too long for the 77 tokens of CLIP-G, which lost "END"' + HINT,
        f'prompt too long for the 77 tokens of CLIP-L and CLIP-G, which lost "{"word " * 24}T5"' + HINT,
        'prompt too long for the 100 tokens of T5, which lost "word T5"' + HINT,
    ]


def test_warnings_are_pythons_by_default(encoder):
    with pytest.warns(UserWarning, match='^prompt too long .*"END": --long-prompts'):
        replace(encoder, warn=TextEncoder.warn).encode(["word " * 76 + "END"])


def pairs() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (torch.randn(2, 7, 3), torch.randn(2, 3)), (torch.randn(2, 7, 5), torch.randn(2, 6))


def test_join_casts_t5_to_clips_dtype():
    (hidden_l, pooled_l), (hidden_g, pooled_g) = pairs()
    clip_l, clip_g = (hidden_l.half(), pooled_l.half()), (hidden_g.half(), pooled_g.half())
    t5 = torch.randn(2, 4, 10)
    context, pooled = join([clip_l, clip_g], t5, 10)
    assert context.dtype == pooled.dtype == torch.float16
    assert context.shape == (2, 11, 10)
    assert torch.equal(context[:, 7:], t5.half())


def test_join_checks_widths():
    with pytest.raises(ValueError, match="8 channels exceed the context width of 7"):
        join(pairs(), None, 7)
    with pytest.raises(ValueError, match="T5's width of 9 is not the context width of 10"):
        join(pairs(), torch.zeros(2, 4, 9), 10)
    assert join(pairs(), None, 8)[0].shape == (2, 7, 8)
