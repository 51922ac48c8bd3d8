"""Pictures of the page, drawn by the demo model in a real browser: `python -m benchmarks.screenshots FOLDER`.

Needs the extra `page` and a Chromium on the PATH. Writes page-light.webp, page-dark.webp and page-phone.webp.
"""

import argparse
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

PROMPTS = (
    ("a robot, a snail and a panda", 4, 11), ("a blue horse and a bear", 1, 2), ("a fox on a yellow background", 1, 5),
    ("a horse, a bear and a fox on a green background", 1, 3),
)  # fmt: skip
_MOST = 250_000  # bytes of a file


@contextmanager
def server() -> Iterator[str]:
    """The address of one of the demo model, in a process of its own."""
    command = [sys.executable, "-m", "mmdit.serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def draw(page: Any, prompt: str, count: int, seed: int, words: str = "") -> None:
    """By hand, as it were; until all pictures are there."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Pictures", exact=True).fill(str(count))
    page.get_by_label("Seed", exact=True).fill(str(seed))
    if words:
        page.locator("#looking summary").click()
        page.get_by_label("Words of the prompt").fill(words)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#draw:visible").wait_for(timeout=300_000)


def light(page: Any) -> None:
    """One picture, and a history."""
    for prompt, count, seed in PROMPTS:
        draw(page, prompt, count, seed)
    page.mouse.move(0, 0)


def dark(page: Any) -> None:
    """Where a picture attends to a word."""
    for prompt, count, seed in PROMPTS[1:3]:
        draw(page, prompt, count, seed)
    prompt, _, seed = PROMPTS[3]
    draw(page, prompt, 1, seed, "horse; bear; fox")
    page.get_by_role("button", name="bear", exact=True).click()
    page.locator('.overlay[data-word="bear"]').wait_for()
    page.mouse.move(0, 0)


def phone(page: Any) -> None:
    """One picture."""
    prompt, _, seed = PROMPTS[2]
    draw(page, prompt, 1, seed)
    page.evaluate("scrollTo(0, 0)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        parser.error("there is no chromium on the PATH")
    desktop: dict[str, Any] = {"viewport": {"width": 1440, "height": 900}, "device_scale_factor": 1.5}
    small: dict[str, Any] = {
        "viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True,
    }  # fmt: skip
    with server() as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for scene, more in ((light, desktop), (dark, {**desktop, "color_scheme": "dark"}), (phone, small)):
            page = browser.new_context(reduced_motion="reduce", **more).new_page()
            page.goto(address)
            page.locator("#draw:not(:disabled)").wait_for(timeout=120_000)
            scene(page)
            page.wait_for_timeout(300)  # until pictures are on the screen
            path = folder / f"page-{scene.__name__}.webp"
            Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, quality=95, method=6)
            assert path.stat().st_size < _MOST, path
            print(f"{path}: {path.stat().st_size} bytes")
            page.context.close()
        browser.close()


if __name__ == "__main__":
    main()
