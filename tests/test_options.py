"""The command line's options, frozen: a change here is a change that users see. And what follows from declaring one."""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, marked, option, rooms, wrong
from mmdit.driver.options import OF_THE_COMMAND, PictureOptions
from mmdit.driver.output import parameters, save_image
from mmdit.driver.prompts import picture_settings
from mmdit.driver.settings import LOADED, SD35_MEDIUM_DEFAULTS, Settings, identity, keywords, settings_from
from mmdit.run import make_parser, settings_of

ROOT = Path(__file__).parents[1]
OPTIONS = """\
The picture:
prompt None what
--negative '' TEXT
--width None W
--height None H
--seed 0 S
--count 1 N
Pictures to begin with:
--init None IMAGE
--strength None X
--fit 'crop' crop,pad,stretch
--mask None IMAGE
--mask-blur 0.0 N
--mask-crop None MARGIN
--mask-edges 'pixels' pixels,latent
--outpaint None LEFT,TOP,RIGHT,BOTTOM
--upscale None X
--upscale-strength 0.4 X
--variation-seed None V
--variation-strength None X
ControlNets; what is said of several is repeated, in one order:
--control [] FILE|FOLDER
--control-image [] IMAGE
--control-scale [] X
--control-interval [] LOW:HIGH
--control-mask None MASK
--control-type [] TYPE
--control-map 'auto' auto,diffusers,stability
How it is denoised:
--sampler 'euler' euler,heun,dpmpp_2m,dpmpp_2m_sde,dpmpp_3m_sde,euler_ancestral,unipc,deis,lms,res_multistep
--schedule 'normal' normal,sgm_uniform,simple,beta,karras,exponential,linear,discrete
--steps None N
--shift None X|auto
--sigmas None X,X,...|FILE
How it is guided:
--cfg None X
--cfg-interval None LOW:HIGH
--cfg-schedule 'constant' constant,linear,cosine
--cfg-rescale 0.0 X
--cfg-zero False what
--apg None ETA[:NORM[:MOMENTUM]]
--also [] TEXT[:WEIGHT]
--slg 0.0 X
--slg-layers None N,N,...
--slg-interval '0.01:0.2' LOW:HIGH
--pag 0.0 X
--pag-layers None N,N,...
--cache 0.0 X
Several subjects:
--focus None TEXT;TEXT
--focus-scale 0.3 X
--focus-loss 'focus' focus,conform,attend-and-excite,divide-and-bind,jedi
--focus-until 0.9 X
--focus-gain 'relative' code,memoryless,unit,step,relative
--attention-maps None TEXT;TEXT
Whose picture it is to be:
--like None stability,diffusers,comfyui,sdcpp,kohya,focus
--rng 'cpu' cpu,cuda
How the prompt is read:
--prompt-clip-l None TEXT
--prompt-clip-g None TEXT
--prompt-t5 None TEXT
--negative-clip-l None TEXT
--negative-clip-g None TEXT
--negative-t5 None TEXT
--emphasis False what
--long-prompts False what
--embedding [] FILE
--t5 'on' on,off,omit
--t5-length None N
The model:
--model None FOLDER|FILE|ID
--clip-l None FILE
--clip-g None FILE
--t5xxl None FILE
--vae None FILE
--tokenizers None FOLDER
--lora [] FILE|FOLDER[:SCALE]
--variant None FILE|MODULE
A small autoencoder:
--taesd None FILE|FOLDER
--taesd-decode False what
How it is computed:
--device 'auto' auto,cpu,cuda,mps
--dtype 'auto' auto,bf16,fp16,fp32
--quantise 'none' none,int8,fp8
--attention 'auto' auto,sdpa,cores,flash,xformers,cudnn,math
--compile False what
Memory:
--memory 'auto' SIZE
Several processes:
--parallel 'auto' auto,pictures,guidance,tokens,both
A list on many machines:
--shard None I/N
--claim None SECONDS
--ray None auto|local|ADDRESS
--ray-actors None LEAST:MOST
--ray-cores 1 N
Watching, and repeating:
--preview None N
--verbose False what
--from-png None FILE
What is written, and a list in place of a prompt:
--out 'out' FILE|FOLDER
--prompts None FILE
--dump None FILE.safetensors
"""


