"""Bytes by arithmetic beside those that are counted, and what is chosen by them."""

import os
from dataclasses import replace

import pytest

from benchmarks.parallel import bytes_of
from mmdit.config import SD35_MEDIUM, TOY
from mmdit.parallel.costs import Link, Question, chosen, layouts, operations, sent
from mmdit.parallel.ranks import Layout
from mmdit.parallel.started import Place, see_one_gpu, started

SMALL = replace(TOY, hidden_size=96, num_heads=12, depth=3, dual_attention_blocks=(0, 2))
NVLINK, PCIE = Link(790e12, 300e9, 30e-6), Link(790e12, 25e9, 30e-6)


@pytest.mark.parametrize(("size", "side", "rows", "text"), [(2, 160, 1, 21), (3, 96, 2, 5), (4, 128, 1, 77)])
def test_what_is_sent_is_what_is_counted(size: int, side: int, rows: int, text: int) -> None:
    every = bytes_of(SMALL, side, size, rows, text)
    expected, times = sent(SMALL, Question(rows, (side // 16) ** 2, text), Layout(tokens=size))
    assert [len(told) for told in every] == [times] * size == [2 * (3 + 2) + 1] * size
    assert sum(map(sum, every)) == pytest.approx(size * expected)


def test_the_published_formula() -> None:
    """(148 N + 46 M (P / 2)) D e (P - 1) / P², but for the velocity: 24 + 13 attentions of four tensors, 23 texts."""
    for size in (2, 4, 8):
        found = sent(SD35_MEDIUM, Question(1, 4096, 333), Layout(tokens=size))[0]
        formula = 148 * 4096 * 1536 * 2 * (size - 1) / size**2 + 23 * 333 * 1536 * 2 * (size - 1) / size
        assert found == pytest.approx(formula, rel=0.003)
    assert 2 * operations(SD35_MEDIUM, Question(1, 4096, 333), Layout()) == pytest.approx(22.5e12, rel=0.01)


@pytest.mark.parametrize(
    ("way", "rows", "size", "link", "expected"),
    [
        ("auto", 2, 2, NVLINK, (2, 1)), ("auto", 2, 4, NVLINK, (2, 2)), ("auto", 2, 4, PCIE, (2, 1)),
        ("auto", 1, 2, NVLINK, (1, 2)), ("auto", 1, 2, PCIE, (1, 1)), ("auto", 2, 3, NVLINK, (1, 3)),
        ("both", 2, 4, None, (2, 2)), ("both", 1, 4, None, (1, 4)), ("both", 4, 8, None, (2, 4)),
        ("guidance", 3, 4, None, (2, 1)), ("guidance", 1, 2, None, (1, 1)), ("tokens", 2, 8, None, (1, 8)),
    ],
)  # fmt: skip
def test_what_is_chosen(way: str, rows: int, size: int, link: Link | None, expected: tuple[int, int]) -> None:
    assert chosen(way, SD35_MEDIUM, Question(rows, 4096, 333), size, link) == expected


def test_only_what_divides_is_chosen() -> None:
    for size in range(1, 13):
        for rows, tokens in layouts(SMALL, Question(3, 6, 5), size):
            assert size % (rows * tokens) == 0 and 12 % tokens == 0 and rows <= 3 and tokens <= 6
    assert {tokens for _, tokens in layouts(SMALL, Question(3, 6, 5), 4, splits=False)} == {1}


@pytest.mark.parametrize(("there", "own"), [(None, "1"), ("4,5", "5"), ("GPU-a, GPU-b", "GPU-b"), ("0", "")])
def test_a_process_sees_one_gpu(there: str | None, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # put back at the end
    if there is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", there)
    see_one_gpu(Place(3, 4, 1, 2))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert started() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert started() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert started() == (3, 4, 3, 4)
