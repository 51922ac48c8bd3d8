"""What the demo's blocks and heads do (`benchmarks.emoji.inside`): its experiments, at toy size."""

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.emoji import inside, inside_bench
from benchmarks.emoji.inside_bench import SEED, Bench, Head, Tape, changed, scenes, tinted
from benchmarks.emoji.judge import Seen, Verdict
from benchmarks.emoji.scenes import Scene, held_out
from mmdit import Pipeline

Look = tuple[str | None, str | None]
HEADS = [Head(0, "context_attn", 3), Head(1, "attn", 2)]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Pipeline.load(dtype="fp32", device="cpu"), steps=2)


def verdict(*looks: Look, colour: str = "white") -> Verdict:
    places = tuple(Seen(noun or "horse", tint, 0.0 if noun else 1.0, empty=False) for noun, tint in looks)
    return Verdict(places, colour)


def test_captions_differ_in_one_thing() -> None:
    for i, scene in enumerate(scenes(12, 0)):
        assert scene.named_colour and tinted(scene) == i % 2 and sum(tint is not None for tint in scene.tints) == 1
        colour, ground, place, noun = (changed(scene, kind, Random(i)) for kind in inside.KINDS)
        assert (colour.nouns, colour.colour) == (ground.nouns, scene.colour) == (scene.nouns, scene.colour)
        assert colour.tints[i % 2] not in (None, scene.tints[i % 2]) and colour.tints[1 - i % 2] is None
        assert ground.tints == scene.tints and ground.colour != scene.colour
        assert place.subjects == scene.subjects[::-1] and place.colour == scene.colour
        assert noun.tints == scene.tints and noun.nouns[i % 2] == scene.nouns[i % 2] and noun.nouns != scene.nouns
        assert not held_out(*noun.nouns)


