"""This engine beside diffusers and transformers on one checkpoint: `python -m benchmarks.parity MODEL`.

MODEL is anything that the engine loads: a diffusers folder (the published one, one of `benchmarks.random_checkpoint`,
weights/demo), a single file in any layout and number format with the files that it lacks, a model of the hub. For
diffusers it is converted into a folder where it is none. Every component gets the same inputs in both; errors are the
norm of the difference over the norm of the reference. With `--dtype bf16` both sides are compared with this engine in
float32, since two bfloat16 results differ from each other by rounding alone; `--direct` compares them with each other
all the same, where float32 does not fit into memory.
"""

import argparse
import copy
import gc
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit import Pipeline, Settings
from mmdit.driver.loading import DTYPES, SEPARATE
from samplers import shifted_sigmas
from weights import published
from weights.convert import convert

PROMPTS = ["a horse and a bear on a green background", ""]
Outputs = dict[str, Tensor]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    difference = (ours.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


class Inputs:
    """The same random inputs for both sides, at the checkpoint's sizes."""

    def __init__(self, pipe: Pipeline, settings: Settings) -> None:
        assert settings.width and settings.height and settings.t5_length
        generator = torch.Generator().manual_seed(settings.seed)
        config = pipe.transformer.config
        tokens = pipe.text.length(settings.t5_length)
        self.settings = settings
        self.noise = pipe.noise(settings.width, settings.height, [settings.seed])
        self.picture = torch.rand(1, 3, settings.height, settings.width, generator=generator) * 2 - 1
        self.context = torch.randn(1, tokens, config.context_size, generator=generator)
        self.pooled = torch.randn(1, config.pooled_size, generator=generator)
        self.sigma = torch.tensor([0.8])

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Latents, context, pooled vector, sigma (float32) and picture as a network takes them."""
        latent, context, pooled = (t.to(device, dtype) for t in (self.noise, self.context, self.pooled))
        return latent, context, pooled, self.sigma.to(device), self.picture.to(device, dtype)

    def at(self, dtype: str) -> "Inputs":
        """The same for a pipeline of another number format."""
        other = copy.copy(self)
        other.settings = replace(self.settings, dtype=dtype)
        return other


@torch.no_grad()
def ours(pipe: Pipeline, inputs: Inputs) -> Outputs:
    """Every component and the whole loop by this engine; float32 results."""
    out: Outputs = {}
    encoder: Any = pipe.text
    text = encoder.encode(PROMPTS, inputs.settings.t5_length or 256)
    out |= {f"tokens {name}": ids for name, ids in text.tokens.items()}
    for name in ("clip_l", "clip_g"):
        out[f"{name} sequence"], out[f"{name} pooled"] = getattr(encoder, name)(text.tokens[name])
    if encoder.t5 is not None:
        out["t5 sequence"] = encoder.t5(text.tokens["t5"])
    out["context"], out["pooled"] = text.context, text.pooled
    dtype = pipe.transformer.context_embedder.weight.dtype
    latent, context, pooled, sigma, picture = inputs.on(pipe.device, dtype)
    out["transformer"] = pipe.transformer(latent, sigma, context, pooled)
    out["vae encode"] = pipe.vae.encode(picture)[0]
    out["vae decode"] = pipe.vae.decode(latent)
    out["sigmas"] = shifted_sigmas(inputs.settings.steps or 1, pipe.shift)
    trace: Outputs = {}
    pipe.run(replace(inputs.settings, prompt=PROMPTS[0]), trace)
    out["loop latents"] = trace[f"latents.{(inputs.settings.steps or 1) - 1}"]
    out["image"] = trace["image"]
    return there(out)


def there(out: Outputs) -> Outputs:
    """Tokens and pixels as they are, all else in float32, on the CPU."""
    return {name: (t if t.dtype in (torch.int64, torch.uint8) else t.float()).cpu() for name, t in out.items()}


@torch.no_grad()
def theirs(folder: Path, dtype: torch.dtype, device: str, inputs: Inputs) -> Outputs:
    """The same by diffusers and transformers."""
    from diffusers import StableDiffusion3Pipeline  # pyright: ignore[reportPrivateImportUsage]

    settings, out = inputs.settings, Outputs()
    without = {} if settings.t5 == "on" else {"text_encoder_3": None, "tokenizer_3": None}
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype, **without)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    names = {"clip_l": ("", "tokenizer"), "clip_g": ("_2", "tokenizer_2"), "t5": ("_3", "tokenizer_3")}
    for name, (suffix, tokenizer) in names.items():
        if getattr(pipe, tokenizer) is None:
            continue
        length = settings.t5_length if name == "t5" else pipe.tokenizer.model_max_length
        told = getattr(pipe, tokenizer)(
            PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        out[f"tokens {name}"] = told.input_ids
        encoder = getattr(pipe, f"text_encoder{suffix}")
        if name == "t5":
            out["t5 sequence"] = encoder(told.input_ids.to(device))[0]
        else:
            result = encoder(told.input_ids.to(device), output_hidden_states=True)
            out[f"{name} sequence"], out[f"{name} pooled"] = result.hidden_states[-2], result.text_embeds
    keywords = {"max_sequence_length": settings.t5_length}
    encoded = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, **keywords)
    out["context"], out["pooled"] = encoded[0], encoded[2]
    latent, context, pooled, sigma, picture = inputs.on(torch.device(device), dtype)
    out["transformer"] = pipe.transformer(latent, context, pooled, 1000 * sigma, return_dict=False)[0]
    scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    out["vae encode"] = (pipe.vae.encode(picture).latent_dist.mode() - shift) * scale
    out["vae decode"] = pipe.vae.decode(latent / scale + shift, return_dict=False)[0]
    sides = {"width": settings.width, "height": settings.height, "num_inference_steps": settings.steps}
    arguments = {"guidance_scale": settings.cfg, "latents": latent, **sides, **keywords}
    out["loop latents"] = pipe(PROMPTS[0], negative_prompt="", output_type="latent", **arguments).images
    out["sigmas"] = pipe.scheduler.sigmas
    decoded = pipe.vae.decode(out["loop latents"] / scale + shift, return_dict=False)[0]
    picture = pipe.image_processor.postprocess(decoded, output_type="pt")
    out["image"] = (picture * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return there(out)


def freed(make: Callable[[], Outputs]) -> Outputs:
    """What `make` returns, with the models that were loaded before and in it gone from memory."""
    gc.collect()
    out = make()
    gc.collect()
    return out


@contextmanager
def as_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The model as a diffusers folder, which is all that diffusers reads in every form: converted where it is none."""
    parts = {part: getattr(args, name) for part, name in SEPARATE.items() if getattr(args, name) is not None}
    if not parts and (Path(args.model) / "model_index.json").exists():
        yield Path(args.model)
        return
    with tempfile.TemporaryDirectory(prefix="parity-") as work:
        folder = convert(args.model, Path(work) / "model", "diffusers", args.dtype, parts=parts)
        if args.tokenizers is not None:
            there = [part for part, own in published.FOLDERS.items() if (folder / own).is_dir()]
            shift = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
            published.write_pipeline_files(folder, there, args.tokenizers, None, scheduler=shift)
        yield folder


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="FOLDER|FILE|ID", help="anything that this engine loads")
    for name in (*SEPARATE.values(), "tokenizers"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, help="as in mmdit.run")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float)
    parser.add_argument("--t5-length", type=int)
    parser.add_argument("--t5", choices=("on", "off"), default="on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both sides compute")
    parser.add_argument("--direct", action="store_true", help="do not compute in float32, compare directly")
    args = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    torch.backends.cudnn.allow_tf32 = False  # or a GPU rounds the inputs of the other side's convolutions

    def load(dtype: str) -> Pipeline:
        parts = {name: getattr(args, name) for name in (*SEPARATE.values(), "tokenizers")}
        return Pipeline.load(args.model, dtype=dtype, device=args.device, t5=args.t5, **parts)

    pipe: Pipeline | None = load(args.dtype)
    wanted = {name: getattr(args, name) for name in ("width", "height", "steps", "cfg", "t5_length", "seed")}
    inputs = Inputs(pipe, pipe.check(replace(pipe.settings, **wanted)))
    mine = ours(pipe, inputs)
    pipe = None  # one model at a time: two of full size in float32 are more than most machines hold

    with as_folder(args) as folder:
        other = freed(lambda: theirs(folder, DTYPES[args.dtype], args.device, inputs))
    direct = args.direct or args.dtype == "fp32"
    reference = other if direct else ours(load("fp32"), inputs.at("fp32"))
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{args.model}, {args.dtype}, {where}, torch {torch.__version__}")
    report: dict[str, Any] = {"dtype": args.dtype}
    if direct:
        print(f"{'component':16} error against diffusers and transformers")
    else:
        print(f"{'component':16} {'ours':>9} {'theirs':>9}  errors against this engine in float32")
    for name, value in mine.items():
        if name.startswith("tokens"):
            report[name] = bool(torch.equal(value, other[name]))
            print(f"{name:16} {'equal' if report[name] else 'DIFFERENT'}")
        elif name == "image":
            levels = (value.int() - other[name].int()).abs()
            report[name] = {"most": int(levels.max()), "share": float((levels > 0).float().mean())}
            print(
                f"{name:16} differs by at most {report[name]['most']} levels, in {report[name]['share']:.2%} of values"
            )
        elif direct:
            report[name] = relative_error(value, other[name])
            print(f"{name:16} {report[name]:.1e}")
        else:
            report[name] = [relative_error(side[name], reference[name]) for side in (mine, other)]
            print(f"{name:16} {report[name][0]:9.2e} {report[name][1]:9.2e}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
