"""What every path of the engine makes of a variant: `python -m benchmarks.check_variant FILE`, in under a minute.

The variant is built at the demo model's size with random values, saved beside the demo's other networks, loaded again
and drawn with. Each line is one check; the exit code is 1 where one fails.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.emoji.networks import CLIP_G, CLIP_L, MMDIT
from mmdit import Pipeline, variants
from mmdit.common.errors import SettingsError
from mmdit.driver.loading import DEMO
from mmdit.kernels.compiled import compile_blocks
from mmdit.kernels.onednn import by_onednn
from mmdit.kernels.quantise import quantised, rounded, scales
from mmdit.memory.empty import emptied
from mmdit.memory.meter import peak_bytes
from mmdit.memory.residency import Mode
from mmdit.model import MMDiT
from mmdit.prepared import Prepared
from mmdit.recompute import checkpointed, recomputed
from mmdit.variants import PLAIN, Variant, config_json
from weights import published

WIDTHS = {"clip_l": CLIP_L.hidden_size, "clip_g": CLIP_G.hidden_size}  # of the demo, pooled vectors and features alike
EXACT, ROUNDED = 1e-5, 0.05  # relative errors: of float32, of 8 bits and bfloat16


def pooled_size(variant: Variant) -> int:
    """Of the demo's encoders that a variant has; a variant with others says so itself."""
    widths = [WIDTHS[name] for name in variant.encoders if name in WIDTHS]
    return sum(widths) or MMDIT.pooled_size


class WrongError(AssertionError):
    """What is wrong, in a line."""


def built(variant: Variant, seed: int = 0) -> MMDiT:
    """At the demo's size, every parameter random, so that nothing begins as a no-op."""
    torch.manual_seed(seed)
    numbers: dict[str, Any] = {f.name: getattr(MMDIT, f.name) for f in fields(MMDIT)}
    numbers["pooled_size"] = pooled_size(variant)
    model = variant.build(variant.config(**numbers))
    for tensor in model.state_dict().values():
        nn.init.normal_(tensor, std=0.5 / max(tensor[0].numel() if tensor.ndim else 1, 1) ** 0.5)
    return model.eval()


