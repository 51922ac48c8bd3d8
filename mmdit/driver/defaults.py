"""How each model of the family is best run, told from its architecture.

Values: SD3.5-Medium in `settings`; SD3-Medium as diffusers' StableDiffusion3Pipeline, which was written for it, has
them by default; SD3.5-Large as Stability AI's sd3_infer.py (CONFIGS).
"""

from typing import Any

from mmdit.config import MMDiTConfig
from mmdit.driver.settings import SD35_MEDIUM_DEFAULTS

SD3_MEDIUM_DEFAULTS: dict[str, Any] = {**SD35_MEDIUM_DEFAULTS, "cfg": 7.0}
SD35_LARGE_DEFAULTS: dict[str, Any] = {**SD35_MEDIUM_DEFAULTS, "steps": 40, "cfg": 4.5}


def default_settings(config: MMDiTConfig) -> dict[str, Any]:
    """Width, height, steps, cfg and t5_length for a model of this shape.

    Large-Turbo has the very shape of Large, and its own settings (4 steps, cfg 1) have to be given.
    """
    if not config.qk_norm:
        return dict(SD3_MEDIUM_DEFAULTS)
    return dict(SD35_MEDIUM_DEFAULTS if config.dual_attention_blocks else SD35_LARGE_DEFAULTS)
