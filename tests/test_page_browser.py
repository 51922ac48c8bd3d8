"""The page, used in a real Chromium as people use it: by mouse, by keys, on a phone, with a screen reader's tree."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import Browser, Visit, browsing, visiting
from served import SMALL, Served, file_of, gated, pipeline, scene, serving, wait

from mmdit.driver.output import png_info
from mmdit.driver.settings import Settings

PROMPT = "a horse and a bear"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


@pytest.fixture
def visit(browser: Browser, served: Served) -> Iterator[Visit]:
    with visiting(browser, served.url) as found:
        found.ready()
        yield found


def pixels(prompt: str = PROMPT, **more: Any) -> np.ndarray:
    """What the pipeline draws by itself."""
    return np.asarray(pipeline()(prompt, **{**SMALL, **more})[0])


# ---- drawing -------------------------------------------------------------------------------------


def test_a_picture_is_drawn_and_seen_on_its_way(visit: Visit, served: Served) -> None:
    """By Ctrl+Enter; its steps and a live preview; the file that is saved is the pipeline's own."""
    page = visit.page
    visit.small(PROMPT, seed=3, negative_prompt="a fox", guidance=2.5)
    with gated(served.studio) as gate:
        page.keyboard.press("Control+Enter")
        gate.let(3)
        page.locator('img[data-glances="3"]:visible').wait_for()  # of every step
        page.get_by_text("Step 3 of 4").wait_for()
        size = page.locator("img[data-glances]").evaluate("image => [image.naturalWidth, image.naturalHeight]")
        assert size == [64, 48]
        assert page.get_by_role("progressbar", name="Drawing").get_attribute("value") == "0.75"
        assert re.fullmatch(r"75 percent.*\.", page.locator("#status").inner_text())
        assert page.title() == "75 % · mmdit"
        assert page.get_by_role("button", name="Cancel").is_visible()
    page.get_by_role("img", name=f"{PROMPT}, seed 3").wait_for()
    assert page.locator("#status").text_content() == "Done. 1 picture." and page.title() == "mmdit"
    assert np.array_equal(visit.pixels(), pixels(seed=3, negative="a fox", cfg=2.5))
    told = page.locator("#about").inner_text()
    assert all(text in told for text in (PROMPT, "a fox", "64 × 48", "2.5", "demo"))


def test_whoever_cancels_frees_the_place(visit: Visit, served: Served) -> None:
    """By Escape and by the button: no further step is taken."""
    for cancel in (lambda: visit.page.keyboard.press("Escape"), visit.page.get_by_role("button", name="Cancel").click):
        with gated(served.studio) as gate:
            visit.small(PROMPT, seed=5, steps=20)
            visit.page.get_by_role("button", name="Draw", exact=True).click()
            assert gate.reached.wait(30)
            gate.let(1)
            visit.page.get_by_text("Step 1 of 20").wait_for()
            cancel()
            visit.page.get_by_role("button", name="Draw", exact=True).wait_for()
            wait(lambda: all(place.dropped for place in served.studio._drawing))
            gate.open()
            wait(lambda: not served.studio.busy)
            assert gate.steps in ([5, 5], [5])
        assert visit.page.locator("#status").text_content() == "Cancelled."
        visit.page.get_by_text("An empty wall.").wait_for()


def test_seeds_are_random_or_used_again(visit: Visit) -> None:
    page = visit.page
    dice, reuse = page.get_by_role("button", name="Random seed"), page.get_by_role("button", name="Reuse the seed")
    visit.small(PROMPT, steps=1)
    assert dice.get_attribute("aria-pressed") == "true" and reuse.is_disabled()
    visit.draw()
    first = visit.pixels()
    visit.draw()
    assert visit.value("Seed") == "" and not np.array_equal(visit.pixels(), first)
    page.get_by_role("button", name=re.compile("^Show: .*")).last.click()
    reuse.click()
    seed = int(visit.value("Seed"))
    assert dice.get_attribute("aria-pressed") == "false"
    assert np.array_equal(first, pixels(seed=seed, steps=1))
    visit.draw()
    assert np.array_equal(visit.pixels(), first)
    dice.click()
    assert visit.value("Seed") == "" and dice.get_attribute("aria-pressed") == "true"


