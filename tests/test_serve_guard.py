"""What the server does not do: strangers, other pages, files of the machine, too much, garbage."""

import os
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from served import SMALL, Served, file_of, gated, httpx2, openai, pipeline, scene, sent, serving, wait
from sweeps import sampled

from mmdit.common.errors import SettingsError
from mmdit.driver.stages import NotFiniteError
from mmdit.memory.budget import DeviceMemoryError
from mmdit.serve import asking, keys
from mmdit.serve.asking import NAMES, Front
from mmdit.serve.automatic import read_image_request, read_request
from mmdit.serve.metrics import Metrics
from mmdit.serve.openai import wish_of
from mmdit.serve.options import ServeOptions

ASKED = {"prompt": "a horse", "seed": 1, **SMALL}
DRAW = "/v1/images/generations"
KEYS = ("sk-0123456789abcdef", "sk-fedcba9876543210")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(most_megabytes=1) as found:
        yield found


# ---- files of the machine ------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture that no request may reach; whoever looks at a path fails."""
    path = tmp_path / "secret.png"
    path.write_bytes(file_of(scene()))

    def looked(*_: object) -> Path:
        raise AssertionError("a path was looked at")

    for module in ("mmdit.images.read", "samplers.options", "mmdit.driver.output", "mmdit.driver.repeat"):
        monkeypatch.setattr(f"{module}.user_path", looked)
    return path


OF_FILES = (
    "init", "mask", "control_image", "control_mask", "sigmas", "out", "dump", "embedding", "lora", "model", "vae",
    "clip_l", "t5xxl", "tokenizers", "variant", "taesd", "control", "from_png", "prompts",
)  # fmt: skip


@pytest.mark.parametrize("name", sampled(OF_FILES, 3))
def test_no_request_names_a_file(served: Served, secret: Path, name: str) -> None:
    """Neither of JSON nor of a form; `model` is a word without meaning there."""
    for value in (str(secret), [str(secret)], f"file://{secret}", "https://example.org/a.png"):
        said = {**ASKED, "init": sent(scene()), name: value}
        if name == "model":
            said["steps"] = 0
        answer = served.post(DRAW, said)
        assert answer.status_code == 400, (name, value, answer.text)
        assert "is damaged" not in answer.text
    form = {"prompt": "a horse", "steps": "0" if name == "model" else "2", name: str(secret)}
    answer = httpx2.post(served.url + "/v1/images/edits", data=form, files={"image": file_of(scene())}, timeout=60)
    assert answer.status_code == 400, answer.text


def test_no_request_of_the_web_ui_names_a_file(served: Served, secret: Path) -> None:
    for path in (str(secret), "https://example.org/a.png"):
        for said in ({"init_images": [path]}, {"init_images": [sent(scene())], "mask": path}):
            assert served.post("/sdapi/v1/img2img", {"prompt": "a", **said}).status_code == 400
        assert served.post("/sdapi/v1/png-info", {"image": path}).status_code == 400


def test_noise_levels_may_be_written_out(served: Served) -> None:
    said = {**ASKED, "sigmas": [1, 0.5]}
    del said["steps"]
    assert served.post(DRAW, said).status_code == 200
    assert asking.written_levels("1, 0.5 0.25") == "1.0,0.5,0.25"
    for wrong in ("1,x", "", [], [True], [[1]], {"a": 1}, ["1", None], "nan", 3):
        with pytest.raises(SettingsError):
            asking.written_levels(wrong)


def test_answers_name_no_path_of_the_machine(tmp_path: Path) -> None:
    from mmdit.driver.settings import Settings
    from mmdit.serve.replies import file_of as reply

    paths = {name: str(tmp_path / name) for name in ("model", "vae", "clip_l", "taesd", "variant", "tokenizers")}
    s = Settings(**paths, lora=(f"{tmp_path}/style.safetensors:0.5",), out=str(tmp_path)).resolved({})
    for form in ("png", "jpeg", "webp"):
        data = reply(Image.new("RGB", (8, 8)), s, form)
        assert str(tmp_path).encode() not in data and str(tmp_path).encode("utf-16-be") not in data
        assert b"style.safetensors:0.5" in data.replace(b"\0", b"") or form == "png"


# ---- garbage -------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    [], {}, "x", -1, 0, True, 1e308, 10**30, "9" * 5000, ["x"], [[1]], {"a": {}}, "\ud800", "\0", [None], "data:,x",
    "data:image/png;base64,", "aGVsbG8=", "nan",
)  # fmt: skip


