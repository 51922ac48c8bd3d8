"""The server, asked by OpenAI's own client and as clients of AUTOMATIC1111's web UI ask."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import SMALL, Served, drawn, file_of, gated, openai, opened, pipeline, scene, sent, serving, wait

from mmdit.driver.settings import Settings
from mmdit.serve.openai import steps_of_partial


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(queue=12) as found:
        yield found


def pixels(prompt: str, **more: Any) -> np.ndarray:
    """What the pipeline draws by itself."""
    return np.asarray(pipeline()(prompt, **{**SMALL, **more})[0])


SIZE = "64x48"
EXTRA = {"seed": 7, "steps": 4}


# ---- OpenAI --------------------------------------------------------------------------------------


def test_a_picture_is_the_pipelines_own(served: Served) -> None:
    """Bit for bit; its seed and, inside the file, its settings come with it."""
    extra = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 3.5, "negative_prompt": "a bear"}
    found = served.client().images.generate(prompt="a horse", model="dall-e-3", size=SIZE, extra_body=extra)
    assert found.data and len(found.data) == 1 and found.size == SIZE and found.output_format == "png"
    assert np.array_equal(drawn(found.data[0].b64_json), pixels("a horse", seed=7, cfg=3.5, negative="a bear"))
    assert found.data[0].seed == 7
    said = json.loads(opened(found.data[0].b64_json or "").info["mmdit"])
    assert (said["prompt"], said["negative"], said["cfg"]) == ("a horse", "a bear", 3.5)


def test_several_have_a_seed_each(served: Served) -> None:
    """Each the picture of its seed alone, which is random where none is given."""
    client = served.client()
    found = client.images.generate(prompt="a fox", n=3, size=SIZE, quality="high", extra_body=EXTRA).data or []
    assert [one.seed for one in found] == [7, 8, 9]
    for one in found:
        assert np.abs(drawn(one.b64_json).astype(int) - pixels("a fox", seed=one.seed)).max() <= 1
    free = [client.images.generate(prompt="a fox", size=SIZE, extra_body={"steps": 1}).data for _ in range(2)]
    assert free[0] and free[1] and free[0][0].seed != free[1][0].seed


@pytest.mark.parametrize(("form", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(served: Served, form: Any, kind: str) -> None:
    answer = served.client().images.generate(
        prompt="a fox", size=SIZE, output_format=form, output_compression=60, response_format="url", extra_body=EXTRA
    )
    head, _, body = (answer.data or [])[0].url.partition(",")  # type: ignore[union-attr]
    assert head == f"data:image/{form};base64" and opened(body).format == kind
    told = served.post("/sdapi/v1/png-info", {"image": body}).json()
    assert told["parameters"]["seed"] == 7 and set(told["items"]) == {"comment", "mmdit"}
    long = {"prompt": "a", "negative": "🐴" * 32_000, "cfg": 1, "steps": 1, "size": SIZE, "output_format": form}
    assert served.post("/v1/images/generations", long).status_code == 200


def test_edits_paint_where_the_mask_is_clear(served: Served) -> None:
    """As the pipeline does with a mask that is white there; the rest is the picture's own."""
    init, mask, white = scene(), Image.new("RGBA", (64, 48), (9, 9, 9, 255)), Image.new("L", (64, 48), 0)
    mask.paste((0, 0, 0, 0), (16, 8, 48, 32))
    white.paste(255, (16, 8, 48, 32))
    found = served.client().images.edit(
        image=("a.png", file_of(init)), mask=("m.png", file_of(mask)), prompt="a horse", extra_body=EXTRA
    )
    expected = np.asarray(pipeline()("a horse", init=init, mask=white, seed=7, steps=4)[0])
    seen = drawn((found.data or [])[0].b64_json)
    assert np.array_equal(seen, expected) and np.array_equal(seen[40:], np.asarray(init)[40:])
    assert not np.array_equal(seen, np.asarray(init))


def test_edits_without_a_mask_and_variations_begin_with_the_picture(served: Served) -> None:
    """A list of one, as some clients send it; numbers as text of a form."""
    init, more = scene(), {**EXTRA, "strength": 0.5}
    edit = served.client().images.edit(image=[("a.png", file_of(init))], prompt="a horse", extra_body=more)
    expected = np.asarray(pipeline()("a horse", init=init, strength=0.5, seed=7, steps=4)[0])
    assert np.array_equal(drawn((edit.data or [])[0].b64_json), expected)
    vary = served.client().images.create_variation(image=file_of(init), extra_body=more)
    expected = np.asarray(pipeline()("", init=init, strength=0.5, seed=7, steps=4)[0])
    assert np.array_equal(drawn((vary.data or [])[0].b64_json), expected)


