"""From settings to what is encoded for a picture: its texts, and the lengths of their contexts."""

from dataclasses import replace
from typing import Any, NamedTuple

from mmdit.common.errors import SettingsError
from mmdit.driver.sampling import prompts_of
from mmdit.driver.settings import Settings
from samplers import NEGATIVE, PROMPT
from text_encoders import EncodesText, Prompt, TextEncoder
from text_encoders.prompts import ENCODERS, prompt


class Text(NamedTuple):
    """A text, with all that its encoding depends on."""

    prompt: str | Prompt  # a plain one is its text
    t5_length: int  # tokens
    chunks: int = 1  # of CLIP's tokens


def texts_of(s: Settings) -> dict[str, Text]:
    """What is encoded for a picture, by its part in guidance."""
    length, chunks = lengths_of(s)
    every = {name: prompt(text, s.own(name), s.emphasis) for name, text in prompts_of(s).items()}
    return {name: Text(text, length, chunks) for name, text in every.items()}


def lengths_of(s: Settings) -> tuple[int, int]:
    """T5's tokens and the chunks of CLIP's, the same for all texts of a picture."""
    length = s.t5_tokens or s.t5_length
    assert length
    return length, s.clip_chunks or 1


def context_length(reader: EncodesText, t5_length: int, chunks: int = 1) -> int:
    """Tokens of a text's context."""
    return reader.length(t5_length, **in_chunks(chunks))


def in_chunks(chunks: int) -> dict[str, Any]:
    """The argument of a text encoder where there is more than one: those that know of no chunks are not asked."""
    return {} if chunks == 1 else {"chunks": chunks}


def fitted(s: Settings, reader: EncodesText) -> Settings:
    """With the lengths that the longest of a picture's texts needs, where long prompts are to be read whole.

    Raises SettingsError for what this model's text encoders cannot read.
    """
    if not isinstance(reader, TextEncoder):
        own = (f"{role}_{encoder}" for role in (PROMPT, NEGATIVE) for encoder in ENCODERS)
        for name in (*own, "emphasis", "long_prompts"):
            if getattr(s, name) not in (None, False):
                raise SettingsError(f"{name}: the model's variant reads texts in a way of its own")
        return s
    for role in (PROMPT, NEGATIVE):
        for encoder, text in zip(ENCODERS, s.own(role)):
            # Without T5 its texts wait for a run with it.
            if text is not None and encoder != "t5" and encoder not in reader.clips:
                raise SettingsError(f"{role}_{encoder}: the model has no {encoder}")
    if not s.long_prompts:
        return s if s.clip_chunks is s.t5_tokens is None else replace(s, clip_chunks=None, t5_tokens=None)
    assert s.t5_length
    chunks, t5 = reader.needs([text.prompt for text in texts_of(s).values()])
    return replace(s, clip_chunks=chunks, t5_tokens=max(t5, s.t5_length))
