"""SwiGLU and RMS norm at once: the best combination so far (results/leaderboard-*.md), to start from."""

from benchmarks.variants.rmsnorm import rmsnorm
from benchmarks.variants.swiglu import swiglu
from mmdit.model import MMDiT
from mmdit.variants import variant


@variant("recipe")
def recipe(model: MMDiT) -> None:
    swiglu(model)
    rmsnorm(model)