def test_streams_have_partial_pictures(served: Served) -> None:
    """Of several, told apart by `index`; the last of each is the picture."""
    with served.client().images.generate(
        prompt="a horse", size=SIZE, n=2, stream=True, partial_images=2, extra_body=EXTRA
    ) as stream:
        events = list(stream)
    for index in (0, 1):
        own = [event for event in events if event.index == index]  # type: ignore[union-attr]
        kinds = [event.type.rpartition(".")[2] for event in own]
        assert kinds == ["partial_image", "partial_image", "completed"]
        assert [event.partial_image_index for event in own[:2]] == [0, 1]  # type: ignore[union-attr]
        sizes = [drawn(event.b64_json).shape for event in own]
        assert sizes == [(48, 64, 3)] * 3
        assert np.abs(drawn(own[-1].b64_json).astype(int) - pixels("a horse", seed=7 + index)).max() <= 1


def test_partial_pictures_are_spread_over_the_steps() -> None:
    assert steps_of_partial(28, 3) == [7, 14, 21]
    assert steps_of_partial(4, 1) == [2] and steps_of_partial(28, 0) == []
    assert steps_of_partial(1, 3) == [] and steps_of_partial(2, 3) == [1]


def test_models(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "mmdit"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


@pytest.mark.parametrize(
    ("extra", "said", "param"),
    [
        ({"stepz": 3}, "did you mean steps?", "stepz"),
        ({"steps": 0}, "steps is 0", "steps"),
        ({"steps": 151}, "expected at most 150", "steps"),
        ({"width": 4096}, "expected at most 2048", "width"),
        ({"upscale": 4, "width": 1024, "height": 64}, "expected at most 2048", None),
        ({"size": "large"}, "size is 'large'", "size"),
        ({"size": "63x48"}, "the nearest are", "width"),
        ({"n": 11}, "expected 1 to 10", "count"),
        ({"n": "many"}, "expected 1 to 10", "count"),
        ({"background": "transparent"}, "background", None),
        ({"output_format": "svg"}, "output_format", None),
        ({"prompt": "a" * 32_001}, "32001 characters", "prompt"),
        ({"also": ["a fox"] * 9}, "also has 9 texts", "also"),
        ({"t5": "off"}, "t5 is the server's", "t5"),
    ],
)
def test_mistakes_are_told_in_the_clients_shape(served: Served, extra: Any, said: str, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError, match="400") as caught:
        served.client().images.generate(prompt="a horse", extra_body=extra)
    assert said in caught.value.message and caught.value.type == "invalid_request_error"
    assert caught.value.param == param or param is None


def test_one_picture_alone_may_be_edited(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="expected one picture"):
        served.client().images.edit(image=[file_of(scene()), file_of(scene())], prompt="a horse")
    with pytest.raises(openai.BadRequestError, match="has no transparency"):
        served.client().images.edit(image=file_of(scene()), mask=file_of(scene()), prompt="a horse")


# ---- together ------------------------------------------------------------------------------------


def test_requests_of_one_kind_are_drawn_together(served: Served) -> None:
    """Those that come join those that are drawn; one of another kind is not among them."""
    client, before = served.client(), served.metric("mmdit_batch_pictures_count")
    with gated(served.studio) as gate, ThreadPoolExecutor(5) as pool:
        first = pool.submit(client.images.generate, prompt="a bear", size=SIZE, extra_body=EXTRA)
        gate.reached.wait(30)
        asks = [{**EXTRA, "seed": seed, "steps": 3 if seed == 4 else 4} for seed in range(1, 5)]
        later = [pool.submit(client.images.generate, prompt="a fox", size=SIZE, extra_body=more) for more in asks]
        wait(lambda: served.metric("mmdit_queue_pictures") == 4)
        gate.open()
        first.result()
        for future, more in zip(later, asks):
            seen = drawn((future.result().data or [])[0].b64_json)
            assert np.abs(seen.astype(int) - pixels("a fox", seed=more["seed"], steps=more["steps"])).max() <= 1
    wait(lambda: served.metric("mmdit_batch_pictures_count") == before + 2)  # counted after the last answer


def test_the_log_says_how_many_were_drawn_together(served: Served) -> None:
    """At most, in the line that has the id of the answer."""
    asks = [{"prompt": "a bear", "seed": 1, "steps": 4, "n": n, "size": SIZE} for n in (1, 3)]
    with gated(served.studio) as gate, ThreadPoolExecutor(2) as pool:
        first = pool.submit(served.post, "/v1/images/generations", {**asks[0], "steps": 3})
        gate.reached.wait(30)
        second = pool.submit(served.post, "/v1/images/generations", asks[1])
        wait(lambda: served.metric("mmdit_queue_pictures") == 3)
        gate.open()
        ids = [future.result().headers["x-request-id"] for future in (first, second)]
    wait(lambda: {line["id"] for line in served.log} > {*ids})
    assert [line["together"] for one in ids for line in served.log if line["id"] == one] == [1, 3]
    assert len({line["id"] for line in served.log}) == len(served.log)


def test_whoever_leaves_frees_the_place_at_the_next_step(served: Served) -> None:
    """Of a request and of a stream; one that waits is never begun."""
    with gated(served.studio) as gate:
        for stream in (False, True):
            gate.shut()
            said = {"prompt": "a horse", "size": SIZE, "steps": 20, "seed": 5, "stream": stream, "partial_images": 3}
            with closing(HTTPConnection(served.url.removeprefix("http://"), timeout=60)) as client:
                client.request("POST", "/v1/images/generations", json.dumps(said))
                assert gate.reached.wait(30)
            wait(lambda: [place.dropped for place in served.studio._drawing] == [True])
            gate.open()
            wait(lambda: not served.studio.busy)
            assert gate.steps == [5]
    wait(lambda: sum(line["status"] == 499 for line in served.log) >= 1)
    assert served.get("/metrics").text.count('mmdit_cancelled_total{reason="left"} 2') == 1


def test_a_full_queue_says_when_to_come_again(served: Served) -> None:
    """12 pictures; by the pace of steps before."""
    served.client().images.generate(prompt="a horse", size=SIZE, extra_body=EXTRA)
    with gated(served.studio) as gate, ThreadPoolExecutor(2) as pool:
        asked = {"prompt": "a horse", "size": SIZE, "steps": 2, "seed": 1}
        futures = [pool.submit(served.post, "/v1/images/generations", {**asked, "n": n}) for n in (10, 2)]
        gate.reached.wait(30)
        wait(lambda: len(served.studio._drawing) + len(served.studio._waiting) == 12)
        with pytest.raises(openai.RateLimitError) as caught:
            served.client().images.generate(prompt="a horse", size=SIZE)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120
        assert caught.value.code == "queue_full" and "12 pictures wait or are drawn" in caught.value.message
        gate.open()
        assert [len(future.result().json()["data"]) for future in futures] == [10, 2]


# ---- AUTOMATIC1111 -------------------------------------------------------------------------------


def test_a_web_ui_client_draws(served: Served) -> None:
    """The calls of a session: what is there, a picture, what it says of itself."""
    assert served.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "demo"
    assert served.post("/sdapi/v1/options", {"sd_model_checkpoint": "demo"}).status_code == 200
    assert served.get("/sdapi/v1/sd-models").json()[0]["title"] == "demo"
    assert {"Euler", "DPM++ 2M"} <= {one["name"] for one in served.get("/sdapi/v1/samplers").json()}
    assert "karras" in {one["name"] for one in served.get("/sdapi/v1/schedulers").json()}
    assert served.get("/sdapi/v1/loras").json() == [] and served.get("/sdapi/v1/upscalers").json() == []
    said = {
        "prompt": "a (horse:1.1) <lora:style:1>", "negative_prompt": "a bear", "seed": 3, "steps": 4, "cfg_scale": 3,
        "width": 64, "height": 48, "batch_size": 2, "sampler_name": "DPM++ 2M", "scheduler": "Karras",
        "some_extension": {"x": 1}, "restore_faces": False,
    }  # fmt: skip
    answer = served.post("/sdapi/v1/txt2img", said).json()
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [3, 4] and info["sampler_name"] == "DPM++ 2M" and answer["parameters"] == said
    own = {"negative": "a bear", "cfg": 3, "sampler": "dpmpp_2m", "schedule": "karras", "emphasis": True}
    for text, seed in zip(answer["images"], (3, 4)):
        expected = pixels("a (horse:1.1)", seed=seed, **own)
        assert np.abs(drawn(text).astype(int) - expected).max() <= 1
    told = served.post("/sdapi/v1/png-info", {"image": f"data:image/png;base64,{answer['images'][0]}"}).json()
    assert told["info"] == info["infotexts"][0] and told["parameters"]["seed"] == 3
    assert set(told["items"]) == {"parameters", "mmdit"}


def test_a_web_ui_client_paints_over_a_picture(served: Served) -> None:
    """A white mask, and one that is opaque; inverted; the region around it."""
    init, mask, clear = scene(), Image.new("L", (64, 48), 0), Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    mask.paste(255, (16, 8, 48, 32))
    clear.paste((7, 7, 7, 255), (16, 8, 48, 32))
    said = {"prompt": "a horse", "seed": 7, "steps": 4, "init_images": [sent(init)], "denoising_strength": 0.8}
    own = {"init": init, "strength": 0.8, "seed": 7, "steps": 4}
    plain = served.post("/sdapi/v1/img2img", said).json()
    assert np.array_equal(drawn(plain["images"][0]), np.asarray(pipeline()("a horse", **own)[0]))
    assert plain["parameters"]["init_images"] is None
    expected = np.asarray(pipeline()("a horse", mask=mask, mask_blur=2, **own)[0])
    for one in (mask, clear):
        more = {"mask": sent(one), "mask_blur": 2, "inpaint_full_res": False}
        found = served.post("/sdapi/v1/img2img", {**said, **more}).json()
        assert np.array_equal(drawn(found["images"][0]), expected)
    more = {"mask": sent(mask), "mask_blur": 0, "inpainting_mask_invert": 1, "inpaint_full_res": False}
    found = drawn(served.post("/sdapi/v1/img2img", {**said, **more}).json()["images"][0])
    assert np.array_equal(found[8:32, 16:48], np.asarray(init)[8:32, 16:48])
    more = {"mask": sent(mask), "inpaint_full_res_padding": 4, "width": 64, "height": 48, "mask_blur": 0}
    found = drawn(served.post("/sdapi/v1/img2img", {**said, **more}).json()["images"][0])
    own |= {"mask": mask, "mask_crop": 4, "width": 64, "height": 48}
    assert np.array_equal(found, np.asarray(pipeline()("a horse", **own)[0]))


def test_jobs_are_watched_interrupted_and_skipped_by_name(served: Served) -> None:
    """A preview where somebody asks for one; an interrupted job gives what is done."""
    said = {"prompt": "a horse", "seed": 5, "steps": 20, "width": 64, "height": 48}
    idle = served.get("/sdapi/v1/progress").json()
    assert idle["progress"] == 0 and idle["state"]["job_count"] == 0 and idle["current_image"] is None
    for call in ("interrupt", "skip"):
        with gated(served.studio) as gate, ThreadPoolExecutor(2) as pool:
            first = pool.submit(served.post, "/sdapi/v1/txt2img", {**said, "force_task_id": "one"})
            gate.reached.wait(30)
            second = pool.submit(served.post, "/sdapi/v1/txt2img", {**said, "steps": 2, "force_task_id": "two"})
            wait(lambda: served.get("/sdapi/v1/progress?id_task=two").json()["textinfo"] == "waiting")
            assert served.get("/sdapi/v1/progress?id_task=none").json()["state"]["job"] == ""
            assert served.get("/sdapi/v1/progress").json()["current_image"] is None  # asks for one
            gate.let(2)
            wait(lambda: len(gate.steps) == 3)
            told = served.get("/sdapi/v1/progress?id_task=one").json()
            assert drawn(told["current_image"]).shape == (48, 64, 3) and told["progress"] == 0.1
            assert told["state"]["sampling_step"] == 2 and told["eta_relative"] > 0
            assert served.post(f"/sdapi/v1/{call}", {"id_task": "one"}).json() == {}
            gate.open()
            answer = first.result().json()
            assert answer["images"] == [] and json.loads(answer["info"])["all_seeds"] == [5]
            assert len(second.result().json()["images"]) == 1
            assert gate.steps == [5] * 5  # three, and the two of the second


def test_names_of_the_web_ui_that_cannot_be(served: Served) -> None:
    for said in ({"steps": 0}, {"batch_size": 0}, {"width": "wide"}, {"prompt": 3}, {"seed": "x"}, {"n_iter": 99}):
        answer = served.post("/sdapi/v1/txt2img", said)
        assert answer.status_code == 400 and answer.json().keys() == {"error", "detail", "body", "errors"}, said
    assert served.post("/sdapi/v1/img2img", {"prompt": "a"}).status_code == 400


def test_settings_of_a_request_are_those_of_every_picture() -> None:
    """Every setting is a request's, the server's, or of the command; a new one that names files is no request's."""
    from mmdit.common.options import Mark, marked
    from mmdit.serve.asking import NAMES, PICTURES

    assert {"seed", "steps", "negative", "init", "mask", "focus", "sampler", "cfg_interval"} <= {*NAMES}
    for mark in (Mark.LOADED, Mark.OF_THE_RUN, Mark.FOUND):
        assert not {*marked(Settings, mark)} & {*NAMES}
    assert {*marked(Settings, Mark.PATH)} & {*NAMES} == {*PICTURES}
