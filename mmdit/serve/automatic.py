"""The interface of AUTOMATIC1111's web UI, as its clients use it (`/sdapi/v1`).

Clients send what its extensions know; what is unknown here is passed over, as there. Unlike there every request is
a job of its own: `force_task_id` names it, `progress`, `interrupt` and `skip` take that name as `id_task`.
"""

import json
import secrets
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import PurePath
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmdit.common.errors import SettingsError
from mmdit.common.jsons import parse_json
from mmdit.common.options import shown, whole
from mmdit.common.paths import split_scale
from mmdit.driver.foreign import Reading
from mmdit.driver.output import engine, parameters
from mmdit.driver.repeat import settings_of_texts, texts_in
from mmdit.driver.settings import Settings
from mmdit.driver.webui import read_prompts, read_sampler
from mmdit.serve.asking import Asked, Front, as_setting, decoded, picture
from mmdit.serve.events import Drawn, Stepped
from mmdit.serve.keys import ANYONE
from mmdit.serve.replies import RefusedError, Trouble, base64_of, file_of, model_name, without_paths
from samplers.options import SAMPLERS, SPACINGS

_FITS = {0: "stretch", 1: "crop", 2: "pad"}  # its `resize_mode`
_STRENGTH = 0.75  # its `denoising_strength`
_INTERRUPTED = "interrupted"
_LONGEST = 200  # characters of a job's name


def error_body(told: Trouble) -> dict[str, Any]:
    """An error in the client's shape."""
    return {"error": told.code or "error", "detail": told.message, "body": "", "errors": told.message}


@dataclass
class Job:
    """A request on its way."""

    name: str
    owner: str
    since: float = field(default_factory=time.monotonic)
    asked: Asked | None = None
    steps: dict[int, tuple[int, int]] = field(default_factory=dict)  # done and all, of each picture begun
    glance: str | None = None  # the picture that is to come, base64
    wanted: bool = False  # somebody asks for it
    interrupted: bool = False
    skipped: bool = False

    def look(self, at: Stepped) -> None:
        """Called in the thread that draws."""
        self.steps[at.index] = at.step, at.steps
        if self.wanted:
            self.wanted, self.glance = False, b64encode(file_of(at.look(), None)).decode()


