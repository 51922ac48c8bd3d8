"""The page's files and routes, and what the server tells for its sake; none of it needs a browser."""

import base64
import io
import json
import re
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from served import SMALL, Served, httpx2, openai, opened, pipeline, serving, wait

from mmdit.driver import watch
from mmdit.driver.focusing import Sheet
from mmdit.driver.settings import Settings
from mmdit.serve import replies
from mmdit.serve.browser import FILES, PAGE, POLICY
from mmdit.serve.words import Words
from samplers.focus import Attended

ROOT = Path(__file__).parents[1]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGE.iterdir())}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
SAID = {"prompt": "a horse and a bear", "seed": 3, **SMALL}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


# ---- its files -----------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of an HTML file, each with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_files_are_few_and_small_and_all_installed() -> None:
    assert {name for name, _ in FILES.values()} == {*TEXTS}
    assert sum(len(text.encode()) for text in TEXTS.values()) < 100_000
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    globs = project["tool"]["setuptools"]["package-data"]["mmdit.serve"]
    assert {path.name for glob in globs for path in PAGE.parent.glob(glob)} == {*TEXTS}


def test_no_file_names_another_origin() -> None:
    for name, text in TEXTS.items():
        assert set(re.findall(r"\w+://[^\s\"'`)]*", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.findall(r"[\"'(=]//\w", text), name


def test_what_is_named_is_there() -> None:
    """Labels, descriptions, icons, files; and every element that a script looks for."""
    elements = Page(TEXTS["index.html"]).elements
    ids = [given["id"] for _, given in elements if "id" in given]
    assert len(ids) == len(set(ids)) > 50
    for tag, given in elements:
        for name in ("for", "aria-labelledby", "aria-describedby", "form"):
            assert given.get(name, ids[0]) in ids, (tag, given)
        address = given.get("href") or given.get("src") or ""
        assert (address[1:] in ids) if address.startswith("#") else (not address or f"/{address}" in FILES), address
        assert "style" not in given and not any(name.startswith("on") for name in given), (tag, given)
    labelled = {given["for"] for tag, given in elements if tag == "label" and "for" in given}
    for tag, given in elements:
        if tag in ("textarea", "select") or (tag == "input" and given.get("type") != "checkbox"):
            assert given["id"] in labelled or "aria-label" in given if "id" in given else "hidden" in given, given
    for name, text in SCRIPTS.items():
        asked = {*re.findall(r'\$\("([\w-]+)"\)', text), *(f"i-{n}" for n in re.findall(r'icon\("(\w+)"\)', text))}
        assert asked - {"brush"} <= {*ids}, name  # which a script makes
    assert {*re.findall(r"(?<=[\s{(,])--[\w-]+(?=:)", TEXTS["style.css"])} >= {
        name for name in re.findall(r"var\((--[\w-]+)", TEXTS["style.css"])
        if name not in ("--ratio", "--most", "--columns", "--rows", "--below", "--at")
    }  # fmt: skip


def test_modules_import_what_others_export() -> None:
    for name, text in SCRIPTS.items():
        found = re.findall(r'^import (.+?) from "\./(\w+\.js)";$', text, re.MULTILINE)
        assert len(found) == len(re.findall(r"\bimport\b", text)), name
        for what, file in found:
            exported = set(re.findall(r"^export (?:async )?(?:function\*?|class|const) (\w+)", SCRIPTS[file], re.M))
            star = re.fullmatch(r"\* as (\w+)", what)
            names = re.findall(rf"(?<![/\w]){star[1]}\.(\w+)", text) if star else re.findall(r"\w+", what)
            assert names and {*names} <= exported, (name, file)


def test_it_asks_for_routes_that_are_there(served: Served) -> None:
    asked = set(re.findall(r'"((?:v1|sdapi)/[\w/-]+)"', TEXTS["api.js"]))
    assert len(asked) == 6
    for path in asked:
        assert served.get(f"/{path}").status_code in (200, 405), path


# ---- its routes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES)
def test_files_are_served(served: Served, path: str) -> None:
    """As what they are, with a policy, and not again where the browser has them."""
    name, kind = FILES[path]
    answer = served.get(path)
    assert (answer.status_code, answer.text, answer.headers["content-type"]) == (200, TEXTS[name], kind)
    assert answer.headers["content-security-policy"] == POLICY and answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
    tag = answer.headers["etag"]
    again = served.get(path, headers={"if-none-match": f'"other", {tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert served.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    assert served.post(path).status_code == 405


def test_the_policy_lets_nothing_in_from_outside() -> None:
    rules = dict(rule.strip().partition(" ")[::2] for rule in POLICY.split(";"))
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    for name in ("script-src", "style-src", "connect-src"):
        assert rules[name] == "'self'"
    assert rules["img-src"] == "'self' blob: data:"


def test_it_needs_no_key_but_what_it_asks_does(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-0123456789abcdef\n")
    with serving(api_key_file=str(tmp_path / "keys")) as served:
        assert all(served.get(path).status_code == 200 for path in FILES)
        assert served.get("/v1/models").status_code == 401 and served.get("/page/none.js").status_code == 401
        evil = {"host": "evil.example"}
        assert served.get("/", headers=evil).status_code == 403


# ---- what it is told -----------------------------------------------------------------------------


def test_models_tell_defaults_and_limits(served: Served) -> None:
    found = served.get("/v1/models").json()["data"][0]
    pipe = pipeline()
    assert found["defaults"] == pipe.defaults and {"width", "height", "steps", "cfg"} <= {*found["defaults"]}
    largest = (pipe.transformer.config.largest or 0) * 16
    assert found["limits"] == {"side": largest, "steps": 150, "pictures": 10, "multiple": 16} and largest < 2048
    model = served.client().models.retrieve("demo")
    assert model.limits["multiple"] == 16  # type: ignore[attr-defined]
    for side, status in ((largest, 200), (largest + 16, 400)):
        asked = {**SAID, "width": side, "height": 16, "steps": 1}
        assert served.post("/v1/images/generations", asked).status_code == status


def test_models_tell_only_limits_until_there_is_one(served: Served) -> None:
    studio = served.studio
    held, studio._pipeline = studio._pipeline, None
    try:
        found = served.get("/v1/models").json()["data"][0]
    finally:
        studio._pipeline = held
    assert found["limits"] == {"side": 2048, "steps": 150, "pictures": 10} and "defaults" not in found


def lines_of(served: Served, **more: Any) -> list[str]:
    with httpx2.stream("POST", f"{served.url}/v1/images/generations", json={**SAID, **more}, timeout=60) as answer:
        return [line for line in answer.iter_lines() if line]


def test_streams_tell_steps_as_comments(served: Served) -> None:
    """Which clients pass over; more partial pictures than the client's own field allows."""
    told = [line for line in lines_of(served, stream=True, partial_images=9) if not line.startswith("data: {")]
    assert told == [f": picture 0: step {step} of 4" for step in (1, 2, 3, 4)]
    told = [line for line in lines_of(served, stream=True, n=2) if line.startswith(":")]
    assert sorted(told) == [f": picture {i}: step {step} of 4" for i in (0, 1) for step in (1, 2, 3, 4)]
    found = lines_of(served, stream=True, partial_images=9)
    assert sum('"image_generation.partial_image"' in line for line in found) == 3
    assert served.post("/v1/images/generations", {**SAID, "stream": True, "partial_images": 17}).status_code == 400


def test_whoever_reads_slowly_is_sent_fewer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three partial pictures of a picture wait to be sent at most, and hold memory."""
    drawn = Event()

    def slow(*given: Any) -> str:
        assert drawn.wait(30)
        return replies.base64_of(*given)

    monkeypatch.setattr("mmdit.serve.openai.base64_of", slow)
    before = served.metric("mmdit_pictures_total")
    with ThreadPoolExecutor(1) as pool:
        lines = pool.submit(lines_of, served, stream=True, partial_images=16, steps=8)
        wait(lambda: served.metric("mmdit_pictures_total") > before)
        drawn.set()
        found = [json.loads(line.removeprefix("data: ")) for line in lines.result() if line.startswith("data: ")]
    assert [event.get("partial_image_index") for event in found] == [0, 1, 2, None]


def test_maps_are_the_mean_of_the_steps_that_made_the_picture() -> None:
    """Of a picture that begins anew after an error: not of those before; nothing is kept of one that was let go."""
    words, s = Words(), Settings()
    maps = torch.rand(6, 5, 2, 3, 4, generator=torch.Generator().manual_seed(0))  # steps, blocks, tokens, places
    step: Any = [SimpleNamespace(index=i) for i in (0, 1, 2, 0, 1, 2)]
    for index in (0, 1):
        words.encoded(watch.Encoded(settings=s, index=index, texts={}, noise=maps[0], sigmas=maps[0]))
        for each, now in zip(maps, step):
            sheet = Sheet(Attended(each), {"a bear": (0, 1), "bear": (1,)})
            event = watch.Stepped(settings=s, index=index, step=now, attention=sheet)
            event.stopped = index == 1 and now is step[-1]
            words.step(event)
    words.picture(watch.Drawn(settings=s, index=0, image=Image.new("L", (4, 3))))
    found = words.of(0)
    assert torch.allclose(found["a bear"], maps[3:].mean((0, 1, 2))) and not words._seen and not words.of(0)
    assert torch.allclose(found["bear"], maps[3:, :, 1].mean((0, 1)))


def grey(text: str) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    assert (image.format, image.mode) == ("PNG", "L")
    return np.asarray(image)


def expected(words: str, **more: Any) -> dict[str, np.ndarray]:
    """What the pipeline finds, from 0 to 255."""
    (found,) = pipeline().attention_maps(SAID["prompt"], words, **{**SMALL, "seed": 3, **more})
    means = {name: maps.double().mean((0, 1)).numpy() for name, maps in found.maps.items()}
    return {name: np.round(mean / mean.max() * 255) for name, mean in means.items()}


def test_maps_of_attention_come_with_the_picture(served: Served) -> None:
    """By word, a pixel for each place; the picture is the one without; a field of the client's beside its own."""
    extra = {key: value for key, value in SAID.items() if key != "prompt"}
    asked = {**extra, "attention_maps": "horse; a bear"}
    plain = served.client().images.generate(prompt=SAID["prompt"], extra_body=extra).data or []
    found = served.client().images.generate(prompt=SAID["prompt"], extra_body=asked).data or []
    assert np.array_equal(np.asarray(opened(found[0].b64_json or "")), np.asarray(opened(plain[0].b64_json or "")))
    assert not hasattr(plain[0], "attention_maps")
    maps = found[0].attention_maps  # type: ignore[attr-defined]
    assert [*maps] == ["horse", "a bear"]
    for name, levels in expected("horse; a bear").items():
        assert levels.shape == (3, 4) and levels.min() < 200
        assert np.abs(grey(maps[name]).astype(float) - levels).max() <= 1
    assert opened(found[0].b64_json or "").info["mmdit"].count('"attention_maps": "horse; a bear"') == 1


def test_maps_in_streams_and_of_several(served: Served) -> None:
    """Each picture has its own; of a picture in two passes the second's."""
    with served.client().images.generate(
        prompt=SAID["prompt"], size="64x48", n=2, stream=True,
        extra_body={"seed": 3, "steps": 4, "attention_maps": "bear"},
    ) as stream:  # fmt: skip
        done: list[Any] = [event for event in stream if event.type.endswith("completed")]
    for event in done:
        levels = expected("bear", seed=3 + event.index)["bear"]
        assert np.abs(grey(event.attention_maps["bear"]).astype(float) - levels).max() <= 1
    asked = {**SAID, "attention_maps": "bear", "upscale": 1.5}
    found = served.post("/v1/images/generations", asked).json()["data"][0]["attention_maps"]
    levels = expected("bear", upscale=1.5)["bear"]
    assert levels.shape == (5, 6) and np.abs(grey(found["bear"]).astype(float) - levels).max() <= 1


def test_maps_that_cannot_be(served: Served) -> None:
    for words, said in (
        ("fox", "fox"),
        ("; ".join(f"horse#{i}" for i in range(1, 10)), "has 9 subjects"),
        (3, "attention_maps is 3"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            served.client().images.generate(prompt=SAID["prompt"], extra_body={**SMALL, "attention_maps": words})
        assert said in caught.value.message and caught.value.param == "attention_maps"
