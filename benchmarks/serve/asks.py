"""What clients ask for, drawn at random by a seed: requests of every kind, whole and broken."""

import base64
import io
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

DRAW, EDIT, WEB, WEB_EDIT = (
    "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
)  # fmt: skip
SOLVERS = {"euler": "Euler", "dpmpp_2m": "DPM++ 2M", "heun": "Heun", "euler_ancestral": "Euler a"}  # ours, the web UI's
MEGABYTES = 1  # what a request may have
_PROMPTS = [f"a {colour}{noun}" for noun in ("horse", "bear", "fox", "cow", "pig") for colour in ("", "blue ", "red ")]
_LARGE = json.dumps({"prompt": "a" * (MEGABYTES * 10**6)}).encode()
_WEIGHTS = {
    "picture": 30, "several": 8, "stream": 8, "edit": 7, "web ui": 12, "web ui, edit": 5, "state": 4,
    "leaves": 8, "leaves a stream": 4, "garbage": 11, "wrong key": 3,
}  # fmt: skip
KINDS = (*_WEIGHTS,)


@dataclass(frozen=True)
class Ask:
    """One request."""

    kind: str
    path: str
    said: Mapping[str, Any] | None = None  # JSON
    form: tuple[tuple[str, str | bytes], ...] = ()  # bytes are files
    raw: bytes | None = None  # a body that is none
    method: str = "POST"
    key: str = ""
    expected: int = 200
    leaves: float | None = None  # seconds after which the client leaves, or before the first event of a stream ends
    pictures: list[dict[str, Any]] = field(default_factory=list)  # what a call of a Pipeline draws for each

    @property
    def streams(self) -> bool:
        return bool(self.said and self.said.get("stream"))


def scene(width: int, height: int, of: random.Random) -> Image.Image:
    """A picture without meaning."""
    rows, columns = np.mgrid[:height, :width]
    a, b, c = (of.randrange(1, 5) for _ in range(3))
    return Image.fromarray(np.stack([rows * a, columns * b, (rows + columns) * c], axis=-1).astype(np.uint8))