@pytest.mark.parametrize("interface", ["openai", "web ui"])
def test_values_that_cannot_be_are_mistakes_of_the_user(interface: str) -> None:
    """Of every field; nothing else is ever raised."""
    options = ServeOptions(device="cpu", dtype="fp32")

    class Loaded:
        pipeline = pipeline()

    front = Front(options, Loaded(), Metrics())  # type: ignore[arg-type]
    own = ("n", "size", "stream", "partial_images", "output_format", "output_compression", "response_format", "model")
    theirs = (
        "prompt", "negative_prompt", "seed", "subseed_strength", "subseed", "sampler_name", "sampler_index",
        "scheduler", "steps", "cfg_scale", "width", "height", "enable_hr", "hr_scale", "denoising_strength",
        "init_images", "resize_mode", "mask", "mask_blur", "inpaint_full_res", "inpaint_full_res_padding",
    )  # fmt: skip
    refused = list[str]()
    for name in (*NAMES, *own) if interface == "openai" else theirs:
        for value in VALUES:
            try:
                if interface == "openai":
                    wish = wish_of({**ASKED, name: value}, {})
                    front.checked(wish.given, wish.count)
                else:
                    for read in (read_request, read_image_request):
                        more = {"subseed_strength": 0.5, "enable_hr": True} if read is read_request else {}
                        images = {"init_images": [sent(scene())]}
                        front.checked(read({**ASKED, **images, **more, name: value}), 1)
            except SettingsError as error:
                refused.append(str(error))
    assert len(refused) > 200 and all(map(str.isprintable, refused))


BODIES = (
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": 1, "prompt": 2}',
    b"[" * 5000, b'{"prompt": {"a": 1}}', b'{"prompt": "a", "steps": 1e999}', b'{"prompt": null}', bytes(range(256)),
)  # fmt: skip


@pytest.mark.parametrize("path", [DRAW, "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/png-info"])
def test_bodies_that_are_no_request(served: Served, path: str) -> None:
    with httpx2.Client(base_url=served.url, timeout=60) as client:
        for body in BODIES:
            if path.endswith("txt2img") and body in (b"", b'{"prompt": null}'):
                continue  # all defaults, as there
            answer = client.post(path, content=body)
            assert answer.status_code in (400, 422), (body[:20], answer.text)
            assert "error" in answer.json()