def told(parser: argparse.ArgumentParser) -> list[str]:
    lines = []
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        lines += [f"{group.title}:"] if actions else []
        for a in actions:
            lines.append(
                f"{[*a.option_strings, a.dest][0]} {a.default!r} {','.join(a.choices or [a.metavar or 'what'])}"
            )
    return lines


def test_the_options_are_frozen() -> None:
    """Headings, names, defaults and values of all of them, each a field of Settings and with its default."""
    assert told(make_parser()) == OPTIONS.splitlines()
    names = [a.dest for a in make_parser()._actions if not isinstance(a, argparse._HelpAction)]
    assert (
        names == [f.name for f in fields(Settings) if f.name not in marked(Settings, Mark.FOUND)] == keywords(Settings)
    )
    assert settings_of(["x"]) == Settings("x")
    assert settings_of(["--prompts", "x.txt"]) == Settings(prompts="x.txt")
    assert SD35_MEDIUM_DEFAULTS == {"width": 1024, "height": 1024, "steps": 28, "cfg": 4.5, "t5_length": 256}


def test_every_option_has_a_heading_and_a_help() -> None:
    for heading, own in rooms(Settings).items():
        assert heading and all(f.metadata["help"] for f in own)


def test_help_loads_neither_torch_nor_numpy() -> None:
    """In a process of its own, nor does a mistake; every option is in the help."""
    found = "print(sorted({{'torch', 'numpy'}} & {{*sys.modules}}))"
    code = f"import sys, mmdit.run\ntry: mmdit.run.main({{}})\nfinally: {found}"
    for arguments in (
        ["--help"],
        ["x", "--steps", "many"],
        ["x", "--dump", "x"],
        ["--prompts", "none.txt"],
        ["--from-png", "x"],
    ):
        command = [sys.executable, "-c", code.format(arguments)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (ran.stderr.count("\n"), ran.stdout.splitlines()[-1]) == (arguments[0] != "--help", "[]")
        if arguments == ["--help"]:
            assert ran.returncode == 0
            assert all(line.split()[0] in ran.stdout for line in OPTIONS.splitlines())


# ---- a new option ----------------------------------------------------------------------------------


def check_sheen(name: str, value: Any) -> None:
    if value > 5:
        raise wrong(name, value, "at most 5")


@dataclass(frozen=True)
class ToyOptions:
    """The toy"""

    colour: str = option("red", "its colour", choices=("red", "blue"))
    sheen: float | None = option(None, "its sheen", metavar="X", check=check_sheen)
    parts: tuple[str, ...] = option((), "what it is made of", metavar="PART")
    shiny: bool = option(False, "it shines")
    box: str = option("box", "where it is put", Mark.NOT_SEEN, Mark.OF_THE_RUN)


@dataclass(frozen=True)
class More(ToyOptions, Settings):
    """Settings with one room more."""


GIVEN = {"colour": "blue", "sheen": 2.0, "parts": ("a", "b"), "shiny": True}


def test_an_option_is_declared_once(tmp_path: Path) -> None:
    """One field: on the command line, a keyword, a key of lists, in both metadata, and it changes the picture."""
    parser = make_parser(More)
    assert told(parser)[-6:] == [
        "The toy:", "--colour 'red' red,blue", "--sheen None X", "--parts [] PART", "--shiny False what",
        "--box 'box' what",
    ]  # fmt: skip
    words = ["x", "--colour", "blue", "--sheen", "2", "--parts", "a", "--parts", "b", "--shiny"]
    settings = More(**vars(parser.parse_args(words)))
    assert settings == settings_from({"prompt": "x", **GIVEN}, More()) == More("x", **GIVEN)
    assert settings == picture_settings({"prompt": "x", **GIVEN, "parts": ["a", "b"]}, More())
    with pytest.raises(SettingsError, match=r"box belongs to the whole run: .* a line has prompt, .*, colour, sheen"):
        picture_settings({"prompt": "x", "box": "y"}, More())
    path = save_image(Image.new("RGB", (8, 8)), replace(settings, out=str(tmp_path)), tmp_path / "x.png")
    with Image.open(path) as image:
        assert json.loads(image.text["mmdit"]).items() >= {**GIVEN, "parts": ["a", "b"]}.items()
        assert 'colour: blue, sheen: 2.0, parts: "a, b", shiny: True' in image.text["parameters"]
    seen = {identity(replace(More("x"), **{name: value})) for name, value in GIVEN.items()}
    assert len(seen | {identity(More("x"))}) == 5
    assert identity(More("x", box="y")) == identity(More("x"))
    More("x").resolved({})


@pytest.mark.parametrize(("given", "message"), [
    ({"colour": "green"}, "colour is 'green': expected one of red, blue"),
    ({"sheen": 6}, "sheen is 6: expected at most"),
    ({"sheen": "2"}, "sheen is '2': expected a number"), ({"sheen": True}, "sheen is True: expected a number"),
    ({"shiny": 1}, "shiny is 1: expected True or False"), ({"box": None}, "box is None: expected text"),
    ({"parts": ["\ud800"]}, r"parts is '\\ud800': not valid Unicode"), ({"color": "red"}, "did you mean colour"),
])  # fmt: skip
def test_its_value_is_checked(given: dict[str, Any], message: str) -> None:
    """By the type of the field, its choices, and its own check."""
    with pytest.raises(SettingsError, match=message):
        settings_from(given, More()).resolved({})


# ---- what a value does -----------------------------------------------------------------------------

OTHER = {
    "prompt": "x", "negative": "y", "width": 32, "height": 32, "seed": 1, "count": 2, "steps": 3, "cfg": 2.0,
    "cfg_interval": "0.2:0.9", "sampler": "heun", "schedule": "karras", "cfg_schedule": "linear", "cfg_rescale": 0.7,
    "cfg_zero": True, "apg": "0:15:-0.5", "also": ("a pig:0.5",), "slg": 2.5, "slg_layers": "7",
    "slg_interval": "0:0.3", "pag": 3.0, "pag_layers": "13", "cache": 0.05,
    "focus": "a; b", "focus_scale": 2.0, "focus_loss": "jedi", "focus_until": 0.5, "focus_gain": "unit",
    "attention_maps": "a; b", "verbose": True, "parallel": "tokens",
    "shard": "2/8", "claim": 120, "ray": "auto", "ray_actors": "1:8", "ray_cores": 2,
    "like": "comfyui", "rng": "cuda", "shift": "1.5", "sigmas": "1.0,0.5",
    "prompt_clip_l": "k", "prompt_clip_g": "j", "prompt_t5": "i", "negative_clip_l": "h", "negative_clip_g": "f",
    "negative_t5": "e", "emphasis": True, "long_prompts": True, "embedding": ("q.safetensors",), "clip_chunks": 2,
    "t5_tokens": 300,
    "control": ("net",), "control_image": ("edges.png",), "control_scale": (0.5,), "control_interval": ("0:0.8",),
    "control_mask": "mask.png", "control_type": ("canny",), "control_map": "stability", "control_pictures": "x",
    "init": "i", "strength": 0.5, "fit": "pad", "mask": "j", "mask_blur": 4.0, "mask_crop": 8, "mask_edges": "latent",
    "outpaint": "0,0,64,0", "upscale": 2.0, "upscale_strength": 0.3, "variation_seed": 5, "variation_strength": 0.1,
    "images": "h", "size": "30x31",
    "t5": "off", "t5_length": 77, "model": "m", "clip_l": "l", "clip_g": "g", "t5xxl": "t",
    "vae": "v", "tokenizers": "k", "lora": ("a:0.5",), "variant": "a.py", "weights": "w", "device": "cpu",
    "dtype": "fp32", "quantise": "int8", "attention": "math", "compile": True, "memory": "1GB", "out": "o",
    "prompts": "p", "dump": "d", "taesd": "e", "taesd_decode": True, "preview": 2, "from_png": "f",
}  # fmt: skip
UNSEEN = {
    "count", "device", "memory", "out", "prompts", "dump", "taesd", "preview", "verbose", "from_png", "attention_maps",
    "parallel", "shard", "claim", "ray", "ray_actors", "ray_cores",
}  # fmt: skip
QUOTED = {name: f'{name}: "{text}"' for name, text in {
    "lora": "a:0.5", "cfg_interval": "0.2:0.9", "apg": "0:15:-0.5", "also": "a pig:0.5", "slg_interval": "0:0.3",
    "outpaint": "0,0,64,0", "sigmas": "1.0,0.5", "control_interval": "0:0.8",
}.items()} | {
    "control": "control: net", "control_image": "control_image: edges.png", "control_scale": "control_scale: 0.5",
    "control_type": "control_type: canny",
}  # fmt: skip
# By what they hold.
IN_WEIGHTS = {"model", "clip_l", "clip_g", "t5xxl", "vae", "tokenizers", "variant", "init", "mask", "control_mask"}


@pytest.mark.parametrize("name", OTHER)
def test_what_tells_pictures_apart(name: str) -> None:
    """A picture is taken for another only where nothing differs but what does not change it."""
    assert OTHER.keys() == {f.name for f in fields(Settings)}
    settings = Settings("a horse", **SD35_MEDIUM_DEFAULTS, weights="known")
    same = identity(replace(settings, **{name: OTHER[name]})) == identity(settings)
    assert same == (name in UNSEEN | IN_WEIGHTS)
    unknown = replace(settings, weights=None)
    assert name in UNSEEN or identity(replace(unknown, **{name: OTHER[name]})) != identity(unknown)


@pytest.mark.parametrize("name", sorted(OTHER.keys() - {"count", *OF_THE_COMMAND}))
def test_parameters_has_every_setting(name: str) -> None:
    own = {"steps": "Steps", "cfg": "CFG scale", "seed": "Seed", "model": "Model", "negative": "Negative prompt"}
    own |= {"sampler": "Sampler", "schedule": "Schedule type"}
    value = {"sampler": "Heun", "schedule": "Karras"}.get(
        name, OTHER[name][0] if isinstance(OTHER[name], tuple) else OTHER[name]
    )
    expected = {"prompt": "x\n", "width": "Size: 32x1024", "height": "Size: 1024x32", **QUOTED}.get(
        name, f"{own.get(name, name)}: {value}"
    )  # fmt: skip
    assert expected in parameters(replace(Settings("a horse", **SD35_MEDIUM_DEFAULTS), **{name: OTHER[name]}))


def test_marks() -> None:
    assert {*LOADED} == {
        "model", "clip_l", "clip_g", "t5xxl", "vae", "tokenizers", "lora", "t5", "dtype", "quantise", "device",
        "compile", "variant", "embedding", "control", "taesd", "taesd_decode",
    }  # fmt: skip
    assert marked(Settings, Mark.OF_THE_RUN) == (
        "memory",
        "parallel",
        "shard",
        "claim",
        "ray",
        "ray_actors",
        "ray_cores",
        "preview",
        "verbose",
        "from_png",
        "prompts",
        "dump",
    )
    own = {f"{role}{encoder}" for role in ("prompt", "negative") for encoder in ("", "_clip_l", "_clip_g", "_t5")}
    own |= {"control_image", "control_mask", "control_pictures", "variation_seed", "variation_strength"}
    own |= {"focus", "attention_maps"}
    assert {*marked(Settings, Mark.OWN)} == {*own, "emphasis", "long_prompts", "seed", "count", "out"}
    assert marked(PictureOptions, Mark.LOADED) == ()


STRANGE: list[Any] = [10**400, -(10**400), 10**5000, float("nan"), float("inf"), object(), [], {}, b"x", True, "", "\0"]


def refusal(name: str, value: Any) -> str | None:
    try:
        replace(Settings("a horse", **SD35_MEDIUM_DEFAULTS), **{name: value}).check()
    except SettingsError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", sorted(OTHER))
def test_no_value_is_a_traceback(name: str) -> None:
    """From Python or a list anything may come; it is used, or refused on one line."""
    for value in STRANGE:
        told = refusal(name, value)
        if told is None:
            numbers = ("seed", "width", "height", "cfg", "clip_chunks", "t5_tokens")
            nothing = isinstance(OTHER[name], tuple) and value in ([], {})
            chosen = value is True and isinstance(OTHER[name], bool)
            assert isinstance(value, str) or chosen or nothing or name in numbers, value
        else:
            assert told.isprintable() and told.startswith((f"{name} is ", "seed is ")) and len(told) < 400
    assert refusal("cfg", 10**300) is None