class Automatic:
    """The routes under /sdapi/v1."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._jobs: dict[tuple[str, str], Job] = {}  # by owner and name

    def routes(self) -> list[Route]:
        post = {
            "txt2img": self.text_to_image, "img2img": self.image_to_image, "interrupt": self.interrupt,
            "skip": self.skip, "png-info": self.png_info,
        }  # fmt: skip
        get = {
            "progress": self.progress, "samplers": self.samplers, "schedulers": self.schedulers,
            "sd-models": self.models, "loras": self.loras,
        }  # fmt: skip
        # What clients ask for before anything else, and there is none of.
        nothing: dict[str, Any] = {
            "sd-vae": [], "upscalers": [], "embeddings": {"loaded": {}, "skipped": {}}, "cmd-flags": {},
            "scripts": {"txt2img": [], "img2img": []}, "prompt-styles": [], "hypernetworks": [],
        }  # fmt: skip
        routes = [Route(f"/sdapi/v1/{name}", call, methods=["POST"]) for name, call in post.items()]
        routes += [Route(f"/sdapi/v1/{name}", call) for name, call in get.items()]
        routes += [Route(f"/sdapi/v1/{name}", _constant(value)) for name, value in nothing.items()]
        return [*routes, Route("/sdapi/v1/options", self.options, methods=["GET", "POST"])]

    # ---- drawing ---------------------------------------------------------------------------------

    async def text_to_image(self, request: Request) -> Response:
        said = await _said(request)
        return await self._draw(request, said, await run_in_threadpool(read_request, said))

    async def image_to_image(self, request: Request) -> Response:
        said = await _said(request)
        return await self._draw(request, said, await run_in_threadpool(read_image_request, said))

    async def _draw(self, request: Request, said: dict[str, Any], given: dict[str, Any]) -> Response:
        client = request.scope.get("client_of_key", ANYONE)
        name = said.get("force_task_id") or secrets.token_hex(8)
        if not isinstance(name, str) or len(name) > _LONGEST or (client.name, name) in self._jobs:
            raise SettingsError(f"force_task_id is {shown(name)}: expected a text that no job has")
        job = self._jobs[client.name, name] = Job(name, client.name)
        try:
            async with await self._front.ask(request, given, _count(said), job.look) as asked:
                job.asked = asked
                drawn = await asked.all(partly=_INTERRUPTED)
            images = [await run_in_threadpool(base64_of, one.image, one.settings) for one in drawn]
            if said.get("send_images") is False:
                images = []
            if not said.get("include_init_images"):
                said = {**said, "init_images": None, "mask": None} if "init_images" in said else said
            every = asked.pictures if not drawn else [one.settings for one in drawn]
            return JSONResponse({"images": images, "parameters": said, "info": json.dumps(_info(every, drawn))})
        finally:
            del self._jobs[client.name, name]

    # ---- jobs ------------------------------------------------------------------------------------

    def _job(self, request: Request, name: Any) -> Job | None:
        """The job of this name, or where none is given the oldest, of the client's own."""
        owner = request.scope.get("client_of_key", ANYONE).name
        own = [job for job in self._jobs.values() if job.owner == owner and name in (None, "", job.name)]
        return own[0] if own else None

    async def progress(self, request: Request) -> Response:
        job = self._job(request, request.query_params.get("id_task"))
        state = {
            "skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0,
            "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0,
        }  # fmt: skip
        if job is None or job.asked is None:
            told = {"progress": 0.0, "eta_relative": 0.0, "current_image": None, "textinfo": None}
            return JSONResponse({**told, "state": state})
        places = job.asked.ticket.places
        steps = dict(job.steps)
        done, every = sum(step for step, _ in steps.values()), sum(place.all_steps for place in places)
        share, passed = done / max(1, every), time.monotonic() - job.since
        now = max((at for at in steps.values() if at[0] < at[1]), default=(0, 0))
        state |= {
            "skipped": job.skipped, "interrupted": job.interrupted, "stopping_generation": job.interrupted,
            "job": job.name, "job_count": len(places), "job_no": sum(step == all for step, all in steps.values()),
            "sampling_step": now[0], "sampling_steps": now[1],
        }  # fmt: skip
        skip = request.query_params.get("skip_current_image", "false").lower() in ("true", "1")
        job.wanted = job.wanted or not skip
        left = passed * (1 - share) / share if share else 0.0
        told = {"progress": share, "eta_relative": left, "current_image": None if skip else job.glance}
        return JSONResponse({**told, "textinfo": None if share else "waiting", "state": state})

    async def interrupt(self, request: Request) -> Response:
        job = self._job(request, await _named(request))
        if job is not None and job.asked is not None:
            job.interrupted = True
            job.asked.ticket.cancel(_INTERRUPTED)
        return JSONResponse({})

    async def skip(self, request: Request) -> Response:
        job = self._job(request, await _named(request))
        if job is not None and job.asked is not None:
            job.skipped = True
            job.asked.ticket.skip()
        return JSONResponse({})

    # ---- what there is ---------------------------------------------------------------------------

    async def options(self, request: Request) -> Response:
        if request.method == "POST":
            await _said(request)  # nothing of it can be changed
            return JSONResponse({})
        settings = self._front.options.settings
        return JSONResponse({
            "sd_model_checkpoint": model_name(settings), "sd_checkpoint_hash": "", "samples_format": "png",
            "CLIP_stop_at_last_layers": 1,
        })  # fmt: skip

    async def samplers(self, _: Request) -> Response:
        return JSONResponse([
            {"name": theirs, "aliases": [ours], "options": {}} for ours, theirs in SAMPLERS.items()
        ])  # fmt: skip

    async def schedulers(self, _: Request) -> Response:
        return JSONResponse([
            {"name": ours, "label": theirs, "aliases": None, "default_rho": -1, "need_inner_model": False}
            for ours, theirs in SPACINGS.items()
        ])  # fmt: skip

    async def models(self, _: Request) -> Response:
        name = model_name(self._front.options.settings)
        told = {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
        return JSONResponse([told])

    async def loras(self, _: Request) -> Response:
        names = [PurePath(split_scale(text)[0]).name for text in self._front.options.settings.lora]
        return JSONResponse([
            {"name": PurePath(name).stem, "alias": PurePath(name).stem, "path": name, "metadata": {}} for name in names
        ])  # fmt: skip

    async def png_info(self, request: Request) -> Response:
        said = await _said(request)
        data = said.get("image")
        if not isinstance(data, str):
            raise SettingsError("image: expected a picture as base64")
        texts = await run_in_threadpool(_texts, data)
        info = texts.get("parameters") or texts.get("comment") or ""
        found = settings_of_texts(texts)
        return JSONResponse({"info": info, "items": texts, "parameters": found})


# ---- what requests say ---------------------------------------------------------------------------


async def _said(request: Request) -> dict[str, Any]:
    try:
        said = await run_in_threadpool(parse_json, await request.body() or b"{}")
    except ValueError as error:
        raise RefusedError(422, f"the body is no JSON: {error}", "invalid_json") from None
    if not isinstance(said, dict):
        raise RefusedError(422, "the body is no JSON object", "invalid_json")
    return said


async def _named(request: Request) -> Any:
    """The job that a request names, in its address or its body; None for none."""
    return request.query_params.get("id_task") or (await _said(request)).get("id_task")


def _count(said: Mapping[str, Any]) -> int:
    sizes = [said.get(name, 1) for name in ("batch_size", "n_iter")]
    for name, size in zip(("batch_size", "n_iter"), sizes):
        if not whole(size) or not 1 <= size < 10**6:
            raise SettingsError(f"{name} is {shown(size)}: expected a whole number from 1")
    return sizes[0] * sizes[1]


def read_request(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a request asks for, as settings of this engine; what is not said is the model's own.

    What exists here of its names; SettingsError for values that cannot be.
    """
    texts = [said.get(name) or "" for name in ("prompt", "negative_prompt", "sampler_name", "scheduler")]
    for text in texts:
        if not isinstance(text, str):
            raise SettingsError(f"prompt is {shown(text)}: expected text")
    found = Reading()
    read_prompts(found, texts[0], texts[1])
    sampler = texts[2] or said.get("sampler_index")
    if isinstance(sampler, str) and sampler:
        read_sampler(found, sampler, texts[3])
    elif texts[3]:
        found.schedule(texts[3], texts[3])
    given = found.settings
    names = {"steps": "steps", "cfg_scale": "cfg", "width": "width", "height": "height"}
    given |= {ours: said[name] for name, ours in names.items() if said.get(name) is not None}
    given["seed"] = _seed(said, "seed")
    if said.get("subseed_strength"):
        given |= {"variation_seed": _seed(said, "subseed"), "variation_strength": said["subseed_strength"]}
    if said.get("enable_hr"):
        given["upscale"] = said.get("hr_scale", 2.0)
        given["upscale_strength"] = said.get("denoising_strength", _STRENGTH)
    return given


def read_image_request(said: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a picture to begin with, and a mask: white, or if it has transparency opaque, is painted anew."""
    given = read_request({**said, "enable_hr": False})
    images = said.get("init_images")
    if not isinstance(images, list) or len(images) != 1:
        raise SettingsError("init_images: expected a list of one picture, as base64")
    init = given["init"] = as_setting("init", picture("init", images[0]))
    given["strength"] = said.get("denoising_strength", _STRENGTH)
    fit = said.get("resize_mode", 1)
    given["fit"] = _FITS.get(fit if whole(fit) else 1, "crop")
    if said.get("mask") is not None:
        given["mask"] = as_setting("mask", _mask(said, init.image.size))
        given["mask_blur"] = said.get("mask_blur", 4)
        if said.get("inpaint_full_res", True):
            given["mask_crop"] = said.get("inpaint_full_res_padding", 0)
    return given


def _mask(said: Mapping[str, Any], size: tuple[int, int]) -> Image.Image:
    mask = picture("mask", said["mask"])
    clear = mask.mode in ("RGBA", "LA", "PA") or "transparency" in mask.info
    alpha = mask.convert("RGBA").getchannel("A") if clear else None
    seen = mask.convert("L") if alpha is None or alpha.getextrema() == (255, 255) else alpha
    if said.get("inpainting_mask_invert"):
        seen = seen.point(lambda level: 255 - level)
    return seen if seen.size == size else seen.resize(size)


def _seed(said: Mapping[str, Any], name: str) -> Any:
    seed = said.get(name, -1)
    return secrets.randbelow(2**32) if seed in (None, -1) else seed


# ---- what answers say ----------------------------------------------------------------------------


def _info(every: list[Settings], drawn: list[Drawn]) -> dict[str, Any]:
    """Of the pictures that were drawn, or where there is none of those asked for."""
    s = every[0]
    texts = [parameters(without_paths(one.settings)) for one in drawn]
    seeds = [one.seed for one in every]
    variations = [one.variation_seed if one.variation_seed is not None else -1 for one in every]
    return {
        "prompt": s.prompt, "all_prompts": [one.prompt for one in every],
        "negative_prompt": s.negative, "all_negative_prompts": [one.negative for one in every],
        "seed": s.seed, "all_seeds": seeds, "subseed": variations[0], "all_subseeds": variations,
        "subseed_strength": s.variation_strength or 0, "width": s.width, "height": s.height,
        "sampler_name": SAMPLERS[s.sampler], "cfg_scale": s.cfg, "steps": s.steps, "batch_size": len(every),
        "sd_model_name": model_name(s), "sd_model_hash": s.weights, "denoising_strength": s.strength,
        "extra_generation_params": {}, "index_of_first_image": 0, "infotexts": texts, "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"), "clip_skip": 1, "version": engine(),
    }  # fmt: skip


def _texts(data: str) -> dict[str, str]:
    return texts_in(BytesIO(decoded("image", data)), "image")


def _constant(value: Any) -> Any:
    async def answer(_: Request) -> Response:
        return JSONResponse(value)

    return answer
