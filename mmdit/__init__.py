"""The transformer and the driver of an inference engine for Stable Diffusion 3.5 Medium.

`from mmdit import Pipeline` loads the driver, and with it every part; the transformer alone (`mmdit.model`) loads no
tokenizer, autoencoder or weights.
"""

from typing import TYPE_CHECKING

from mmdit.common.lazy import lazy

if TYPE_CHECKING:
    from mmdit.driver.pipeline import Pipeline
    from mmdit.driver.settings import Settings

__all__ = ["Pipeline", "Settings"]
__getattr__ = lazy(__name__, {"driver.pipeline": ["Pipeline"], "driver.settings": ["Settings"]})
