"""The transformer and the driver of an inference engine for Stable Diffusion 3.5 Medium.

`from mmdit import Pipeline` loads the driver, and with it every part; the transformer alone (`mmdit.model`) loads no
tokenizer, autoencoder or weights.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdit.driver.pipeline import Pipeline
    from mmdit.driver.settings import Settings

__all__ = ["Pipeline", "Settings"]


def __getattr__(name: str) -> Any:
    # On demand, so that `import mmdit.model` does not load tokenizers and autoencoder.
    if name == "Pipeline":
        from mmdit.driver.pipeline import Pipeline

        return Pipeline
    if name == "Settings":
        from mmdit.driver.settings import Settings

        return Settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
