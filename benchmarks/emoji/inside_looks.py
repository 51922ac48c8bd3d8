"""Pictures of the demo's inside: what each block would draw, where it looks for a word, what each head does."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.emoji.inside_bench import ATTENTIONS, KINDS, Bench, strongest
from benchmarks.emoji.steering import SIDE, table

CAPTION = "a blue horse and a bear on a green background"
SHOWN = ("blue", "horse", "bear", "green")


def looks(bench: Bench) -> Image.Image:
    """The picture that each block predicts if it is the last, as steps go by; where each looks for words, halfway.

    A word is a token of CLIP's, behind the first, which marks the beginning, and one of T5's.
    """
    text, blocks, places = bench.pipe.encode([CAPTION], bench.length), range(bench.config.depth), CAPTION.split().index
    tokens = [token for word in SHOWN for token in (places(word) + 1, bench.clip + places(word))]
    with bench.pipe.capture(("lens", "attention"), words=tokens) as seen:
        way = bench.latents(text, 0)
    rows, half = [], bench.steps // 2
    for step in sorted({0, half, bench.steps * 7 // 10, bench.steps - 1}):
        sigma = bench.sigmas[step]
        clean = torch.cat([way[step] - sigma * seen["lens"][step, i][:1].float() for i in blocks])
        pictures = bench.pipe.decode(clean).numpy()
        rows.append([(f"noise {sigma:.2f}, block {i}", Image.fromarray(p)) for i, p in zip(blocks, pictures)])
    for j, word in enumerate(SHOWN):
        maps = torch.stack([seen["words"][half, i][0, :, :, 2 * j : 2 * j + 2].sum(-1).mean(0) for i in blocks])
        grays = (255 * maps.unflatten(1, (8, 8)) / maps.max()).byte().numpy()  # (blocks, rows, columns of tokens)
        tiles = [Image.fromarray(gray).resize((SIDE, SIDE), Image.Resampling.NEAREST) for gray in grays]
        rows.append([(f"{word}, block {i}", tile) for i, tile in zip(blocks, tiles)])
    return table(rows).quantize(192, dither=Image.Dither.NONE)


def grids(bench: Bench, found: dict[str, dict[Any, np.ndarray]]) -> Image.Image:
    """The shares of heads in percent, a panel for each kind: blocks from top to bottom."""
    every = [(f"{kind} by blocks and heads, in %", grid(bench, found[kind])) for kind in KINDS]
    return table([every[:2], every[2:]])


def grid(bench: Bench, found: dict[Any, np.ndarray], cell: int = 24, gap: int = 12) -> Image.Image:
    width = bench.config.num_heads * cell + gap
    image = Image.new("RGB", (len(ATTENTIONS) * width + gap, (bench.config.depth + 1) * cell), "white")
    pen = ImageDraw.Draw(image)
    for i, name in enumerate(ATTENTIONS):
        pen.text((gap + i * width, cell // 4), name, fill="black")
    for head in strongest(found):
        x, y = gap + ATTENTIONS.index(head.attention) * width + head.number * cell, (head.block + 1) * cell
        share = float(found[head].mean())
        pale = int(255 * (1 - min(max(share, 0.0) / 0.4, 1.0) ** 0.5))
        pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=(pale, pale, 255), outline="lightgray")
        pen.text((x + 6, y + 6), str(round(100 * share)), fill="black" if pale > 110 else "white")
    return image
