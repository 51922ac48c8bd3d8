"""What a user may say of the texts."""

from dataclasses import dataclass
from typing import Any

from mmdit.common.options import Mark, option, wrong
from text_encoders.prompts import ENCODERS, weighted


def _check_length(name: str, value: Any) -> None:
    if not 2 <= value <= 512:
        raise wrong(name, value, "2 to 512; 77, 154, 256 and 512 are usual")


def _own(help: str) -> Any:
    return option(None, help, Mark.OWN, metavar="TEXT")


@dataclass(frozen=True)
class TextOptions:
    """How the prompt is read"""

    prompt_clip_l: str | None = _own("what CLIP-L reads in the prompt's place")
    prompt_clip_g: str | None = _own("what CLIP-G reads in the prompt's place")
    prompt_t5: str | None = _own("what T5 reads in the prompt's place")
    negative_clip_l: str | None = _own("what CLIP-L reads in the negative prompt's place")
    negative_clip_g: str | None = _own("what CLIP-G reads in the negative prompt's place")
    negative_t5: str | None = _own("what T5 reads in the negative prompt's place")
    emphasis: bool = option(
        False, r"(words), (words:1.2) and [words] weigh words, \( is a bracket, as in AUTOMATIC1111's web UI", Mark.OWN
    )
    long_prompts: bool = option(False, "read prompts of any length whole: CLIP in chunks, T5 as they are", Mark.OWN)
    embedding: tuple[str, ...] = option(
        (),
        "textual inversion for the CLIPs; the file's name without ending is its word; repeat it for more",
        Mark.LOADED,
        Mark.PATH,
        metavar="FILE",
    )
    t5: str = option(
        "on",
        "off: zeros in place of T5's tokens (as diffusers); omit: no such tokens (as ComfyUI)",
        Mark.LOADED,
        choices=("on", "off", "omit"),
    )
    t5_length: int | None = option(None, "tokens that T5 reads, 2 to 512", usual=256, metavar="N", check=_check_length)
    # Not each picture's own: contexts of pictures that are drawn together are of one length.
    clip_chunks: int | None = option(None, "chunks that a long prompt's CLIP tokens take", Mark.FOUND)
    t5_tokens: int | None = option(None, "tokens that T5 reads of a long prompt", Mark.FOUND)

    def own(self, role: str) -> tuple[str | None, ...]:
        """The texts of ENCODERS for "prompt" or "negative", None where they read the general one; else all None."""
        return tuple(getattr(self, f"{role}_{encoder}", None) for encoder in ENCODERS)

    def check_together(self) -> None:
        if self.emphasis:
            for role in ("prompt", "negative"):
                for text in (getattr(self, role, None), *self.own(role)):
                    weighted(text or "")