def test_forms_that_are_none(served: Served) -> None:
    """No boundary, an end that is missing, too large a part, pictures that are none."""
    head = {"content-type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
    with httpx2.Client(base_url=served.url, timeout=60) as client:
        for headers in (head, {"content-type": "multipart/form-data"}, {"content-type": "text/plain"}, {}):
            for body in (b"", part, part + b"--x--", b"\0" * 100, b"--x\r\n\r\n--x--", part.replace(b"=", b"")):
                for path in ("edits", "variations"):
                    answer = client.post(f"/v1/images/{path}", content=body, headers=headers)
                    assert answer.status_code == 400 and answer.json()["error"]["message"], (headers, body)
        whole = file_of(scene())
        for data in (b"", b"x", whole[:60], whole[:-30], b"GIF89a" + whole, bomb(6000)):
            answer = client.post("/v1/images/edits", data={"prompt": "a"}, files={"image": data})
            assert answer.status_code == 400, data[:20]
        assert "is 6000x6000: expected at most 25000000 pixels" in answer.json()["error"]["message"]


def bomb(side: int) -> bytes:
    """A PNG that claims to be so large, in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bodies_that_are_too_large(served: Served) -> None:
    """By what they say, and by what comes."""
    with pytest.raises(openai.APIStatusError, match="larger than 1 MB") as caught:
        served.client().images.generate(prompt="a", extra_body={"init": "x" * 1_100_000})
    assert caught.value.status_code == 413
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 30) as said:
        said.sendall(f"POST {DRAW} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000001\r\n\r\n".encode())
        assert said.recv(100).startswith(b"HTTP/1.1 413")
    pieces = (b"x" * 100_000 for _ in range(12))
    assert httpx2.post(served.url + DRAW, content=pieces, timeout=60).status_code == 413


def test_bodies_are_too_large_together(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What requests hold that are being answered; it is given back."""
    monkeypatch.setattr("mmdit.serve.guard._AT_ONCE", 0.001)
    assert served.post(DRAW, {"prompt": "a" * 2000}).json()["error"]["code"] == "busy"
    assert served.post(DRAW, {"prompt": "a", "steps": 0}).status_code == 400


def test_other_routes(served: Served) -> None:
    assert served.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert served.get(DRAW).status_code == 405 and served.get("/sdapi/v1/nothing").json()["detail"] == "Not Found"
    assert served.metric('mmdit_requests_total{route="other",status="404"}') == 2


# ---- who may ask ---------------------------------------------------------------------------------


def test_keys_let_in(tmp_path: Path) -> None:
    """Two, by either scheme; the second may have one picture at a time."""
    file = tmp_path / "keys"
    file.write_text(f"# who\n{KEYS[0]} alice\n\n{KEYS[1]} bob 1\n")
    with serving(api_key_file=str(file)) as served:
        for key in ("none", KEYS[0][:-1], KEYS[0] + "x", "sk-\udcff"):
            assert served.get("/v1/models", headers={"authorization": b"Bearer " + os.fsencode(key)}).status_code == 401
        for headers in ({}, {"authorization": KEYS[0]}, {"authorization": "Basic x"}, {"authorization": ""}):
            assert served.post(DRAW, ASKED, headers=headers).status_code == 401
        with pytest.raises(openai.AuthenticationError, match="needs a key"):
            served.client(api_key="sk-wrong").models.list()
        assert served.get("/health").status_code == served.get("/ready").status_code == 200
        assert served.get("/metrics").status_code == 401
        assert served.get("/sdapi/v1/samplers", auth=("anybody", KEYS[1])).status_code == 200
        turns, submit = list[str](), served.studio.submit
        served.studio.submit = lambda *given: (turns.append(given[-1]), submit(*given))[1]  # type: ignore[method-assign]
        drawn = served.client(api_key=KEYS[0]).images.generate(prompt="a", extra_body=SMALL)
        assert len(drawn.data or []) == 1 and turns == ["alice"]
        with pytest.raises(openai.RateLimitError, match="1 at most"):
            served.client(api_key=KEYS[1]).images.generate(prompt="a", n=2, extra_body=SMALL)
    assert {line.get("client") for line in served.log} == {None, "alice", "bob"}
    assert not any(key in line for line in served.lines for key in KEYS)


def test_without_keys_addresses_have_their_turns(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, submit = list[str](), served.studio.submit
    monkeypatch.setattr(served.studio, "submit", lambda *given: (turns.append(given[-1]), submit(*given))[1])
    assert served.post(DRAW, {**ASKED, "steps": 1}).status_code == 200 and turns == ["127.0.0.1"]


def test_every_key_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind the one that is it, each in constant time."""
    file, compared = tmp_path / "keys", list[bytes]()
    file.write_text("\n".join(KEYS))
    found = keys.Keys(str(file))
    compare = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append(a) or compare(a, b))
    assert found.client(f"Bearer {KEYS[0]}") is not None and len(compared) == 2


@pytest.mark.parametrize("text", ["", "# none", "short", f"{KEYS[0]} a b", f"{KEYS[0]} a 1 2", f"{KEYS[0]} a 0"])
def test_files_of_keys_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(SettingsError, match="api_key_file") as caught:
        keys.Keys(str(tmp_path / "keys"))
    assert KEYS[0] not in str(caught.value)


def test_other_pages_are_not_let_in() -> None:
    """Of a browser: another origin, another name of this machine; one may be."""
    with serving(origin="https://example.org") as served:
        host = served.url.removeprefix("http://")
        for origin, status in (
            (served.url, 200),
            ("https://example.org", 200),
            ("https://evil.org", 403),
            ("null", 403),
        ):
            answer = served.get("/v1/models", headers={"origin": origin})
            assert answer.status_code == status, origin
            allowed = answer.headers.get("access-control-allow-origin")
            assert allowed == ("https://example.org" if origin == "https://example.org" else None)
        for name, status in ((host, 200), ("localhost", 200), ("evil.org", 403), ("evil.org:7860", 403), ("", 403)):
            assert served.get("/v1/models", headers={"host": name}).status_code == status, name
        asks = {"origin": "https://example.org", "access-control-request-headers": "authorization"}
        answer = httpx2.options(served.url + DRAW, headers=asks)
        assert answer.status_code == 204 and answer.headers["access-control-allow-headers"] == "authorization"


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DeviceMemoryError("denoise: no memory"), 503, "out_of_memory"),
        (NotFiniteError("the latents: NaN"), 500, "not_finite"),
        (SettingsError("memory: does not fit"), 400, "invalid_value"),
        (RuntimeError("a secret"), 500, "internal"),
    ],
)
def test_what_goes_wrong_is_told(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, code: str
) -> None:
    """In a stream too; of mistakes of ours nothing but in the log."""

    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr(served.studio, "_draw", fails)
    with pytest.raises(openai.APIStatusError) as caught:
        served.client().images.generate(prompt="a", extra_body=SMALL)
    assert caught.value.status_code == status and caught.value.code == code
    assert ("retry-after" in caught.value.response.headers) == (status == 503)
    assert "secret" not in caught.value.message
    with pytest.raises(openai.APIError) as streamed:
        list(served.client().images.generate(prompt="a", stream=True, extra_body=SMALL))
    assert streamed.value.code == code
    wait(lambda: sum("error" in line for line in served.log[-2:]) == 2)


def test_what_takes_too_long_is_let_go() -> None:
    with serving(timeout=1) as served, gated(served.studio) as gate:
        with pytest.raises(openai.InternalServerError) as caught:
            served.client().images.generate(prompt="a horse", extra_body={**SMALL, "seed": 1})
        assert caught.value.status_code == 504
        gate.open()
        wait(lambda: not served.studio.busy)
        assert gate.steps == [1]
        assert served.studio.metrics.value("mmdit_cancelled_total", reason="timeout") == 1
