"""Every device, number format and T5 mode draws, near to the float32 picture of the CPU."""

from pathlib import Path

import pytest
import torch
from reference import relative_error
from sweeps import sampled
from torch import Tensor
from toys import toy_folder

from mmdit import Pipeline, Settings

# Measured on CPUs, with AMX and with AVX2 alone: 0, at most 0.0014 and at most 0.0111. A third or so is left for other
# processors and GPUs. Without T5 a picture is 0.045 off.
NEAR = {"fp32": 1e-4, "fp16": 0.002, "bf16": 0.015}
cuda = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    defaults = {"width": 96, "height": 64, "steps": 3, "cfg": 3.0, "t5_length": 20}
    return toy_folder(tmp_path_factory.mktemp("modes"), defaults=defaults)


def latents(folder: Path, t5: str, dtype: str, device: str, **settings: float) -> tuple[Pipeline, dict[str, Tensor]]:
    pipeline, trace = Pipeline.load(folder, t5=t5, dtype=dtype, device=device), {}
    own = Settings(prompt="a horse", model=str(folder), t5=t5, dtype=dtype, device=device, **settings)  # type: ignore[arg-type]
    pipeline.run(own, trace)
    return pipeline, trace


@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("dtype", sampled(NEAR, 2))
@pytest.mark.parametrize("t5", ["on", "off", "omit"])
def test_it_draws(folder: Path, t5: str, dtype: str, device: str) -> None:
    pipeline, trace = latents(folder, t5, dtype, device)
    _, exact = latents(folder, t5, "fp32", "cpu")
    assert relative_error(trace["latents.2"], exact["latents.2"]) <= NEAR[dtype]
    assert all(tensor.device.type == "cpu" for tensor in trace.values())
    assert torch.equal(trace["noise"], exact["noise"])
    # What overflows in float16 computes in another format.
    narrow = dtype == "fp16"
    if pipeline.text.t5 is not None:
        assert pipeline.text.t5.shared.weight.dtype == (torch.bfloat16 if narrow else pipeline.dtype)
    assert pipeline.vae.decoder.conv_in.weight.dtype == (torch.float32 if narrow else pipeline.dtype)
    assert pipeline.transformer.context_embedder.weight.dtype == pipeline.dtype


def test_guidance_0_draws_the_negative_and_1_the_prompt(folder: Path) -> None:
    """cfg 0 with a negative prompt equals cfg 1 with that text as the prompt."""
    _, none = latents(folder, "on", "fp32", "cpu", cfg=0)
    pipeline, trace = Pipeline.load(folder, dtype="fp32", device="cpu"), {}
    pipeline.run(Settings(prompt="", model=str(folder), dtype="fp32", device="cpu", cfg=1.0), trace)
    assert relative_error(none["latents.2"], trace["latents.2"]) <= 1e-5
    _, guided = latents(folder, "on", "fp32", "cpu", cfg=1)
    assert relative_error(guided["latents.2"], trace["latents.2"]) > 1e-3


@pytest.mark.parametrize("count", [1, 3])
def test_guidance_in_an_interval_is_the_prompt_alone_outside_it(folder: Path, count: int) -> None:
    """Of three steps, at shares of noise 1, 0.75 and 0.009, the second is guided; step by step by both velocities."""
    pipeline, trace = latents(folder, "on", "fp32", "cpu", cfg_interval="0.5:0.9", count=count)
    cond, uncond = (pipeline.encode([text], 20) for text in ("a horse", ""))
    alone, guided = pipeline.velocity(cond, count=count), pipeline.velocity(cond, uncond, 3.0, count)
    x, sigmas = trace["noise"], trace["sigmas"]
    assert [0.5 <= float(s) <= 0.9 for s in sigmas[:-1]] == [False, True, False]
    for i, velocity in enumerate((alone, guided, alone)):
        with torch.no_grad():
            x = x + (sigmas[i + 1] - sigmas[i]) * velocity(x, sigmas[i])
        assert relative_error(trace[f"latents.{i}"], x) <= 1e-5


def test_texts_in_one_pass_are_the_texts_alone(folder: Path) -> None:
    pipeline = Pipeline.load(folder, dtype="fp32", device="cpu")
    both = pipeline.encode(["a horse", "a bear"], 20)
    for i, text in enumerate(("a horse", "a bear")):
        alone = pipeline.encode([text], 20)
        assert relative_error(both.context[i], alone.context[0]) <= 1e-6
        assert relative_error(both.pooled[i], alone.pooled[0]) <= 1e-6


def test_running_out_of_device_memory_is_the_users_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a second try by the next smaller plan, which is said aloud."""
    pipeline = Pipeline.load(folder, device="cpu")

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mmdit.driver.stages.decode_in_strips", fail)
    with (
        pytest.warns(
            UserWarning, match=r"^decode: memory ran out; trying again with less: .* in strips of \d+ latent rows"
        ),
        pytest.raises(ValueError, match=r"^decode: the device's memory does not suffice; try --quantise int8"),
    ):
        pipeline("a horse")


def test_pixels_are_rounded_to_the_nearest_level(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels 10.4, 10.6 and what lies outside, written out."""
    pipeline = Pipeline.load(folder, device="cpu", dtype="fp32")
    levels = torch.tensor([10.4, 10.6, -3.0, 300.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    monkeypatch.setattr(pipeline.vae, "decode", lambda _: levels / 127.5 - 1)
    assert pipeline.decode(torch.zeros(1, 16, 1, 1))[0, 0, :, 0].tolist() == [10, 11, 0, 255]
