"""What `benchmarks.speed` compares: a guided step by each."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """Of one guided step, in float32 on the CPU."""

    latent: Tensor  # (count, C, h, w)
    context: Tensor  # (2, M, context_size), of the prompt and of the negative prompt
    pooled: Tensor  # (2, pooled_size)
    sigma: Tensor

    def doubled(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Latents, contexts, pooled vectors and timesteps of both halves, as a model takes them."""
        count = len(self.latent)
        rows = [torch.cat([self.latent, self.latent]), *(t.repeat_interleave(count, 0) for t in self[1:3])]
        return [t.to(device, dtype) for t in rows] + [(1000 * self.sigma).expand(2 * count).to(device)]


Step = Callable[[], object]
Maker = Callable[[Inputs], Step]


def ours(pipe: Any, inputs: Inputs) -> Step:
    """As `Pipeline.run` takes it: what is known before the loop is computed before it."""
    from mmdit.prepared import Prepared

    latent, *_ = inputs.doubled(pipe.device, pipe.dtype)
    context, pooled = (t.to(pipe.device, pipe.dtype) for t in (inputs.context, inputs.pooled))
    pipe.residency.use("transformer")
    prepared = Prepared(pipe.transformer, context, pooled, [float(inputs.sigma)])
    rows = [text for text in range(len(pooled)) for _ in inputs.latent]
    return lambda: prepared(latent, inputs.sigma, rows)


def diffusers(folder: Path, dtype: str, device: str) -> Any:
    """Its pipeline without T5."""
    from diffusers import StableDiffusion3Pipeline  # pyright: ignore[reportPrivateImportUsage]

    from mmdit.driver.loading import DTYPES

    without = {"text_encoder_3": None, "tokenizer_3": None}
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=DTYPES[dtype], **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def eager(other: Any, pipe: Any) -> Maker:
    def make(inputs: Inputs, model: Any = other.transformer) -> Step:
        latent, context, pooled, timestep = inputs.doubled(pipe.device, pipe.dtype)
        return lambda: model(latent, context, pooled, timestep, return_dict=False)[0]

    return make


def compiled(other: Any, pipe: Any) -> Maker:
    """Each of its blocks compiled, which compiles a kind of block once, on the same weights."""
    torch._dynamo.config.cache_size_limit = 64  # kinds of block times shapes: past 8 it would run uncompiled
    shared = {id(t): t for t in (*other.transformer.parameters(), *other.transformer.buffers())}
    model = copy.deepcopy(other.transformer, shared)
    for block in model.transformer_blocks:
        block.compile()

    def make(inputs: Inputs) -> Step:
        return eager(other, pipe)(inputs, model)  # pyright: ignore[reportCallIssue]

    return make


def openvino(other: Any, pipe: Any) -> Maker:
    """Converted from diffusers' transformer for one size, computing in bfloat16 where that is asked for."""

    def make(inputs: Inputs) -> Step:
        if pipe.device.type != "cpu":
            raise ValueError("runs on a CPU only")
        import openvino as ov  # pyright: ignore[reportMissingImports]

        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        given = dict(zip(names, inputs.doubled(pipe.device, pipe.dtype)))
        model = copy.copy(other.transformer)
        shapes = {name: list(t.shape) for name, t in given.items()}
        made = ov.convert_model(model, example_input=given, input=[(name, shapes[name]) for name in names])
        hint = {"INFERENCE_PRECISION_HINT": "bf16" if pipe.dtype == torch.bfloat16 else "f32"}
        request = ov.Core().compile_model(made, "CPU", hint).create_infer_request()
        arrays = [
            ov.Tensor(t.float().numpy()) if t.dtype != torch.bfloat16 else _bfloat16(ov, t) for t in given.values()
        ]
        return lambda: request.infer(dict(zip(names, arrays)))

    return make


def _bfloat16(ov: Any, tensor: Tensor) -> Any:
    found = ov.Tensor(ov.Type.bf16, ov.Shape(list(tensor.shape)))
    found.data[:] = tensor.view(torch.int16).numpy().view(found.data.dtype)
    return found


STEPS: dict[str, Callable[[Any, Any], Maker]] = {"diffusers": eager, "compiled": compiled, "openvino": openvino}