def test_shares_of_the_way(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All together are the whole; of the pooled text it is that of evaluations written out, each scene's its own."""
    asked, strong = scenes(2, 1), Head(0, "context_attn", 3)
    other = [changed(scene, "colour", Random(0)) for scene in asked]
    monkeypatch.setattr(inside, "LEVELS", (0.0,))
    monkeypatch.setattr(bench, "heads", [h for h in bench.heads if h.attention == "attn" or h == strong])
    found = inside.shares(bench, asked, other)
    assert np.allclose(found["all"], 1, atol=1e-4)
    assert {len(values) for values in found.values()} == {2}
    assert inside.strongest(found)[0] == strong  # the demo's own: the colour's way to its noun
    assert not found["text tokens after block 4"].any()
    text, others, sigma = bench.encode(asked), bench.encode(other), torch.ones(2)
    x = bench.pipe.noise(128, 128, range(SEED, SEED + 2))
    bench.pipe.residency.use("transformer")
    with torch.no_grad():
        told = ((text, text), (others, others), (text, others))
        v, w, mixed = (bench.pipe.transformer(x, sigma, c.context, p.pooled) for c, p in told)
    by_hand = ((mixed - v) * (w - v)).flatten(1).sum(1) / (w - v).flatten(1).square().sum(1)
    assert np.allclose(found["pooled text"], by_hand.numpy(), atol=1e-4)


def test_a_tape_puts_heads_of_a_run_into_another(bench: Bench) -> None:
    """Into its own run: nothing changes. The rows that are not named stay."""
    asked = scenes(2, 2)
    text, tape = bench.encode(asked), Tape(bench)
    with tape.record():
        plain = bench.latents(text, 0)
    with tape.replay(bench.heads, 4):
        assert all(torch.equal(a, b) for a, b in zip(plain, bench.latents(text, 0)))
    with tape.replay(HEADS, 1):
        mixed = bench.latents(bench.encode([changed(s, "place", Random(0)) for s in asked]), 0)
    other = bench.latents(bench.encode([changed(s, "place", Random(0)) for s in asked]), 0)
    assert torch.allclose(mixed[-1][1], other[-1][1], atol=1e-5)
    assert not torch.allclose(mixed[-1][0], other[-1][0], atol=1e-2)


def test_first_steps_are_told_another_text(bench: Bench) -> None:
    some = scenes(1, 3)
    text, others = bench.encode(some), bench.encode([changed(some[0], "place", Random(0))])
    plain, other = bench.latents(text, 0), bench.latents(others, 0)
    first = bench.latents(text, 0, (1, others))
    assert torch.equal(first[1], other[1]) and not torch.equal(first[2], other[2])
    assert all(torch.equal(a, b) for a, b in zip(bench.latents(text, 0, (2, others)), other))
    assert all(torch.equal(a, b) for a, b in zip(bench.latents(others, 0, (0, text)), other))
    assert not torch.equal(plain[1], first[1])


def test_colours_are_bound_to_their_nouns_in_the_text(bench: Bench) -> None:
    found = inside.binding(bench, scenes(2, 4))
    assert len(found) == 2 * 4 and found["block 0, its noun"].shape == (2, 4)
    assert found["block 0, its noun"][:, 3].min() > 0.8 > 0.2 > found["block 0, the other noun"][:, 3].max()


def test_rates_and_what_a_picture_shows() -> None:
    """By verdicts written down: right, swapped, one colour wrong, one missing."""
    scene = next(s for s in scenes(2, 5) if tinted(s) == 0)
    (a, b), tint = scene.nouns, scene.tints[0]
    given = [verdict((a, tint), (b, None), colour=scene.colour), verdict((b, None), (a, tint)),
             verdict((a, None), (b, None)), verdict((None, None), (b, None))]  # fmt: skip
    ground = sum(v.colour == scene.colour for v in given)
    assert inside.rates([(scene, v) for v in given]) == [(3, 4), (2, 4), (2, 3), (ground, 4)]
    swapped, colour = (changed(scene, kind, Random(0)) for kind in ("place", "colour"))
    assert inside.shows("place", [(scene, v) for v in given], [swapped] * 4) == (2, 1)
    given[1] = verdict((a, colour.tints[0]), (b, None))
    assert inside.shows("colour", [(scene, v) for v in given], [colour] * 4) == (1, 1)


def test_everything_comes_to_tables_and_pictures(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The command, with few parts, and stand-ins for the autoencoder and the judge."""

    def judged(_: np.ndarray, count: int) -> Verdict:
        return verdict(*[("horse", None)] * count)

    def few(pipe: Pipeline) -> Bench:
        assert pipe is bench.pipe
        found = Bench(pipe, steps=2)
        found.parts, found.heads, found.config = (
            [(0, "block"), (1, "mlp")],
            HEADS,
            replace(pipe.transformer.config, depth=2, dual_attention_blocks=()),
        )
        return found

    def some(count: int, seed: int) -> list[Scene]:
        return scenes(min(count, 2), seed)

    def decoded(latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).permute(0, 2, 3, 1).abs().byte()

    monkeypatch.setattr(bench.pipe, "decode", decoded)
    monkeypatch.setattr(inside_bench, "judge", judged)
    monkeypatch.setattr(inside, "Bench", few)
    monkeypatch.setattr(inside, "TOP", (1,))
    monkeypatch.setattr(inside, "LEVELS", (0.0,))
    monkeypatch.setattr(inside, "scenes", some)
    monkeypatch.setattr(inside.Pipeline, "load", lambda **_: bench.pipe)
    monkeypatch.setattr("sys.argv", ["inside", str(tmp_path / "out"), "--scenes", "1"])
    inside.main()
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert tables in capsys.readouterr().out
    rows = ("nothing | 0 of 1", "block 1, mlp | 0 of 1", "pooled text |", "block 0, its noun |", "T5's tokens | 0 of 1",
            "the 1 strongest heads | 0 of 1", "attention of block 1 | 0 of 1")  # fmt: skip
    assert all(f"\n| {row}" in tables for row in rows)
    assert (tmp_path / "out" / "heads.png").stat().st_size > 1000 < (tmp_path / "out" / "looks.png").stat().st_size