def test_shapes_and_limits_are_the_models(visit: Visit) -> None:
    page = visit.page
    assert (visit.value("Width"), visit.value("Steps"), visit.value("Guidance")) == ("128", "28", "3")
    page.get_by_role("radio", name="Wide").check()
    wide = int(visit.value("Width")), int(visit.value("Height"))
    assert wide == (176, 96)
    page.get_by_role("button", name="Swap").click()
    assert page.get_by_role("radio", name="Tall").is_checked()
    page.get_by_label("Steps, as a slider").fill("9")
    assert visit.value("Steps") == "9"
    visit.fill(PROMPT, width=100)
    page.get_by_role("button", name="Draw", exact=True).click()  # the browser says what is wrong
    assert page.evaluate("document.activeElement.id") == "width" and page.locator(".thumb").count() == 0


# ---- pictures ------------------------------------------------------------------------------------


def test_a_mask_is_painted_and_only_there_it_is_drawn(visit: Visit) -> None:
    page, init = visit.page, scene()
    visit.small(PROMPT, seed=7)
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": file_of(init)})
    assert visit.value("Strength") == "0.6"
    page.get_by_role("button", name="Paint a mask").click()
    box = page.locator(".painting canvas").bounding_box()
    assert box
    unit = box["width"] / 64

    def share() -> float:
        """Of the mask that is painted."""
        return page.locator(".painting canvas").evaluate(
            "c => c.getContext('2d').getImageData(0, 0, 64, 48).data.filter((_, i) => i % 4 === 3 && _ > 127).length"
        ) / (64 * 48)

    def stroke(x: float, y: float, to: float) -> None:
        page.mouse.move(box["x"] + x * unit, box["y"] + y * unit)
        page.mouse.down()
        page.mouse.move(box["x"] + to * unit, box["y"] + y * unit, steps=4)
        page.mouse.up()

    stroke(40, 24, 60)
    first = share()
    stroke(10, 10, 20)
    assert share() > first > 0.02
    page.get_by_role("button", name="Undo").click()
    assert share() == first
    page.get_by_role("button", name="Invert").click()
    assert share() == pytest.approx(1 - first, abs=0.02)
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Erase").click()
    stroke(40, 24, 60)
    assert share() < first / 4
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Use the mask").click()
    assert visit.value("Strength") == "1" and page.get_by_role("button", name="Change the mask").is_visible()
    visit.draw()
    drawn, before = visit.pixels().astype(int), np.asarray(init).astype(int)
    assert np.array_equal(drawn[:, :30], before[:, :30]) and np.array_equal(drawn[:8], before[:8])
    assert np.abs(drawn[22:26, 45:58] - before[22:26, 45:58]).max() > 8
    assert "a picture and a mask" in page.locator("#about").inner_text()


def test_a_mask_is_painted_by_keys(visit: Visit) -> None:
    page = visit.page
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": file_of(scene())})
    page.get_by_role("button", name="Paint a mask").click()
    canvas = page.locator(".painting canvas")
    assert canvas.evaluate("c => c === document.activeElement")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    painted = "c => [...c.getContext('2d').getImageData(0, 0, 64, 48).data].some((v, i) => i % 4 === 3 && v)"
    assert canvas.evaluate(painted)
    page.keyboard.press("Control+z")
    assert not canvas.evaluate(painted)
    page.get_by_role("button", name="Discard").click()
    assert page.get_by_role("button", name="Paint a mask").is_visible()


def test_pictures_that_are_dropped(visit: Visit) -> None:
    """At one place a picture begins the next one; at the other its settings are restored, the sampler too."""
    page = visit.page
    init = scene()
    visit.let_fall(file_of(init), "a.png", "#drop-begin")
    page.get_by_role("button", name="Remove").wait_for()
    visit.fill(PROMPT, seed=2, steps=4, strength=0.5)
    visit.draw()
    own: dict[str, Any] = {"prompt": PROMPT, "init": init, "strength": 0.5, "seed": 2, "steps": 4}
    assert np.array_equal(visit.pixels(), np.asarray(pipeline()(**own)[0]))
    visit.fill(PROMPT, strength=5)  # which nobody minds once it is hidden
    page.get_by_role("button", name="Remove").click()
    own = {"prompt": "a bear and a fox", "negative": "red", "seed": 77, "width": 64, "height": 48, "steps": 3}
    own |= {"cfg": 4.33, "sampler": "dpmpp_2m", "schedule": "karras"}
    image, settings = pipeline()(**own)[0], Settings(**own).resolved({})
    visit.let_fall(file_of(image, pnginfo=png_info(settings)), "b.png", "#drop-restore")
    page.get_by_text("Settings restored.").wait_for(state="attached")
    said = [visit.value(name) for name in ("Prompt", "Negative prompt", "Seed", "Width", "Steps", "Guidance", "Solver")]
    assert said == ["a bear and a fox", "red", "77", "64", "3", "4.33", "dpmpp_2m"]
    visit.draw()
    assert np.array_equal(visit.pixels(), np.asarray(image))