def inputs(model: MMDiT, batch: int = 2, rows: int = 8, columns: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latent, sigma, context and pooled."""
    generator = torch.Generator().manual_seed(batch)
    config = model.config
    shapes = ((config.in_channels, rows, columns), (30, config.context_size), (config.pooled_size,))
    latent, context, pooled = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return latent, torch.full((batch,), 0.7), context, pooled


def error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise WrongError(f"shape {list(found.shape)}, expected {list(expected.shape)}")
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def near(found: Tensor, expected: Tensor, most: float) -> str:
    e = error(found, expected)
    if not e <= most:
        raise WrongError(f"relative error {e:.2g}, at most {most:g} is allowed")
    return f"relative error {e:.1g}"


# ---- the checks: each returns what to say, or raises -----------------------------------------------


def parameters(variant: Variant) -> str:
    """Which tensors are new, missing or of another shape beside the published architecture's."""
    ours, base = ({n: list(t.shape) for n, t in built(v).state_dict().items()} for v in (variant, PLAIN))
    new, gone = [n for n in ours if n not in base], [n for n in base if n not in ours]
    other = [n for n in ours if n in base and ours[n] != base[n]]
    counts = [sum(torch.Size(s).numel() for n, s in shapes.items()) for shapes in (ours, base)]
    told = [f"{len(n)} {word} ({n[0]}{', ...' if n[1:] else ''})"
            for n, word in ((new, "new"), (gone, "missing"), (other, "of another shape")) if n]  # fmt: skip
    return f"{counts[0]:,} numbers in tensors, base {counts[1]:,}; {'; '.join(told) or 'the same tensors'}"


def gradients(variant: Variant) -> str:
    model = built(variant)
    model(*inputs(model)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    broken = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    if broken:
        raise WrongError(f"gradients that are not finite: {', '.join(broken[:3])}")
    last = f"joint_blocks.{model.config.depth - 1}.context_block"  # whose queries nothing asks
    silent = [n for n in silent if not (n.startswith(last) and ("ln_q" in n or "qkv" in n))]
    if silent:
        raise WrongError(f"no gradient reaches {', '.join(silent[:3])}{', ...' if silent[3:] else ''}")
    try:
        deepcopy(model)
    except RuntimeError as error:
        raise WrongError(f"after a step no copy can be made, as training makes them: {str(error)[:60]}") from None
    return f"reach all of {len(list(model.parameters()))} parameters"


def subjects(variant: Variant) -> str:
    """Gradients to the latents with blocks computed again on the way back, as `--focus` and its adapters need them."""
    model = built(variant).requires_grad_(False)
    latent, *rest = inputs(model)
    found = []
    for again in (nullcontext(), recomputed(model, {}), checkpointed(model)):
        leaf = latent.clone().requires_grad_()
        with again:
            found.append(torch.autograd.grad(model(leaf, *rest).square().sum(), leaf)[0])
    near(found[1], found[0], EXACT)
    return near(found[2], found[0], EXACT)


@torch.no_grad()
def sampling(variant: Variant) -> str:
    """What is remembered before the loop, and the whole, give the same."""
    model = built(variant)
    latent, sigma, context, pooled = inputs(model)
    expected = model(latent, sigma, context, pooled)
    for sigmas in ((), (1.0, 0.7, 0.2)):
        said = near(Prepared(model, context, pooled, sigmas)(latent, 0.7, (0, 1)), expected, EXACT)
    return said


@torch.no_grad()
def batches(variant: Variant) -> str:
    model = built(variant)
    latent, sigma, context, pooled = inputs(model, 3)
    together = model(latent, sigma, context, pooled)
    alone = [model(*(t[i : i + 1] for t in (latent, sigma, context, pooled))) for i in (2, 0, 1)]
    return near(torch.cat([alone[1], alone[2], alone[0]]), together, EXACT)


@torch.no_grad()
def sizes(variant: Variant) -> str:
    model = built(variant)
    for rows, columns in ((2, 2), (6, 14), (16, 16)):
        if not bool(model(*inputs(model, 1, rows, columns)).isfinite().all()):
            raise WrongError(f"NaN or infinity at {rows}x{columns}")
    return "2x2 to 16x16 cells of a latent"


@torch.no_grad()
def fast(variant: Variant) -> str:
    """Compiled blocks by PyTorch's tracer, and the CPU's faster forms in bfloat16."""
    model, other = built(variant), built(variant)
    compile_blocks(other, backend="eager")
    near(other(*inputs(other)), model(*inputs(model)), EXACT)
    half, fused = built(variant).bfloat16(), built(variant).bfloat16()
    by_onednn(fused)
    given = [t if i == 1 else t.bfloat16() for i, t in enumerate(inputs(model))]
    return near(fused(*given), half(*given), ROUNDED)


@torch.no_grad()
def eight_bits(variant: Variant) -> str:
    model, small = built(variant), built(variant)
    quantised(small, "int8")
    state, layers = model.state_dict(), 0
    for name, tensor in small.state_dict().items():
        if name.endswith("weight_scale"):
            weight = state[name.removesuffix("_scale")]
            tensor.copy_(scales(weight, torch.int8))
            small.state_dict()[name.removesuffix("_scale")].copy_(rounded(weight, tensor, torch.int8))
            layers += 1
        elif name in state and tensor.dtype == state[name].dtype:
            tensor.copy_(state[name])
    return f"{layers} layers, {near(small(*inputs(small)), model(*inputs(model)), ROUNDED)}"


def memory(variant: Variant, folder: Path) -> str:
    """The planner's figures against the meter's, of a run of ten steps with weights that come block by block."""
    pipe = Pipeline.load(folder, variant=name_of(variant), dtype="fp32", t5="off")
    job = pipe.job(pipe.settings.resolved(pipe.defaults))._replace(steps=10)
    activations = pipe.planner.costs.activations
    predicted = activations.table("transformer", job, 1) + activations.denoising("transformer", job, 1)
    model, config = emptied(pipe.transformer), pipe.transformer.config

    def run() -> None:
        with torch.device("meta"):
            context = torch.empty(2, activations._context(job), config.context_size)
            prepared = Prepared(model, context, torch.empty(2, config.pooled_size), [i / 10 for i in range(1, 11)])
            prepared(torch.empty(2, config.in_channels, job.rows, job.columns), 0.1, (0, 1))

    metered = peak_bytes(run)
    if not 0.9 <= predicted / metered <= 1.1:
        raise WrongError(f"{predicted / 1e6:.2f} MB predicted, {metered / 1e6:.2f} MB metered")
    return f"{predicted / 1e6:.2f} MB predicted, {metered / 1e6:.2f} MB metered"


def saved(variant: Variant, folder: Path) -> str:
    """Saved and loaded again it is the same; without the variant it is refused."""
    model = built(variant)
    own = {"dtype": "fp32", "t5": "off", "device": "cpu"}  # where the model is that it is compared with
    pipe = Pipeline.load(folder, variant=name_of(variant), editable=True, **own)
    found, expected = pipe.transformer.state_dict(), model.state_dict()
    if found.keys() != expected.keys():
        raise WrongError(f"other tensors: {', '.join(sorted(found.keys() ^ expected.keys())[:3])}")
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    if wrong:
        raise WrongError(f"other values: {', '.join(wrong[:3])}")
    with torch.no_grad():
        return near(pipe.transformer(*inputs(model)), model(*inputs(model)), EXACT)


def plans(variant: Variant, folder: Path) -> str:
    """Drawn with weights that stay, come for a while, and come block by block."""
    found = []
    for mode in Mode:
        pipe = Pipeline.load(folder, variant=name_of(variant), dtype="fp32", t5="off")
        modes = dict.fromkeys(pipe.residency.networks, Mode.STAGED) | {"transformer": mode}
        pipe.planner.ladder = lambda modes=modes: [modes]  # pyright: ignore[reportAttributeAccessIssue]
        trace: dict[str, Tensor] = {}
        asked = {"prompt": "a horse", "width": 64, "height": 64, "steps": 3}
        pipe.run(pipe.asked(asked), trace)
        found.append(trace["latents.2"])
    near(found[1], found[0], EXACT)
    return near(found[2], found[0], EXACT)


CHECKS: list[tuple[str, Callable[..., str], bool]] = [
    ("tensors", parameters, False),
    ("gradients", gradients, False),
    ("gradients to the latents", subjects, False),
    ("sampling is training", sampling, False),
    ("a batch is its singles", batches, False),
    ("sizes", sizes, False),
    ("saved and loaded", saved, True),
    ("every plan", plans, True),
    ("compiled and fused", fast, False),
    ("in 8 bits", eight_bits, False),
    ("memory", memory, True),
]


def name_of(variant: Variant) -> str:
    return str(variant.file) if variant.file and variant.module.startswith("variant_") else variant.module


@contextmanager
def folder_of(variant: Variant) -> Iterator[Path]:
    """The demo with this transformer in the place of its own."""
    folder = Path(tempfile.mkdtemp(prefix="variant-"))
    try:
        save_model(built(variant), folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_model(model: MMDiT, folder: Path, **defaults: float) -> None:
    """As a model's folder that `mmdit.run` draws with; all but the transformer is the demo's, linked where that can be.

    The transformer's tensors have the names that the model itself gives them. defaults: settings of its own.
    """
    own, linked = folder / "transformer", DEMO.stat().st_dev == folder.stat().st_dev
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(
        DEMO, folder, dirs_exist_ok=True, ignore=lambda path, _: ["transformer"] if Path(path) == DEMO else [],
        copy_function=linked_file if linked else shutil.copy2,
    )  # fmt: skip
    own.mkdir()
    published.write_json(own / "config.json", config_json(model))
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, own / f"{published.STEMS['transformer']}.safetensors", metadata={"format": "pt"})
    if defaults:
        known = json.loads((DEMO / "mmdit.json").read_text())
        (folder / "mmdit.json").unlink(missing_ok=True)
        published.write_json(folder / "mmdit.json", known | defaults)


def linked_file(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    os.link(source, target)


def checked(variant: Variant) -> Iterator[tuple[str, bool, str]]:
    """Name, whether it holds, and what to say, of each check."""
    with folder_of(variant) as folder:
        for name, check, needs_folder in CHECKS:
            try:
                yield name, True, check(variant, folder) if needs_folder else check(variant)
            except Exception as failure:  # whatever a variant's code raises is what is to be told
                kind = "" if isinstance(failure, WrongError) else f"{type(failure).__name__}: "
                yield name, False, f"{kind}{' '.join(str(failure).split())[:300]}"


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", metavar="FILE|MODULE", help="that registers it")
    args = parser.parse_args(arguments)
    try:
        variant = variants.load(args.variant)
    except SettingsError as error:
        parser.error(str(error))
    good = True
    for name, holds, said in checked(variant):
        good &= holds
        print(f"{'ok  ' if holds else 'FAIL'}  {name}: {said}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