def file_of(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def asks(seed: int, count: int, keys: tuple[str, ...]) -> list[Ask]:
    """So many requests, each with one of these keys."""
    of = random.Random(seed)
    kinds = of.choices(KINDS, [*_WEIGHTS.values()], k=count)
    kinds[: len(KINDS)] = KINDS[:count]  # at least one of each
    of.shuffle(kinds)
    return [_ask(kind, of, of.choice(keys)) for kind in kinds]


def _settings(of: random.Random) -> dict[str, Any]:
    """Of a picture: half of them of one kind, so that there is something to be drawn together."""
    found: dict[str, Any] = {"prompt": of.choice(_PROMPTS), "seed": of.randrange(10**6), "width": 64, "height": 64}
    found |= {"steps": 3, "cfg": 3.0, "sampler": "euler"}
    if of.random() < 0.3:
        found["negative"] = of.choice(_PROMPTS)
    if of.random() < 0.5:
        found["width"], found["height"] = of.choice([(64, 64), (64, 48), (96, 64), (128, 128)])
        found |= {"steps": of.randrange(1, 5), "cfg": of.choice([1.0, 2.0, 3.0]), "sampler": of.choice([*SOLVERS])}
    return found


def _several(settings: dict[str, Any], count: int) -> list[dict[str, Any]]:
    return [{**settings, "seed": settings["seed"] + i} for i in range(count)]


def _ask(kind: str, of: random.Random, key: str) -> Ask:
    s = _settings(of)
    said, size = {**s}, (s["width"], s["height"])
    match kind:
        case "picture":
            return Ask(kind, DRAW, said, key=key, pictures=[s])
        case "several" | "stream":
            n = of.randrange(2, 5) if kind == "several" else of.randrange(1, 3)
            more = {} if kind == "several" else {"stream": True, "partial_images": of.randrange(4)}
            return Ask(kind, DRAW, {**said, "n": n, **more}, key=key, pictures=_several(s, n))
        case "leaves" | "leaves a stream":
            more = {} if kind == "leaves" else {"stream": True, "partial_images": 3}
            said = {**said, "steps": 12, "n": of.randrange(1, 3), **more}
            return Ask(kind, DRAW, said, key=key, leaves=of.uniform(0, 0.6))
        case "edit" | "web ui, edit":
            return _edit(kind, s, scene(*size, of), of, key)
        case "web ui":
            n = of.choice([1, 1, 2])
            return Ask(kind, WEB, {**_theirs(s), "batch_size": n}, key=key, pictures=_several(s, n))
        case "state":
            path = of.choice(["/health", "/ready", "/metrics", "/v1/models", "/sdapi/v1/options", "/sdapi/v1/progress"])
            return Ask(kind, path, method="GET", key=key)
        case "wrong key":
            return Ask(kind, DRAW, said, key=key + "x", expected=401)
    return _garbage(of, key)


def _theirs(s: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the web UI's clients name them, with what extensions send."""
    own = {name: s[name] for name in ("prompt", "seed", "steps", "width", "height")}
    own |= {"negative_prompt": s.get("negative", ""), "cfg_scale": s["cfg"], "sampler_name": SOLVERS[s["sampler"]]}
    return {**own, "scheduler": "Normal", "alwayson_scripts": {"x": {"args": []}}, "restore_faces": False}


def _edit(kind: str, s: dict[str, Any], init: Image.Image, of: random.Random, key: str) -> Ask:
    """With a mask or without: the left half, which is white for the engine and the web UI, transparent for OpenAI."""
    s |= {"sampler": "euler"}
    strength, half = of.choice([0.5, 0.8]), (0, 0, init.width // 2, init.height)
    white, clear = Image.new("L", init.size, 0), Image.new("RGBA", init.size, (9, 9, 9, 255))
    white.paste(255, half)
    clear.paste((0, 0, 0, 0), half)
    masked = of.random() < 0.6
    own = {**s, "init": init, "strength": strength, **({"mask": white} if masked else {})}
    if kind == "edit":
        form: list[tuple[str, str | bytes]] = [(name, str(value)) for name, value in s.items()]
        form += [("strength", str(strength)), ("image", file_of(init)), *([("mask", file_of(clear))] * masked)]
        return Ask(kind, EDIT, form=tuple(form), key=key, pictures=[own])
    said = {**_theirs(s), "init_images": [text_of(init)], "denoising_strength": strength}
    if masked:
        said |= {"mask": text_of(white), "mask_blur": 0, "inpaint_full_res": False}
    return Ask(kind, WEB_EDIT, said, key=key, pictures=[own])


def text_of(image: Image.Image) -> str:
    return base64.b64encode(file_of(image)).decode()


def _garbage(of: random.Random, key: str) -> Ask:
    """What no server should draw, and what is answered for it."""
    prompt = {"prompt": "a horse"}
    broken = [b"{", b"", b"\xff\xfe\x00", b"[1, 2]", b"[" * 50_000, b'{"prompt": "a", "steps": NaN}', b'"a horse"']
    wrong: list[dict[str, Any]] = [
        {"prompt": 3}, {"prompt": None}, {**prompt, "steps": "many"}, {**prompt, "stepz": 3}, {**prompt, "n": 0},
        {**prompt, "size": "63x48"}, {**prompt, "size": [64, 64]}, {**prompt, "width": 10**9}, {**prompt, "n": 10**9},
        {**prompt, "seed": 1.5}, {**prompt, "cfg": {}}, {**prompt, "init": "no base64!"}, {**prompt, "steps": -1},
        {**prompt, "init": base64.b64encode(b"\x89PNG no picture").decode()}, {**prompt, "model_path": "/etc/passwd"},
        {**prompt, "stream": "perhaps"}, {**prompt, "sampler": "x" * 1000}, {"prompt": "a" * 40_000},
    ]  # fmt: skip
    every = [Ask("garbage", DRAW, raw=body, key=key, expected=400) for body in broken]
    every += [Ask("garbage", DRAW, said, key=key, expected=400) for said in wrong]
    every += [Ask("garbage", WEB, {**prompt, **more}, key=key, expected=400)
              for more in ({"steps": 0}, {"width": "wide"}, {"batch_size": 10**6})]  # fmt: skip
    every += [
        Ask("garbage", WEB_EDIT, prompt, key=key, expected=400),
        Ask("garbage", EDIT, form=(("prompt", "a"), ("image", b"no picture")), key=key, expected=400),
        Ask("garbage", EDIT, raw=b"--x\r\nno form", key=key, expected=400),
        Ask("garbage", DRAW, raw=_LARGE, key=key, expected=413),
        Ask("garbage", DRAW, method="GET", key=key, expected=405),
        Ask("garbage", "/v1/nothing", prompt, key=key, expected=404),
    ]
    return of.choice(every)
