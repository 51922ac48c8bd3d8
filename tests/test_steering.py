"""All that steers a picture, in random combinations: each runs, repeats from its PNG, equals itself in a batch."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from controls import control_folder, control_for, nets
from PIL import Image
from reference import relative_error
from sweeps import sampled
from toys import toy_folder

from mmdit.driver.output import save_image
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import Settings, alone
from samplers.options import SAMPLERS, SPACINGS

WAYS: dict[str, list[dict[str, Any]]] = {
    "solver": [{"sampler": name} for name in SAMPLERS],
    "levels": [*({"schedule": name} for name in SPACINGS), {"shift": "1.5"}, {"sigmas": "1,0.8,0.5,0.2"}],
    "texts": [{"negative": "a pig"}, {"also": ("a pig:0.5",)}, {"emphasis": True, "prompt": "a (horse:1.3)"},
              {"long_prompts": True, "prompt": "a horse " * 40}, {"prompt_t5": "a bear"}, {"t5_length": 31}],
    "guidance": [{"cfg": 1}, {"cfg_zero": True}, {"apg": "0:5:-0.5"}, {"cfg_interval": "0.3:0.9"},
                 {"cfg_schedule": "cosine", "cfg_rescale": 0.5}],
    "worse": [{"slg": 2.0, "slg_interval": "0:1"}, {"pag": 1.0}],
    "cache": [{"cache": 0.2}],
    "subjects": [{"focus": "a horse", "focus_scale": 0.2, "focus_gain": "relative", "focus_until": 0.3}],
    "like": [{"like": "comfyui"}, {"like": "stability"}, {"rng": "cuda"}],
    "noise": [{"variation_seed": 5, "variation_strength": 0.3}],
    "init": [{"strength": 0.6}, {"mask": True, "mask_blur": 3}, {"mask": True, "strength": 0.7, "mask_edges": "latent"},
             {"outpaint": "16,0,32,0"}],
    "control": [{"control_scale": (0.7,)}, {"control_interval": ("0:0.6",)}],
}  # fmt: skip


def combination(seed: int, pictures: Path) -> dict[str, Any]:
    """Some ways, each with the chance of a half; solver and levels always."""
    random = Random(seed)
    found: dict[str, Any] = {"prompt": "a horse", "steps": 4, "seed": random.randrange(1000)}
    for name, ways in WAYS.items():
        if name in ("solver", "levels") or random.random() < 0.5:
            found |= random.choice(ways)
            if name == "init":
                found["init"] = str(pictures / "init.png")
            if name == "control":
                found["control_image"] = (str(pictures / "edges.png"),)
    if found.get("mask"):
        found["mask"] = str(pictures / "mask.png")
    if found.get("cfg") == 1:  # without guidance there is none to change
        found = {name: value for name, value in found.items() if name not in ("cfg_rescale", "apg", "cfg_zero")}
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("init", "edges"):
        Image.fromarray(random.integers(0, 256, (64, 96, 3), np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((64, 96), np.uint8)
    mask[8:40, 20:60], mask[40:50, 20:60] = 255, 120
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Pipeline]:
    """In float32, without a ControlNet and with one, the latter streamed."""
    root = tmp_path_factory.mktemp("steering")
    defaults = {"width": 96, "height": 64, "steps": 3, "cfg": 4.5, "t5_length": 20}
    folder = toy_folder(root, defaults=defaults)
    plain = Pipeline.load(folder, device="cpu", dtype="fp32")
    net, _ = nets(control_for(plain.transformer.config))
    both = Pipeline.load(folder, device="cpu", dtype="fp32", control=[str(control_folder(root / "net", net))])
    ladder = both.planner.ladder
    both.planner.ladder = lambda: ladder()[-1:]
    return {False: plain, True: both}


def end_of(pipeline: Pipeline, s: Settings) -> torch.Tensor:
    trace: dict[str, torch.Tensor] = {}
    pipeline.run(s, trace)
    return trace[max((name for name in trace if name.startswith("latents.")), key=lambda name: int(name[8:]))]


@pytest.mark.parametrize("seed", sampled(range(60), 30))
def test_a_combination(pipelines: dict[bool, Pipeline], pictures: Path, tmp_path: Path, seed: int) -> None:
    """Latents of two together are those of each alone; a picture's file draws it again, bit for bit."""
    asked = combination(seed, pictures)
    pipeline = pipelines["control_image" in asked]
    s = pipeline.check(pipeline.asked(asked))
    together = end_of(pipeline, replace(s, count=2))
    for i, single in enumerate(alone(replace(s, count=2))):
        assert relative_error(together[i : i + 1], end_of(pipeline, single)) <= 1e-4, asked
    drawn = pipeline.run(s)
    path = save_image(drawn.images[0], drawn.settings, tmp_path / "x.png")
    again = pipeline.repeat(path)[0]
    assert np.array_equal(np.asarray(again), np.asarray(drawn.images[0])), asked
