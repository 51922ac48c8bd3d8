"""SwiGLU and RMS norm at once: how variants are combined."""

from benchmarks.variants.rmsnorm import rmsnorm
from benchmarks.variants.swiglu import swiglu
from mmdit.model import MMDiT
from mmdit.variants import variant


@variant("swiglu_rmsnorm")
def swiglu_rmsnorm(model: MMDiT) -> None:
    swiglu(model)
    rmsnorm(model)
