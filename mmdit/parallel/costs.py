"""What an evaluation costs when processes share it: multiplications, bytes sent, and so which way is the fastest.

All counts are for one process and one evaluation. They are exact but for norms and the like: `python -m
benchmarks.parallel` compares the bytes with those that are sent.
"""

from typing import NamedTuple

from mmdit.config import MMDiTConfig
from mmdit.parallel.ranks import Layout


class Question(NamedTuple):
    """An evaluation: so many rows, each of so many image and text tokens, in numbers of so many bytes."""

    rows: int
    image: int
    text: int
    itemsize: int = 2


class Link(NamedTuple):
    """How fast a process computes, and exchanges with the others."""

    operations: float  # a second
    bytes: float  # a second, that it sends
    wait: float  # seconds that any exchange takes


def operations(config: MMDiTConfig, asked: Question, layout: Layout) -> float:
    """Multiplications and additions of the blocks, for the process that has the most rows.

    Of a block: 12 width² for each token, 4 width² more for an image token of a second attention, 3 width² for the text
    of the last block; and for each pair of tokens in an attention 2 width. Text is computed by every process.
    """
    width, dual = config.hidden_size, len(config.dual_attention_blocks)
    rows = -(-asked.rows // layout.rows)
    image = -(-asked.image // layout.tokens)
    products = (12 * config.depth + 4 * dual) * image + (12 * (config.depth - 1) + 3) * asked.text
    pairs = ((config.depth - 1) * (asked.image + asked.text) + asked.image) * (asked.image + asked.text)
    pairs += dual * asked.image**2
    return rows * (2 * products * width**2 + 4 * pairs * width / layout.tokens)


def sent(config: MMDiTConfig, asked: Question, layout: Layout) -> tuple[float, int]:
    """Bytes that a process sends to others, and in how many exchanges.

    In each attention a process gives the others their heads of its image tokens (queries, keys, values), gets its
    tokens back with all heads, and the text that asks goes to all. Last the velocity: within a row, then between rows.
    """
    p, width, size = layout.tokens, config.hidden_size, asked.itemsize
    calls, asking = config.depth + len(config.dual_attention_blocks), config.depth - 1
    rows = -(-asked.rows // layout.rows)
    total, times = 0.0, 0
    if p > 1:
        total += rows * 4 * calls * asked.image * width * size * (p - 1) / p**2
        total += rows * asking * asked.text * width * size * (p - 1) / p
        total += rows * asked.image * config.patch_channels * size * (p - 1) / p
        times += 2 * calls + 1
    if layout.rows > 1:
        total += rows * asked.image * config.patch_channels * 4 * (layout.rows - 1)
        times += 1
    return total, times


def seconds(config: MMDiTConfig, asked: Question, layout: Layout, link: Link) -> float:
    """Nothing overlaps: each exchange is waited for."""
    total, times = sent(config, asked, layout)
    return operations(config, asked, layout) / link.operations + total / link.bytes + times * link.wait


def layouts(config: MMDiTConfig, asked: Question, size: int, splits: bool = True) -> list[Layout]:
    """All ways to share it by so many processes, the simplest first. splits: whether tokens can be."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    tokens = [n for n in divisors if n == 1 or (splits and config.num_heads % n == 0 and n <= asked.image)]
    every = [Layout(r, t) for t in tokens for r in divisors if size % (r * t) == 0 and r <= asked.rows]
    return sorted(every, key=lambda layout: (layout.rows * layout.tokens, layout.tokens))


def chosen(
    way: str, config: MMDiTConfig, asked: Question, size: int, link: Link | None, splits: bool = True
) -> Layout:  # fmt: skip
    """The layout that the way, of `options.WAYS`, stands for; of auto the fastest over this link.

    An evaluation of one text has no rows to share: `both` gives it to all as tokens, where heads allow that.
    """
    every = layouts(config, asked, size, splits)
    if way == "guidance":
        return max((layout for layout in every if layout.tokens == 1), key=lambda layout: layout.rows)
    if way == "tokens":
        return max(every, key=lambda layout: (layout.tokens, -layout.rows))
    if way == "both":
        return max(every, key=lambda layout: (min(layout.rows, 2) * layout.tokens, layout.rows == 2, -layout.rows))
    assert link is not None, "auto needs to know the link"
    return min(every, key=lambda layout: seconds(config, asked, layout, link))


def told(config: MMDiTConfig, asked: Question, layout: Layout, size: int, link: Link | None) -> str:
    """How an evaluation is shared, and why, in a line."""
    texts = f"{asked.rows} text" + "s" * (asked.rows > 1)
    ways = [f"{layout.rows} share the texts"] * (layout.rows > 1)
    ways += [f"{layout.tokens} share the tokens of a text"] * (layout.tokens > 1)
    line = f"{texts} by {size} processes: {' and '.join(ways) or 'each computes all, which nothing makes faster'}"
    line += f", {sent(config, asked, layout)[0] / 1e6:.3g} MB sent by each in an evaluation" * bool(ways)
    if link is None:
        return line
    one, this = seconds(config, asked, Layout(), link), seconds(config, asked, layout, link)
    return f"{line}; {one / this:.2f} times one process over {link.bytes / 1e9:.3g} GB/s, by arithmetic"