def test_the_history_survives(visit: Visit) -> None:
    """A reload; pictures come back with all their settings; they are deleted one by one, and all."""
    page = visit.page
    for seed in (1, 2):
        visit.small(PROMPT, seed=seed)
        visit.draw()
    page.reload()
    visit.ready()
    page.get_by_role("button", name=f"Show: {PROMPT}, seed 1").click()
    assert np.array_equal(visit.pixels(), pixels(seed=1))
    page.get_by_role("button", name="Reuse settings").click()
    assert (visit.value("Seed"), visit.value("Prompt"), visit.value("Width")) == ("1", PROMPT, "64")
    page.keyboard.press("Tab")
    page.get_by_role("button", name=f"Show: {PROMPT}, seed 2").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_role("img", name=f"{PROMPT}, seed 1").wait_for()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Keep").click()
    assert page.locator(".thumb").count() == 2
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.get_by_role("img", name=f"{PROMPT}, seed 2").wait_for()
    page.get_by_role("button", name="Clear", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    page.get_by_text("What you draw stays here").wait_for()
    page.reload()
    visit.ready()
    assert page.locator(".thumb").count() == 0


def test_words_lie_over_the_picture(visit: Visit) -> None:
    """A button for each; the picture is clear where it attends to the word, dark where it does not."""
    page = visit.page
    visit.small(PROMPT, seed=3, words_of_the_prompt="horse; a bear")
    visit.draw()
    (found,) = pipeline().attention_maps(PROMPT, "horse; a bear", seed=3, **SMALL)
    words = page.get_by_role("group", name="Attention to words").get_by_role("button")
    assert words.all_inner_texts() == ["horse", "a bear"]
    for word in ("horse", "a bear"):
        words.filter(has_text=word).click()
        page.locator(f'.overlay[data-word="{word}"]:visible').wait_for()
        seen = page.locator(".overlay").evaluate(
            "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3)"
        )
        map = found.maps[word].mean((0, 1)).flatten()
        assert len(seen) == 12 and seen[int(map.argmax())] == 0 and seen[int(map.argmin())] == max(seen) > 100
    words.filter(has_text="a bear").click()
    assert page.locator(".overlay").is_hidden()


def test_pictures_are_compared(visit: Visit) -> None:
    """Side by side with what differs, and by a wipe that keys move."""
    page = visit.page
    visit.small(PROMPT, seed=1)
    page.get_by_label("Pictures", exact=True).fill("2")
    visit.draw()
    captions = page.locator("#wall figcaption")
    assert [text.split() for text in captions.all_inner_texts()] == [["Seed", "1"], ["Seed", "2"]]
    visit.small(PROMPT, seed=1, steps=2)
    page.get_by_label("Pictures", exact=True).fill("1")
    visit.draw()
    compare = page.get_by_role("button", name=re.compile("^Compare( 2)?$"))
    assert compare.is_disabled()
    boxes = page.get_by_role("checkbox", name=re.compile("^Compare: .*seed 1$"))
    for i in (0, 1):
        boxes.nth(i).check()
    compare.click()
    assert [text.split() for text in captions.all_inner_texts()] == [["Steps", "4"], ["Steps", "2"]]
    page.get_by_role("button", name="Wipe").click()
    slide, over = page.get_by_role("slider", name="Wipe"), page.locator("img.over")
    before = over.evaluate("image => getComputedStyle(image).clipPath")
    slide.focus()
    page.keyboard.press("End")
    assert (before, slide.input_value()) == ("inset(0px 0px 0px 50%)", "100")
    assert over.evaluate("image => getComputedStyle(image).clipPath") == "inset(0px 0px 0px 100%)"
    page.get_by_role("button", name="Side by side").click()
    page.get_by_role("button", name=re.compile("^Open: ")).first.click()
    assert np.array_equal(visit.pixels(), pixels(seed=1))


# ---- what may go wrong ---------------------------------------------------------------------------


def test_mistakes_are_told_in_the_servers_words(browser: Browser, served: Served) -> None:
    with visiting(browser, served.url, refused=True) as visit:
        visit.ready()
        visit.small(PROMPT, words_of_the_prompt="fox")
        visit.page.get_by_role("button", name="Draw", exact=True).click()
        told = visit.page.get_by_role("alert").inner_text()
        answer = served.post("/v1/images/generations", {"prompt": PROMPT, "attention_maps": "fox", "seed": 1, **SMALL})
        assert told == answer.json()["error"]["message"] and "fox" in told
        visit.fill(PROMPT, words_of_the_prompt="")
        visit.let_fall(file_of(scene()), "a.png", "#drop-restore")
        visit.page.get_by_text("This picture does not say how it was drawn.").wait_for()
        visit.draw()
        assert visit.page.get_by_role("alert").is_hidden()


def test_it_waits_for_the_model_and_for_the_server(browser: Browser, served: Served) -> None:
    with visiting(browser, served.url, refused=True) as visit:
        visit.ready()
        answers = ["failed", "loading"]

        def answer(route: Any) -> None:
            if not answers:
                route.fallback()
            elif answers.pop(0) == "failed":
                route.abort()
            else:
                route.fulfill(json={"data": [{"id": "large", "limits": {}}]})

        visit.page.clock.install()
        visit.context.route("**/v1/models", answer)
        visit.page.reload()
        for text in ("The server does not answer", "large is being loaded…"):
            visit.page.locator("#model", has_text=text).wait_for()
            assert visit.page.locator("#draw").is_disabled()
            visit.page.clock.fast_forward(2000)
        visit.ready()
        assert visit.page.locator("#model").inner_text() == "demo"


def test_it_asks_for_the_key(browser: Browser, tmp_path: Path) -> None:
    """Again where it is a wrong one; it is kept for the session, and sent with everything."""
    (tmp_path / "keys").write_text("sk-0123456789abcdef\n")
    with serving(api_key_file=str(tmp_path / "keys")) as served, visiting(browser, served.url, refused=True) as visit:
        visit.give("wrong")
        visit.page.get_by_role("dialog", name="This server needs a key").wait_for()
        visit.page.keyboard.press("Escape")
        visit.page.get_by_role("alert").filter(has_text="key").wait_for()
        visit.page.get_by_role("button", name="Key", exact=True).click()
        visit.give("sk-0123456789abcdef")
        visit.ready()
        visit.small(PROMPT, seed=3)
        visit.draw()
        assert np.array_equal(visit.pixels(), pixels(seed=3))
        visit.page.reload()
        visit.ready()
        assert visit.page.evaluate("localStorage.length") == 0
        visit.page.get_by_role("button", name="Key", exact=True).click()  # another one
        visit.page.get_by_role("button", name="Not now").click()
        assert "key" in visit.page.get_by_role("alert").inner_text()


# ---- for everybody -------------------------------------------------------------------------------


def test_everything_has_a_name_and_is_reached_by_keys(visit: Visit) -> None:
    page = visit.page
    assert visit.nameless() == []
    visit.small(PROMPT, seed=3, words_of_the_prompt="horse")
    visit.draw()
    assert visit.nameless() == []
    page.get_by_role("link", name="Skip to the prompt").focus()
    reached: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate("(document.activeElement.id || document.activeElement.textContent.trim())")
        if page.evaluate("document.activeElement === document.body"):
            break
        reached.append(name)
        outlined = "getComputedStyle(document.activeElement).outlineStyle"
        hidden = "document.activeElement.matches('#shapes input')"  # their label has it
        assert page.evaluate(f"{hidden} || {outlined} !== 'none'"), name
    assert {*reached} >= {
        "prompt", "negative", "draw", "horse", "Reuse settings", "Save", "choose", "width", "swap", "seed", "dice",
        "reuse", "count", "steps", "steps-dial", "cfg", "words", "restore", "clear",
    }  # fmt: skip
    for landmark, name in (("form", "What to draw"), ("region", "Picture"), ("region", "Settings")):
        assert page.get_by_role(landmark, name=name).is_visible()  # type: ignore[arg-type]
    page.get_by_role("button", name="Paint a mask").click()
    assert visit.nameless() == []


@pytest.mark.filterwarnings("ignore:.*--long-prompts")  # is cut off
@pytest.mark.parametrize("width", [360, 1920])
def test_no_screen_is_too_narrow(browser: Browser, served: Served, width: int) -> None:
    """Nor is a prompt without blanks too long."""
    size = {"viewport": {"width": width, "height": 800}}
    phone = {"has_touch": True, "is_mobile": True} if width < 800 else {}
    with visiting(browser, served.url, color_scheme="dark", **size, **phone) as visit:
        visit.ready()
        assert not visit.sideways()
        visit.small(f"{PROMPT} {'w' * 300}", seed=1, words_of_the_prompt="horse; bear")
        visit.page.get_by_label("Pictures", exact=True).fill("3")
        visit.draw()
        assert not visit.sideways()
        visit.page.locator(".thumb").first.click()
        assert not visit.sideways()
        draw = visit.page.get_by_role("button", name="Draw", exact=True).bounding_box()
        assert draw and draw["height"] >= 40 and draw["y"] + draw["height"] <= 800
        colour = visit.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", colour)[:3])) < 150
