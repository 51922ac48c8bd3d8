"""The `parameters` that AUTOMATIC1111's web UI and its relatives write into pictures, read as settings.

Prompt, `Negative prompt:` and a last line of `Name: value` pairs (its `infotext_utils.py`).
"""

import re

from mmdit.driver.foreign import SAMPLERS, SCHEDULES, Reading, number, plain

_PAIR = re.compile(r'(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_NETWORK = re.compile(r"<\w+:[^<>]{1,200}>")  # in a prompt, as <lora:style:0.8>

# What its samplers take where the schedule is "Automatic" (`sd_samplers_kdiffusion.py`); the others are uniform.
_AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_2m_sde": "exponential", "dpmpp_3m_sde": "exponential"}
_NAMES = {"Steps": "steps", "CFG scale": "cfg", "Seed": "seed", "Shift": "shift"}
_OF_NO_USE = {"Version", "Model hash"}
_VARIATION = {"Variation seed": "variation_seed", "Variation seed strength": "variation_strength"}
# Who draws the noise. Where that is the GPU, the web UI and Forge, told by their versions, do not say so.
_RNG = {"cpu": "cpu", "gpu": "cuda", "nv": "cuda", "cuda": "cuda"}
_GPU_UNLESS_SAID = re.compile(r"(v1\.|f\d)")


def read_parameters(text: str) -> Reading | None:
    """What the text says; None where it is not of this kind."""
    *lines, last = text.strip().split("\n")
    pairs = dict(_PAIR.findall(last))
    if len(pairs) < 3:
        return None
    found = Reading()
    _read_prompts(found, lines)
    for name, value in pairs.items():
        value = re.sub(r"\\(.)", r"\1", value[1:-1]) if value[:1] == '"' else value.strip()
        told = f"{name} {value}"[:80]
        if name in _NAMES:
            found.take(_NAMES[name], value if number(value) is not None else None, told)
        elif name in _VARIATION and _VARIATION.keys() <= pairs.keys():
            found.take(_VARIATION[name], value if number(value) is not None else None, told)
        elif name == "Size" and re.fullmatch(r"\d{1,9}x\d{1,9}", value):
            for side, pixels in zip(("width", "height"), value.split("x")):
                found.take(side, int(pixels), told)
        elif name not in (*_OF_NO_USE, "Sampler", "Schedule type", "RNG"):
            found.leave(told)
    version = pairs.get("Version", "").strip()
    if version.startswith("stable-diffusion.cpp"):
        found.as_by("sdcpp")
    if "RNG" in pairs or _GPU_UNLESS_SAID.match(version):
        rng = pairs.get("RNG", "GPU").strip()
        found.take("rng", _RNG.get(rng.lower()), f"RNG {rng}"[:80])
    if "Sampler" in pairs:
        read_sampler(found, pairs["Sampler"].strip(), pairs.get("Schedule type", "").strip())
    return found


def _read_prompts(found: Reading, lines: list[str]) -> None:
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE)
    read_prompts(found, "\n".join(lines[:start]), negative)


def read_prompts(found: Reading, prompt: str, negative: str) -> None:
    """What is to be drawn and what not, as its users write it."""
    for name, text in (("prompt", prompt), ("negative", negative)):
        for network in _NETWORK.findall(text):
            found.leave(network)
        found.text(name, _NETWORK.sub("", text).strip(), name)


def read_sampler(found: Reading, sampler: str, schedule: str) -> None:
    """Solver and noise levels by their names there.

    Of old, a schedule was the last word of the sampler's name, as in DPM++ 2M Karras.
    """
    first, _, word = sampler.rpartition(" ")
    told = f"Sampler {sampler}"[:80]
    if plain(sampler) not in SAMPLERS and not schedule and plain(word) in SCHEDULES:
        sampler, schedule = first, word
    found.sampler(sampler, told)
    if not schedule and "like" in found.settings:
        return  # that program's own
    if plain(schedule) in ("", "automatic"):
        schedule = _AUTOMATIC.get(SAMPLERS.get(plain(sampler), ""), "normal")
    found.schedule(schedule, f"Schedule type {schedule}"[:80])
