"""A real browser for tests of the page: Chromium, as the system has it, driven by Playwright."""
# ruff: noqa: E402

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("playwright", reason="tests in a browser need the package playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("tests in a browser need chromium on the PATH", allow_module_level=True)

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

_QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
CONTROLS = {"button", "checkbox", "combobox", "image", "link", "radio", "slider", "spinbutton", "textbox"}


@contextmanager
def browsing() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*_QUIET])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A browser's view of a server, with a history of its own."""

    page: Page
    context: BrowserContext
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def ready(self) -> None:
        self.page.locator("#draw:not(:disabled)").wait_for()

    def fill(self, prompt: str, **more: Any) -> None:
        """more: controls by their labels, with underscores for blanks."""
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        for name, value in more.items():
            label = name.replace("_", " ")
            control = self.page.get_by_label(label[0].upper() + label[1:], exact=True)
            if not control.is_visible():
                control.locator("xpath=ancestor::details/summary").click()
            control.fill(str(value))

    def small(self, prompt: str, **more: Any) -> None:
        """The same of a picture that is soon there."""
        self.fill(prompt, width=64, height=48, **{"steps": 4, **more})

    def value(self, label: str) -> str:
        return self.page.get_by_label(label, exact=True).input_value()

    def draw(self) -> None:
        """Until all of it is drawn."""
        before = self.page.locator(".thumb").count()
        self.page.get_by_role("button", name="Draw", exact=True).click()
        self.page.locator("#draw:visible").wait_for()
        assert self.page.locator(".thumb").count() > before, self.page.locator("#trouble").text_content()

    def give(self, key: str) -> None:
        """Where a key is asked for; until the server has said what it thinks of it."""
        dialog = self.page.get_by_role("dialog", name="This server needs a key")
        dialog.get_by_label("Key").fill(key)
        with self.page.expect_response("**/v1/models"):
            dialog.get_by_role("button", name="Use it").click()

    def saved(self) -> Image.Image:
        """The picture that is on the wall, as its file."""
        with self.page.expect_download() as found:
            self.page.get_by_role("button", name="Save").click()
        return Image.open(io.BytesIO(found.value.path().read_bytes()))

    def pixels(self) -> np.ndarray:
        return np.asarray(self.saved().convert("RGB"))

    def let_fall(self, file: bytes, name: str, where: str) -> None:
        """A file, dragged over the page and dropped at an element."""
        self.page.evaluate(
            """async ([data, name, where]) => {
                const moved = new DataTransfer();
                moved.items.add(new File([Uint8Array.from(data)], name, { type: "image/png" }));
                const of = (kind) => new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: moved });
                document.body.dispatchEvent(of("dragenter"));
                if (document.getElementById("drop").hidden) throw new Error("nothing to drop on");
                document.querySelector(where).dispatchEvent(of("dragover"));
                document.querySelector(where).dispatchEvent(of("drop"));
            }""",
            [[*file], name, where],
        )

    def nameless(self) -> list[str]:
        """Controls that a screen reader could not tell, as the browser's own tree for it has them."""
        session = self.context.new_cdp_session(self.page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        found = [
            (node["role"]["value"], node.get("name", {}).get("value", "").strip())
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in CONTROLS
        ]
        assert len(found) > 10
        return [role for role, name in found if not name]

    def sideways(self) -> bool:
        """Whether the page is wider than the screen."""
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth")


@contextmanager
def visiting(browser: Browser, url: str, refused: bool = False, **more: Any) -> Iterator[Visit]:
    """A visit, at whose end nothing was asked of others and nothing was complained about.

    refused: the server refuses requests, which the browser tells on its console. more: of the context.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce", **more})
    visit = Visit(context.new_page(), context)

    def heard(message: ConsoleMessage) -> None:
        if not (refused and message.text.startswith("Failed to load resource")):
            visit.complaints.append(message.text)

    visit.page.on("console", heard)
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    context.on("request", lambda request: visit.requests.append(request.url))
    try:
        visit.page.goto(url)
        yield visit
        own = urlsplit(url).netloc
        asked = [address for address in visit.requests if not address.startswith(("blob:", "data:"))]
        assert {urlsplit(address).netloc for address in asked} == {own}, asked
        assert not visit.complaints, visit.complaints
    finally:
        context.close()
