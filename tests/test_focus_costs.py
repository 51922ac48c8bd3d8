"""What it costs that subjects mix: by hand, against loops over numpy's float64, and at the edges."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers.focus import COSTS, Cost, Groups
from samplers.focus.costs import blurred, contrast

PAIRS, ODD, ONE, LONE = ((0, 1), (2, 3)), ((2,), (0, 4, 1), (3, 5)), ((0, 1, 2),), ((0,),)


def attention(*shape: int, seed: int = 0, peak: float = 2.0) -> Tensor:
    """Float64 maps as a softmax makes them, about half of the whole on the words."""
    scores = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (peak * scores).flatten(2).softmax(-1).view(shape) / 2


def spots(*places: tuple[int, int], rows: int = 6, columns: int = 9, blocks: int = 1) -> Tensor:
    """Maps of one token each that looks at nothing but a place."""
    maps = torch.zeros(blocks, len(places), rows, columns)
    for token, (row, column) in enumerate(places):
        maps[:, token, row, column] = 1
    return maps


FAR = (1, 1), (4, 7)  # places that the blur does not bring together


# ---- by loops --------------------------------------------------------------------------------------


def smooth(maps: np.ndarray) -> np.ndarray:
    """The mean over blocks under a kernel of 3 by 3, its places looked up in a mirror; (tokens, rows, columns)."""
    mean = maps.mean(0)
    weights = np.exp(-0.5 * np.array([[a * a + b * b for b in (-1, 0, 1)] for a in (-1, 0, 1)]))
    weights /= weights.sum()

    def mirrored(i: int, size: int) -> int:
        return 0 if size == 1 else abs(i) if i < size else 2 * (size - 1) - i

    out = np.zeros_like(mean)
    for t, r, c in np.ndindex(*mean.shape):
        for a, b in itertools.product((-1, 0, 1), repeat=2):
            at = mirrored(r + a, mean.shape[1]), mirrored(c + b, mean.shape[2])
            out[t, r, c] += weights[a + 1, b + 1] * mean[t][at]
    return out


def entropy(q: np.ndarray) -> float:
    return -sum(p * math.log(p) for p in q.ravel() if p > 0)


def apart(maps: list[np.ndarray], sharpness: float) -> float:
    """Jensen-Shannon: the entropy of the mean less the mean of the entropies, over log n."""
    cubes = [m.ravel() ** sharpness / (m.ravel() ** sharpness).sum() for m in maps]
    return (entropy(sum(cubes) / len(cubes)) - sum(map(entropy, cubes)) / len(cubes)) / math.log(len(cubes))  # type: ignore


def parts(tokens: np.ndarray, groups: Groups, sharpness: float) -> tuple[float, float, list[np.ndarray]]:
    several = [apart([tokens[i] for i in group], sharpness) for group in groups if len(group) > 1]
    means = [sum(tokens[i] for i in group) / len(group) for group in groups]
    return (
        sum(several) / len(several) if several else 0.0,
        1 - apart(means, sharpness) if len(groups) > 1 else 0.0,
        means,
    )


def by_loops(name: str, maps: np.ndarray, groups: Groups, sharpness: float = 3.0) -> float:
    if name == "jedi":
        blocks, found = len(maps), []
        for block in range(blocks):
            if not math.floor(blocks / 6) <= block < max(math.floor(blocks * 2 / 3), 1):
                continue
            coherence, separation, means = parts(maps[block], groups, sharpness)
            cubes = [m**sharpness / (m**sharpness).sum() for m in means]
            even = [1 - entropy(q) / math.log(max(q.size, 2)) for q in cubes]
            found.append(coherence + separation + 0.01 * sum(even) / len(even))
        return sum(found) / len(found)
    tokens = smooth(maps)
    if name == "focus":
        return sum(parts(tokens, groups, sharpness)[:2]) / 2
    if name == "attend-and-excite":
        shares = tokens / tokens.sum(0)
        best = [max((sum(shares[i] for i in group) / len(group)).ravel()) for group in groups]
        return max(1 - min(best), 0.0)
    if name == "divide-and-bind":
        found = []
        for group in groups:
            mean = sum(tokens[i] for i in group) / len(group)
            mean = mean / mean.mean()
            down = [abs(mean[r + 1, c] - mean[r, c]) for r, c in np.ndindex(mean.shape[0] - 1, mean.shape[1])]
            across = [abs(mean[r, c + 1] - mean[r, c]) for r, c in np.ndindex(mean.shape[0], mean.shape[1] - 1)]
            found.append(sum(sum(side) / len(side) for side in (down, across) if side))
        return -min(found)
    return 0.0


def contrast_by_loops(rows: list[np.ndarray], labels: list[int]) -> float:
    def likeness(a: int, b: int) -> float:
        return float(rows[a] @ rows[b] / math.sqrt((rows[a] @ rows[a]) * (rows[b] @ rows[b]))) / 0.07

    found = []
    for a, b in itertools.permutations(range(len(rows)), 2):
        if labels[a] == labels[b]:
            others = [math.exp(likeness(a, c)) for c in range(len(rows)) if labels[c] != labels[a]]
            found.append(-math.log(math.exp(likeness(a, b)) / (math.exp(likeness(a, b)) + sum(others))))
    return sum(found) / len(found)


SHAPES = [(3, 6, 5, 4), (1, 6, 1, 7), (2, 6, 3, 1), (24, 6, 2, 2), (7, 6, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", COSTS)
def test_costs_are_the_formulas_by_loops(name: str, shape: tuple[int, ...]) -> None:
    """In float64 and float32, in both forms, for one subject and several, of one word and several; any rectangle."""
    maps = attention(*shape)
    for groups in (PAIRS, ODD, ONE, LONE):
        expected = by_loops(name, maps.numpy(), groups)
        cost = COSTS[name](groups)
        assert cost(maps).dtype == torch.float64 and cost(maps).shape == ()
        assert float(cost(maps)) == pytest.approx(expected, abs=1e-12)
        assert cost(maps.float()).dtype == cost(maps.half()).dtype == torch.float32
        assert float(cost(maps.float())) == pytest.approx(expected, abs=3e-6)
        assert float(COSTS[name](groups, released=True)(maps)) == pytest.approx(expected, abs=1e-6)  # by 1e-10 in logs
        blunt = by_loops(name, maps.numpy(), groups, sharpness=1.5)
        assert float(COSTS[name](groups, sharpness=1.5)(maps)) == pytest.approx(blunt, abs=1e-12)


def released_by_loops(name: str, maps: np.ndarray, groups: Groups) -> float:
    """`focus` and `jedi` with 1e-10 in the logarithms, and for focus as the least that a map's sum is divided by."""

    def apart(maps: list[np.ndarray], least: float) -> float:
        cubes = [m.ravel() ** 3 / max((m**3).sum(), least) for m in maps]
        mean = sum(cubes) / len(cubes)
        each = [p * (math.log(p + 1e-10) - math.log(m + 1e-10)) for q in cubes for p, m in zip(q, mean)]
        return sum(each) / len(cubes) / math.log(len(cubes))

    found = []
    for tokens in [smooth(maps)] if name == "focus" else maps[len(maps) // 6 : len(maps) * 2 // 3]:
        least = 1e-10 if name == "focus" else 0.0
        means = [sum(tokens[i] for i in group) / len(group) for group in groups]
        several = [apart([tokens[i] for i in group], least) for group in groups if len(group) > 1]
        cost = sum(several) / len(several) + 1 - apart(means, least)
        if name == "focus":
            return cost / 2
        for mean in means:
            q = mean**3 / (mean**3).sum()
            h = -sum(p * math.log(p + 1e-10) for p in q.ravel())
            cost += 0.01 * (1 - h / math.log(q.size)) / len(means)
        found.append(cost)
    return sum(found) / len(found)


@pytest.mark.parametrize("scale", [1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("name", ["focus", "jedi"])
def test_the_released_form_by_loops(name: str, scale: float) -> None:
    """Also where maps are so small that 1e-10 counts."""
    maps = scale * attention(6, 6, 3, 4, peak=4.0)
    for groups in (PAIRS, ODD):
        cost = COSTS[name](groups, released=True)
        expected = released_by_loops(name, maps.numpy(), groups)
        assert float(cost(maps)) == pytest.approx(expected, rel=1e-12)
        assert float(cost(maps.float())) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("groups", [PAIRS, ODD, ONE, LONE], ids=str)
def test_conform_compares_with_the_step_before(groups: Groups) -> None:
    """The first step costs nothing; each later one is told by loops, and knows the one before alone."""
    cost: Cost = COSTS["conform"](groups)
    maps = [attention(2, 6, 3, 4, seed=seed) for seed in range(3)]
    assert float(cost(maps[0])) == 0
    order = [token for group in groups for token in group]
    labels = [subject for subject, group in enumerate(groups) for _ in group] * 2
    for before, now in itertools.pairwise(maps):
        cost = cost.next(before)
        rows = [smooth(m.numpy())[token].ravel() for m in (now, before) for token in order]
        assert float(cost(now)) == pytest.approx(contrast_by_loops(rows, labels), abs=1e-12)
        assert float(cost(now * 1e-5)) == pytest.approx(float(cost(now)), abs=1e-12)  # by angles
        assert not COSTS["conform"](groups).next(before.clone().requires_grad_())(now).requires_grad


def test_only_conform_remembers() -> None:
    maps = attention(2, 4, 3, 4)
    for name, made in COSTS.items():
        cost = made(PAIRS)
        assert (cost.next(maps) is cost) == (name != "conform")
        assert len({cost, made(PAIRS)}) == 2  # told apart, and hashable


# ---- by hand ---------------------------------------------------------------------------------------


def test_the_blur_by_hand() -> None:
    """A point becomes the kernel; at an edge the mirror brings a neighbour's share twice; a side of one stays."""
    side, centre = (w / (1 + 2 * math.exp(-0.5)) for w in (math.exp(-0.5), 1.0))
    assert (side, centre) == pytest.approx((0.2740686, 0.4518628), abs=1e-7)  # the published kernel
    row = blurred(spots((0, 1), rows=1, columns=4))[0, 0]
    assert row.tolist() == pytest.approx([2 * side, centre, side, 0])
    point = blurred(spots((2, 3)))[0]
    expected = torch.outer(*[torch.tensor([side, centre, side])] * 2)
    assert torch.allclose(point[1:4, 2:5], expected) and float(point.sum()) == pytest.approx(1)
    corner = blurred(spots((1, 1)))[0]
    assert corner[0, 0].item() == pytest.approx((2 * side) ** 2)
    assert torch.equal(blurred(spots((0, 0), rows=1, columns=1)), torch.ones(1, 1, 1))
    maps = attention(5, 2, 3, 4)
    assert torch.allclose(blurred(maps), blurred(maps.mean(0, keepdim=True)))


@pytest.mark.parametrize("released", [False, True])
def test_focus_at_its_ends(released: bool) -> None:
    """0: subjects apart, their words agree; 1/2: all looks the same; 1: words disagree, subjects look the same."""
    a, b = FAR
    for groups, places, expected in [
        (PAIRS, (a, a, b, b), 0.0),
        (PAIRS, (a, a, a, a), 0.5),
        (PAIRS, (a, b, a, b), 1.0),
        (((0,), (1,)), (a, b), 0.0),
        (((0,), (1,)), (a, a), 0.5),
        (ONE, (a, a, a), 0.0),
        (LONE, (a,), 0.0),
    ]:
        cost = COSTS["focus"](groups, released=released)(spots(*places, blocks=3))
        assert float(cost) == pytest.approx(expected, abs=1e-6), (groups, places)


def test_focus_by_hand() -> None:
    """Two places, 3 : 1 and 1 : 1: the third powers are 27/28, 1/28 and 1/2, 1/2. Two in a column
    are each other's mirror."""
    maps = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64).view(1, 2, 2, 1)
    side, centre = (w / (1 + 2 * math.exp(-0.5)) for w in (2 * math.exp(-0.5), 1.0))
    first = (3 * centre + side) ** 3, (3 * side + centre) ** 3
    p, q = first[0] / sum(first), 0.5
    m = (p + q) / 2

    def h(x: float) -> float:
        return -x * math.log2(x) - (1 - x) * math.log2(1 - x)

    expected = 1 - (h(m) - h(p) / 2 - h(q) / 2)
    assert float(COSTS["focus"](((0,), (1,)))(maps)) == pytest.approx(expected / 2, abs=1e-12)
    p, m = 27 / 28, (27 / 28 + 0.5) / 2  # without the blur
    expected = 1 - (h(m) - h(p) / 2 - 0.5) + 0.01 * (1 - (h(p) + 1) / 2)
    assert float(COSTS["jedi"](((0,), (1,)))(maps)) == pytest.approx(expected, abs=1e-12)


def test_the_others_at_their_ends() -> None:
    a, b = FAR
    alone, same = spots(a, b), spots(a, a)
    groups = ((0,), (1,))
    excite = COSTS["attend-and-excite"](groups)
    assert (float(excite(alone)), float(excite(same))) == pytest.approx((0, 0.5), abs=1e-6)
    third = spots(a, a, b)  # the mean of two words is a quarter of what three have, at best
    assert float(COSTS["attend-and-excite"](((0, 2), (1,)))(third)) == pytest.approx(0.5)
    divide, even = COSTS["divide-and-bind"](groups), torch.ones(1, 2, 6, 9)
    assert float(divide(even)) == pytest.approx(0, abs=1e-6)
    assert float(divide(torch.cat([alone[:, :1], even[:, :1]], 1))) == pytest.approx(0, abs=1e-6)  # the least decides
    # A point of 54 places under the blur: each of its rows rises to 54 w c and falls, w its weight, c the centre's.
    centre = 1 / (1 + 2 * math.exp(-0.5))
    varied = 2 * 54 * centre / (5 * 9) + 2 * 54 * centre / (6 * 8)
    inside = spots((2, 3), (2, 3))
    assert float(divide(inside)) == pytest.approx(-varied, rel=1e-5)
    jedi = COSTS["jedi"](groups)  # a point has no entropy
    assert (float(jedi(alone)), float(jedi(same))) == pytest.approx((0.01, 1.01), abs=1e-6)
    assert float(jedi(even)) == pytest.approx(1, abs=1e-6)


def test_contrast_by_hand() -> None:
    """At right angles: exp(1/T) against two of exp(0). All alike: 1 against 2. One label: nothing to tell it from."""
    eye = torch.eye(2, dtype=torch.float64).repeat(2, 1)
    expected = math.log1p(2 * math.exp(-1 / 0.07))
    assert float(contrast(eye, [0, 1, 0, 1])) == pytest.approx(expected, rel=1e-6)
    assert float(contrast(torch.ones(4, 3, dtype=torch.float64), [0, 1, 0, 1])) == pytest.approx(math.log(3))
    assert float(contrast(eye, [0, 0, 0, 0])) == 0


def test_jedi_looks_at_blocks_four_to_fifteen() -> None:
    """Of 24; of others at the same share of the depth, and at one at least."""
    for depth, heard in ((24, range(4, 16)), (10, range(1, 6)), (4, range(2)), (2, range(1)), (1, range(1))):
        for block in range(depth):
            maps = attention(depth, 4, 3, 3)
            changed = maps.clone()
            changed[block] = attention(1, 4, 3, 3, seed=1)
            same = torch.equal(COSTS["jedi"](PAIRS)(maps), COSTS["jedi"](PAIRS)(changed))
            assert same == (block not in heard), (depth, block)


# ---- what holds for all ----------------------------------------------------------------------------


def test_focus_is_from_0_to_1() -> None:
    found = []
    for seed in range(40):
        maps = attention(2, 6, 4, 5, seed=seed, peak=0.2 * seed).float()
        for groups, released in itertools.product((PAIRS, ODD, ONE, LONE), (False, True)):
            found.append(float(COSTS["focus"](groups, released=released)(maps)))
    assert min(found) >= -1e-6 and 0.6 < max(found) <= 1 + 1e-6


@pytest.mark.parametrize("name", COSTS)
def test_a_common_factor_changes_nothing(name: str) -> None:
    """In float32, at a hundred thousandth of the usual attention, where the released form no longer sees anything."""
    maps = attention(3, 6, 8, 9).float()
    cost = COSTS[name](ODD).next(attention(3, 6, 8, 9, seed=1).float())

    def told(cost: Cost, scale: float) -> tuple[float, Tensor]:
        given = (maps * scale).requires_grad_()
        value = cost(given)
        value.backward()
        assert given.grad is not None
        return float(value.detach()), given.grad * scale

    value, gradient = told(cost, 1)
    small, small_gradient = told(cost, 1e-5)
    assert small == pytest.approx(value, abs=1e-5)
    assert torch.allclose(small_gradient, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert float(gradient.abs().max()) > 0
    if name == "focus":
        blind, no_gradient = told(COSTS[name](ODD, released=True), 1e-5)
        assert blind == pytest.approx(0.5, abs=1e-3)
        assert float(no_gradient.abs().max()) < 1e-3 * float(gradient.abs().max())


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", COSTS)
def test_gradients_are_right(name: str, released: bool) -> None:
    for shape, groups in (((3, 6, 2, 3), ODD), ((2, 6, 1, 3), PAIRS), ((1, 6, 3, 1), ONE)):
        maps = attention(*shape, peak=1.0)
        cost = COSTS[name](groups, released=released).next(attention(*shape, seed=1))
        assert torch.autograd.gradcheck(cost, [maps.requires_grad_()], eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("groups", [PAIRS, ODD, ONE, LONE, ((0,), (1,))], ids=str)
def test_every_cost_has_a_graph_and_finite_gradients(name: str, groups: Groups) -> None:
    """Also where there is nothing to compare, and where attention is 0, in one map or everywhere."""
    tokens = 1 + max(token for group in groups for token in group)
    dark = attention(2, tokens, 3, 4).float()
    dark[:, 0] = 0
    for maps in (attention(2, tokens, 3, 4).float(), dark, torch.zeros(2, tokens, 1, 1), spots(*[(0, 0)] * tokens)):
        first = COSTS[name](groups)
        for cost in (first, first.next(maps), first.next(torch.zeros_like(maps))):
            given = maps.clone().requires_grad_()
            value = cost(given)
            value.backward()
            assert given.grad is not None and given.grad.isfinite().all() and value.isfinite()


def test_groups_have_words() -> None:
    for groups in ((), ((0,), ())):
        with pytest.raises(AssertionError):
            COSTS["focus"](groups)
