"""What it costs that the subjects of a picture mix, by the attention that its places pay to the words of each.

A cost is made for one picture, of the words of each subject; `COSTS` has them by the names that users give them. It is
called with the picture's maps and returns a scalar with a graph, whatever there is of subjects, words and places. It is
at least float32; float64 stays. The formulas are those of FOCUS (Bill et al. 2025, arXiv 2510.02315) and of the methods
that it compares itself with, each named below.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = tuple[tuple[int, ...], ...]  # of each subject, which of the maps' tokens are its words

_SPREAD = 1.0  # of the blur, in places
_LEAST = 1e-10  # what FOCUS's authors take for nothing
_TEMPERATURE = 0.07  # of the contrast, as pytorch_metric_learning has it
_EVENNESS = 0.01  # weight of JEDI's third part


@dataclass(frozen=True, eq=False)
class Cost:
    """What maps `(blocks, tokens, rows, columns)` cost: the attention to each token, the mean over heads.

    groups: at least one, each of at least one token. sharpness: the power that maps are raised to before they are
    compared as distributions; 3 in FOCUS. released: compare them as the authors' program does, with 1e-10 for nothing,
    instead of by a form that no common factor of the maps changes. Costs that compare no distributions heed neither.
    """

    groups: Groups
    sharpness: float = 3.0
    released: bool = False

    def __post_init__(self) -> None:
        assert self.groups and all(self.groups), f"{self.groups}: a subject without words"

    def __call__(self, maps: Tensor) -> Tensor:
        """The cost, a scalar."""
        raise NotImplementedError

    def next(self, maps: Tensor) -> "Cost":  # noqa: ARG002
        """The cost for the next step, where these were the maps of this one."""
        return self


class Focus(Cost):
    """The words of a subject should look at the same places, those of different subjects at others.

    Bill et al. 2025 (arXiv 2510.02315): half the sum of how much the words of a subject differ, in the mean over
    subjects of several words, and of how little the subjects' mean maps differ. 0 is best, 1 worst.
    """

    def __call__(self, maps: Tensor) -> Tensor:
        tokens = blurred(maps).flatten(1)
        return (_incoherence(tokens, self) + _overlap(_subjects(tokens, self.groups), self)) / 2


@dataclass(frozen=True, eq=False)
class Conform(Cost):
    """The maps of a subject should be alike, also to those of the step before, and unlike those of others.

    Meral et al. 2024 (arXiv 2312.06059): `contrast` between the words' maps of this step and of the last, before, which
    are `(words, places)`. The first step has none, and costs nothing.
    """

    before: Tensor | None = None

    def __call__(self, maps: Tensor) -> Tensor:
        words = self._words(maps)
        if self.before is None:
            return 0 * words.sum()
        labels = [subject for subject, group in enumerate(self.groups) for _ in group]
        return contrast(torch.cat([words, self.before]), labels * 2)

    def next(self, maps: Tensor) -> Cost:
        return replace(self, before=self._words(maps).detach())

    def _words(self, maps: Tensor) -> Tensor:
        return _picked(blurred(maps).flatten(1), [token for group in self.groups for token in group])


class AttendAndExcite(Cost):
    """Each subject should have a place of its own: the one that has the least of any decides.

    Chefer et al. 2023 (arXiv 2301.13826), as FOCUS's authors take it: on the shares that the words have of each place.
    """

    def __call__(self, maps: Tensor) -> Tensor:
        tokens = blurred(maps).flatten(1)
        shares = _normalised(tokens, 0)
        return F.relu(1 - _subjects(shares, self.groups).amax(1).amin())


class DivideAndBind(Cost):
    """Each subject's map should have edges: the one with the least of them decides.

    Li et al. 2023 (arXiv 2307.10864), as FOCUS's authors take it: minus the total variation, which is the mean
    difference between neighbours down plus that across, of maps whose mean is 1.
    """

    def __call__(self, maps: Tensor) -> Tensor:
        means = _subjects(blurred(maps), self.groups)  # (subjects, rows, columns)
        means = _normalised(means, (1, 2)) * means[0].numel()
        steps = [means.diff(dim=dim).abs() for dim in (1, 2) if means.shape[dim] > 1]
        variation = sum((step.mean((1, 2)) for step in steps), 0 * means.sum((1, 2)))
        return -variation.amin()


class Jedi(Cost):
    """As FOCUS's two parts, in the blocks of the middle, each by itself; and no map should be a point.

    Bill et al. 2025 (arXiv 2505.19166): the sum of both and of a hundredth of 1 - entropy / log(places), the mean over
    blocks 4 to 15 of 24, or the same share of another depth. Nothing is blurred.
    """

    def __call__(self, maps: Tensor) -> Tensor:
        depth = len(maps)
        tokens = (
            _exact(maps[depth // 6 : max(depth * 2 // 3, 1)]).flatten(2).transpose(0, 1)
        )  # (tokens, blocks, places)
        subjects = _subjects(tokens, self.groups)
        sharp = _sharpened(subjects, self, least=0.0)
        entropy = -(sharp * _log(sharp, self)).sum(-1) / math.log(max(sharp.shape[-1], 2))
        parts = _incoherence(tokens, self, 0.0) + _overlap(subjects, self, 0.0)
        return (parts + _EVENNESS * (1 - entropy).mean(0)).mean()


COSTS: dict[str, type[Cost]] = {
    "focus": Focus,
    "conform": Conform,
    "attend-and-excite": AttendAndExcite,
    "divide-and-bind": DivideAndBind,
    "jedi": Jedi,
}


# ---- maps as distributions -------------------------------------------------------------------------


def divergence(maps: Tensor, cost: Cost, least: float = _LEAST) -> Tensor:
    """How much maps `(n, ..., places)` differ: their Jensen-Shannon divergence over log n, from 0 to 1, shaped `(...)`.

    Of one map it is 0. least: below it a released form takes a map's sum for nothing.
    """
    sharp = _sharpened(maps, cost, least)
    apart = (sharp * (_log(sharp, cost) - _log(sharp.mean(0), cost))).sum(-1).mean(0)
    return apart / math.log(max(len(maps), 2))


def _sharpened(maps: Tensor, cost: Cost, least: float) -> Tensor:
    """Maps `(..., places)` to a power, with sum 1."""
    if cost.released:
        power = maps**cost.sharpness
        return power / power.sum(-1, keepdim=True).clamp(min=least)
    return (cost.sharpness * _above_zero(maps).log()).softmax(-1)


def _log(shares: Tensor, cost: Cost) -> Tensor:
    return (shares + _LEAST).log() if cost.released else _above_zero(shares).log()


def _incoherence(tokens: Tensor, cost: Cost, least: float = _LEAST) -> Tensor:
    """How much the words of a subject differ, in the mean over those of several words; 0 without any."""
    several = [divergence(_picked(tokens, group), cost, least) for group in cost.groups if len(group) > 1]
    return torch.stack(several).mean(0) if several else 0 * tokens.sum((0, -1))


def _overlap(subjects: Tensor, cost: Cost, least: float = _LEAST) -> Tensor:
    """How little subjects differ; 0 for one alone."""
    return 1 - divergence(subjects, cost, least) if len(subjects) > 1 else 0 * subjects.sum((0, -1))


# ---- maps as vectors -------------------------------------------------------------------------------


def contrast(vectors: Tensor, labels: Sequence[int]) -> Tensor:
    """How hard vectors `(n, places)` with the same label are to tell from others, the mean over all such pairs.

    -log of exp(s_ab) over itself and exp(s_ac) of all c with another label, s the cosine over a temperature of 0.07.
    NTXentLoss of pytorch_metric_learning as it is by default.
    """
    known = torch.tensor(labels, device=vectors.device)
    alike = known[:, None] == known
    unit = F.normalize(vectors, dim=1, eps=torch.finfo(vectors.dtype).tiny)
    likeness = unit @ unit.T / _TEMPERATURE  # (n, n)
    others = likeness.masked_fill(alike, -torch.inf).logsumexp(1, keepdim=True)
    each = torch.logaddexp(likeness, others) - likeness
    pairs = alike & ~torch.eye(len(labels), dtype=torch.bool, device=vectors.device)
    return each.where(pairs, 0).sum() / pairs.sum()


# ---- maps as pictures ------------------------------------------------------------------------------


def blurred(maps: Tensor) -> Tensor:
    """The mean of maps `(blocks, tokens, rows, columns)` over blocks, with three places in each direction mixed.

    By a Gaussian curve with a deviation of 1 place; beyond an edge lies what is before it, as in a mirror. A side of
    one place stays as it is.
    """
    return _along_columns(_along_columns(_exact(maps).mean(0)).mT).mT


def _along_columns(maps: Tensor) -> Tensor:
    if maps.shape[-1] == 1:
        return maps
    aside = math.exp(-0.5 / _SPREAD**2)
    before = torch.cat([maps[..., 1:2], maps[..., :-1]], -1)
    after = torch.cat([maps[..., 1:], maps[..., -2:-1]], -1)
    return (aside * (before + after) + maps) / (1 + 2 * aside)


def _exact(maps: Tensor) -> Tensor:
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def _picked(tokens: Tensor, which: Sequence[int]) -> Tensor:
    return torch.stack([tokens[token] for token in which])  # an index of several would make a GPU wait


def _subjects(tokens: Tensor, groups: Groups) -> Tensor:
    """The mean of each subject's maps, `(subjects, ...)`: of attention as it is, so that stronger words count more."""
    return torch.stack([_picked(tokens, group).mean(0) for group in groups])


def _normalised(maps: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    return maps / _above_zero(maps.sum(dim, keepdim=True))


def _above_zero(maps: Tensor) -> Tensor:
    return maps.clamp(min=torch.finfo(maps.dtype).tiny)
