"""From settings to how a picture is denoised: its solver, its noise levels, its guidance."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmdit.altered import Change
from mmdit.common.errors import SettingsError
from mmdit.driver.likeness import RULES, acts
from mmdit.driver.settings import Settings
from mmdit.images.options import steps_of
from samplers import NEGATIVE, PROMPT, SOLVERS, Guidance, Solver, Term, guidance, scheduled, shift_for
from samplers.options import interval_of, layers_of, projection_of, shift_of, sigmas_in, weighted


def solver_of(s: Settings) -> Solver:
    return SOLVERS[s.sampler]


def sigmas_of(s: Settings, shift: float) -> Tensor:
    """The noise levels of its steps, `(steps + 1,)`, float32; of image to image, those that are left.

    shift: the model's own. Raises SettingsError where a schedule has no so many.
    """
    assert s.steps
    if s.sigmas is not None:
        every = torch.tensor([*sigmas_in(s.sigmas), 0.0])
    else:
        every = scheduled(s.schedule, s.steps, own_shift(s) or shift)
    return every[s.steps - steps_of(s) :]


def own_shift(s: Settings) -> float | None:
    """A shift of the user's, as a number."""
    return None if s.shift is None else shift_of(s.shift)


def with_shift(s: Settings, shift: float, usual: dict[str, Any]) -> Settings:
    """With a number for a shift of auto. shift: the model's own, for pictures of its `usual` width and height."""
    if s.shift != "auto":
        return s
    assert s.width and s.height
    return replace(s, shift=f"{shift_for(shift, s.width * s.height, usual['width'] * usual['height']):.6g}")


def levels_of(s: Settings, shift: float) -> list[float]:
    """All noise levels at which the network is asked, falling."""
    return sorted(set(solver_of(s).levels(sigmas_of(s, shift)[rest_of(s) :]).tolist()), reverse=True)


def rest_of(s: Settings) -> int:
    """How many steps at the beginning change nothing; the only step of a run is a step as ever."""
    return int(s.cfg_zero and steps_of(s) > 1)


def guidance_of(s: Settings, shift: float, last: Sequence[Term] = ()) -> Guidance:
    """A new one for each picture, since it may remember what it was told.

    shift: the model's own. last: terms that come behind all others.
    """
    terms: list[Term] = []
    if s.also:
        terms.append(guidance.composition({also(i): weighted(text)[1] for i, text in enumerate(s.also)}))
    if s.cfg != 1:
        terms.append(_between_texts(s))
    if s.slg:
        assert s.slg_layers
        counts, interval = RULES[s.like].slg_counts, interval_of(s.slg_interval)
        when = partial(acts, counts, interval, shift=own_shift(s) or shift)
        terms.append(guidance.away_from(Change("skip", layers_of(s.slg_layers)), s.slg, when))
    if s.pag:
        assert s.pag_layers
        terms.append(guidance.away_from(Change("perturb", layers_of(s.pag_layers)), s.pag))
    if s.cfg_rescale:
        terms.append(guidance.rescaled(s.cfg_rescale))
    guide = guidance.combined(*terms, *last)
    return guidance.cached(guide, s.cache) if s.cache else guide


def _between_texts(s: Settings) -> Term:
    assert s.cfg is not None
    scale: Any = s.cfg if s.cfg_schedule == "constant" else guidance.rising(s.cfg, s.cfg_schedule)
    interval = interval_of(s.cfg_interval)
    if s.apg is not None:
        return guidance.projected_guidance(scale, *projection_of(s.apg), interval)
    way = guidance.zero_star_guidance if s.cfg_zero else guidance.classifier_free_guidance
    return way(scale, interval)


def changed(s: Settings) -> int:
    """How many evaluations by a changed network its guidance asks for at most."""
    return bool(s.slg) + bool(s.pag)


def also(i: int) -> str:
    """The name of the i-th further text."""
    return f"also {i}"


def prompts_of(s: Settings) -> dict[str, str]:
    """The texts of a picture by their part in its guidance."""
    found = {PROMPT: s.prompt} | {also(i): weighted(text)[0] for i, text in enumerate(s.also)}
    return found | ({} if s.cfg == 1 and not s.also else {NEGATIVE: s.negative})


def with_layers(s: Settings, depth: int) -> Settings:
    """With the blocks that are left out filled in; SettingsError for one that a model of so many blocks has not.

    Where none are named, they lie as deep as 7, 8, 9 and 13 of SD3.5-Medium's 24 do.
    """
    usual = {"slg_layers": (7, 8, 9), "pag_layers": (13,)}
    for name, blocks in usual.items():
        if not getattr(s, name.removesuffix("_layers")):
            continue
        if getattr(s, name) is None:
            s = replace(s, **{name: ",".join(map(str, sorted({block * depth // 24 for block in blocks})))})
        layers = layers_of(getattr(s, name), name)
        if layers[-1] >= depth:
            raise SettingsError(f"{name}: there is no block {layers[-1]}: the model's {depth} are numbered from 0")
    return s
