"""What a user may say of where and how the networks are computed."""

from dataclasses import dataclass

from mmdit.common.options import Mark, option

ATTENTIONS = ("auto", "sdpa", "cores", "flash", "xformers", "cudnn", "math")  # those of mmdit.attention


@dataclass(frozen=True)
class ComputeOptions:
    """How it is computed"""

    device: str = option(
        "auto", "where to compute", Mark.LOADED, Mark.NOT_SEEN, choices=("auto", "cpu", "cuda", "mps")
    )  # fmt: skip
    dtype: str = option(
        "auto", "number format of the weights", Mark.LOADED, choices=("auto", "bf16", "fp16", "fp32")
    )  # fmt: skip
    quantise: str = option(
        "none",
        "the transformer's blocks in 8 bits: half their memory, another picture",
        Mark.LOADED,
        choices=("none", "int8", "fp8"),
    )
    attention: str = option("auto", "who computes attention; auto: the fastest that is there", choices=ATTENTIONS)
    compile: bool = option(
        False, "compile the transformer: the first steps wait, later ones and other runs gain", Mark.LOADED
    )
