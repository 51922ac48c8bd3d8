"""`--like PROGRAM`: what another program does where programs differ, so that its pictures can be repeated.

The command line and Python's keywords take what is a setting from here, unless it is given; the rest is looked up while
a picture is drawn.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from samplers import Moment

LIKE = ("stability", "diffusers", "comfyui", "sdcpp", "kohya", "focus")


class Rules(NamedTuple):
    """Where programs differ."""

    schedule: str = "normal"
    t5_length: int | None = None  # T5's tokens; None: as many as the model's own setting says
    without_t5: tuple[str, int | None] = ("off", None)  # what `--t5 off` comes to, and the length then
    noise: str = "float32"  # the format that starting noise is rounded to; "model": the model's
    rng: str = "cpu"  # who draws it
    rounds_latents: bool = False  # to the model's format, after each step
    truncates_pixels: bool = False  # to the level below, not to the nearest
    slg_interval: str = "0.01:0.2"
    slg_counts: str = "steps"  # what the bounds of skip-layer guidance are compared with


# Read in the programs: Stability AI's sd3.5 (sd3_infer.py, sd3_impls.py), diffusers' StableDiffusion3Pipeline,
# ComfyUI's samplers.py, sd3_clip.py and nodes_sd3.py, stable-diffusion.cpp's denoiser.hpp and conditioner.hpp, kohya's
# minimal inference for SD3, FOCUS's sample.py, which draws by diffusers.
_DIFFUSERS = Rules(t5_length=256, noise="model", rounds_latents=True)
RULES: dict[str | None, Rules] = {
    None: Rules(),
    "stability": Rules(t5_length=77, noise="float16", truncates_pixels=True),
    "diffusers": _DIFFUSERS,
    "comfyui": Rules(
        t5_length=77, without_t5=("omit", None), truncates_pixels=True, slg_interval="0.01:0.15", slg_counts="noise"
    ),
    "sdcpp": Rules(schedule="discrete", t5_length=77, rng="cuda", slg_counts="steps from 1"),
    "kohya": Rules(t5_length=256, without_t5=("off", 77), noise="model"),
    "focus": _DIFFUSERS._replace(t5_length=77),
}


def filled(given: Mapping[str, Any], of_base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is given, and what the program that it names as `like` does for settings that are not.

    of_base: settings that hold where nothing is given, for what `t5` comes to.
    """
    like = given.get("like")
    if not isinstance(like, str) or like not in RULES:
        return dict(given)
    rules = RULES[like]
    base = of_base or {}
    t5 = given.get("t5", base.get("t5", "on"))
    mode, length = rules.without_t5 if t5 != "on" else ("on", None)
    own = {**_own(rules), "t5_length": length or rules.t5_length}
    if given.get("sigmas", base.get("sigmas")) is not None:
        del own["schedule"]  # they say all levels
    usual, before = _own(RULES[None]), _own(RULES[base.get("like")])
    unsaid = {name for name in own if base.get(name, usual[name]) in (usual[name], before[name])}
    found = {**{name: own[name] for name in unsaid}, **given}
    return found if t5 == "on" else {**found, "t5": mode if t5 == "off" else t5}


def _own(rules: Rules) -> dict[str, Any]:
    """What of the rules are settings."""
    names = ("schedule", "t5_length", "slg_interval", "rng")
    return {name: getattr(rules, name) for name in names}


def acts(counts: str, interval: tuple[float, float], at: "Moment", shift: float) -> bool:
    """Whether skip-layer guidance acts at this moment, by who counts. shift: of the noise levels.

    "steps": strictly between these shares of the steps (Stability AI, diffusers). "noise": between the noise levels at
    these shares of the schedule, bounds included (ComfyUI). "steps from 1": stable-diffusion.cpp.
    """
    low, high = interval
    step, steps, sigma = at.step, at.steps, float(at.sigma)
    if counts == "noise":
        from_noise = [shift * (1 - share) / (1 + (shift - 1) * (1 - share)) for share in (high, low)]
        return from_noise[0] <= sigma <= from_noise[1]
    if counts == "steps from 1":
        return int(low * (steps + 1)) < step + 1 < int(high * (steps + 1))
    return low * steps < step < high * steps
