"""From prompts to what the transformer is conditioned on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from text_encoders.clip import CLIPTextEncoder
from text_encoders.inversion import Words
from text_encoders.prompts import NAMES, Prompt
from text_encoders.t5 import T5Encoder
from text_encoders.tokenizers import CLIPTokenizer, Read, T5Tokenizer, TokenizerError, Tokens


@dataclass
class Conditioning:
    """A batch of prompts, encoded."""

    context: Tensor  # (B, n, W), the sequence that the transformer attends to beside the image
    pooled: Tensor  # (B, P), the vector that modulates its blocks
    tokens: dict[str, Tensor]  # ids (B, n) int64 by encoder: "clip_l", "clip_g" and, where T5 ran, "t5"; -1 and below
    # are vectors of textual inversions

    def __getitem__(self, rows: slice) -> Conditioning:
        """Some of the prompts."""
        return Conditioning(self.context[rows], self.pooled[rows], {n: ids[rows] for n, ids in self.tokens.items()})


class EncodesText(Protocol):
    """What the driver asks of whoever reads prompts."""

    width: int  # W, of a token of the context

    def length(self, t5_length: int) -> int:
        """Tokens of a text's context. t5_length: the user's setting, for those who heed it."""
        ...

    def encode(self, texts: list[str], t5_length: int) -> Conditioning:
        """Contexts (B, length, width) and pooled vectors (B, P) of prompts."""
        ...


@dataclass
class TextEncoder:
    """CLIPs and T5 with their tokenizers, as Stable Diffusion 3 combines them; one CLIP at least.

    Without T5 the published pipelines disagree, and their images differ: zeros are not neutral, because
    the transformer attends to them.
    """

    tokenizer_l: CLIPTokenizer | None
    tokenizer_g: CLIPTokenizer | None
    tokenizer_t5: T5Tokenizer | None
    clip_l: CLIPTextEncoder | None
    clip_g: CLIPTextEncoder | None
    t5: T5Encoder | None
    t5_mode: str = "on"  # "off": zeros in place of T5's tokens (diffusers); "omit": no tokens (ComfyUI)
    t5_length: int = 256  # T5's tokens, or its zeros, where a call does not say
    width: int = 4096  # W, the transformer's context width
    warn: Callable[[str], object] = warnings.warn  # gets one line for every end of a prompt that was cut off
    words: dict[str, Words] = field(default_factory=dict)  # that stand for vectors, by encoder

    @property
    def clips(self) -> dict[str, tuple[CLIPTokenizer, CLIPTextEncoder]]:
        """Those that are there, L before G."""
        every = {"clip_l": (self.tokenizer_l, self.clip_l), "clip_g": (self.tokenizer_g, self.clip_g)}
        return {name: (t, m) for name, (t, m) in every.items() if t is not None and m is not None}

    def length(self, t5_length: int, chunks: int = 1) -> int:
        """Tokens of a text's context: CLIP's in so many chunks, which lie side by side, and T5's."""
        clip = max(clip.config.max_length for _, clip in self.clips.values())
        return chunks * clip + t5_length * (self.t5_mode != "omit")

    def column(self, encoder: str, token: int, t5_length: int, chunks: int = 1) -> int | None:
        """Where in a text's context this one of the tokens that an encoder reads is; None where it is cut off."""
        if encoder == "t5":
            assert self.tokenizer_t5 is not None
            tokenizer, length, count, first = self.tokenizer_t5, t5_length, 1, self.length(0, chunks)
        else:
            tokenizer, clip = self.clips[encoder]
            length, count, first = clip.config.max_length, chunks, 0
        chunk, row = divmod(token, tokenizer.room(length))
        return first + chunk * length + len(tokenizer.start) + row if chunk < count else None

    def needs(self, texts: Sequence[str | Prompt]) -> tuple[int, int]:
        """The chunks of CLIP's tokens, from 1, and T5's tokens, 0 where it does not run, that hold all of them.

        Raises TokenizerError for a prompt that is not valid Unicode.
        """
        prompts, chunks, t5 = list(map(as_prompt, texts)), 1, 0
        for name, (tokenizer, clip) in self.clips.items():
            longest = max(len(read.ids) for read in self.read(name, prompts))
            chunks = max(chunks, -(-longest // tokenizer.room(clip.config.max_length)))
        if self.t5_mode == "on" and self.tokenizer_t5 is not None:
            frame = len(self.tokenizer_t5.start) + len(self.tokenizer_t5.end)
            t5 = max(len(read.ids) for read in self.read("t5", prompts)) + frame
        return chunks, t5

    def encode(self, texts: Sequence[str | Prompt], t5_length: int | None = None, chunks: int = 1) -> Conditioning:
        """Encode prompts, each module on its device and in its dtype. t5_length: T5's tokens, if not as many as usual.

        chunks: of 77 tokens, each encoded on its own with start and end of its own; their features lie side by side in
        the context, and the pooled vector is the first one's, as in ComfyUI. A prompt that needs fewer has those of the
        empty prompt behind it, so that all contexts are of one length and none holds what no encoder gave.

        Returns context (B, 77 chunks + t5_length, W), or (B, 77 chunks, W) with T5 omitted, and pooled (B, P), in the
        dtype and on the device of CLIP's output. Raises ValueError for mode "on" without a T5, for an
        unknown mode, and for a T5 in float16; SettingsError for a weight that is too large.
        """
        if self.t5_mode not in ("on", "off", "omit"):
            raise ValueError(f"t5_mode is {self.t5_mode!r}, not 'on', 'off' or 'omit'")
        t5_length = self.t5_length if t5_length is None else t5_length
        prompts, batches = list(map(as_prompt, texts)), dict[str, Tokens]()
        for name, (tokenizer, clip) in self.clips.items():
            batches[name] = tokenizer.framed(self.read(name, prompts), clip.config.max_length, chunks)
        if self.t5_mode == "on":
            if self.t5 is None or self.tokenizer_t5 is None:
                raise ValueError("t5_mode is 'on' but there is no T5; 'off' and 'omit' go without")
            batches["t5"] = self.tokenizer_t5.framed(self.read("t5", prompts), t5_length)
        for name, batch in batches.items():
            check_ids(batch.ids, getattr(self, name).config.vocab_size, name)
        warn_of_cuts(batches, self.warn)
        clips = [self.encode_clip(name, batches[name]) for name in self.clips]
        t5 = self.encode_t5(batches.get("t5"), len(prompts), t5_length)
        return Conditioning(*join(clips, t5, self.width), {name: batch.ids for name, batch in batches.items()})

    def read(self, encoder: str, prompts: Sequence[Prompt]) -> list[Read]:
        """What one of the encoders reads of prompts; words of textual inversions are plain words to others."""
        tokenizer = self.tokenizer_t5 if encoder == "t5" else self.clips[encoder][0]
        assert tokenizer is not None
        words = self.words.get(encoder)
        return [tokenizer.read(*prompt.of(encoder), words) for prompt in prompts]

    def encode_clip(self, name: str, batch: Tokens) -> tuple[Tensor, Tensor]:
        """A CLIP's features (B, chunks n, D), weighted, and the pooled vectors of the first chunks (B, P)."""
        tokenizer, clip = self.clips[name]
        length, count = clip.config.max_length, len(batch.ids)
        ids = batch.ids.reshape(-1, length)  # (B chunks, n)
        rows = ids if batch.weights is None else torch.cat([ids, tokenizer([""], length).ids])
        vectors = (self.words[name].table,) if bool((ids < 0).any()) else ()
        hidden, pooled = clip(rows, *vectors)
        if batch.weights is not None:
            hidden = emphasised(hidden[:-1], hidden[-1], batch.weights.reshape(-1, length))
        return hidden.reshape(count, -1, hidden.shape[-1]), pooled[: len(ids) : batch.ids.shape[1] // length]

    def encode_t5(self, batch: Tokens | None, count: int, length: int) -> Tensor | None:
        """T5's part of the context (B, length, W): its output, weighted, or zeros, or none, by `t5_mode`."""
        if batch is None:
            return torch.zeros(count, length, self.width) if self.t5_mode == "off" else None
        assert self.t5 is not None and self.tokenizer_t5 is not None
        if batch.weights is None:
            return self.t5(batch.ids)
        hidden = self.t5(torch.cat([batch.ids, self.tokenizer_t5([""], length).ids]))
        return emphasised(hidden[:-1], hidden[-1], batch.weights)


def as_prompt(text: str | Prompt) -> Prompt:
    return text if isinstance(text, Prompt) else Prompt(text)


def emphasised(hidden: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Features as strong as their tokens' weights say: empty + weight (hidden - empty), ComfyUI's rule (sd1_clip.py).

    hidden: (B, n, D); empty: (n, D), the empty prompt's, token by token; weights: (B, n). Pooled vectors have no
    weights. A token of weight 1 keeps its features bit by bit; at 0 it is what the empty prompt has in its place.
    """
    weights = weights[..., None].to(hidden.device)  # (B, n, 1), float32
    moved = empty.float() + weights * (hidden.float() - empty.float())
    return torch.where(weights == 1, hidden, moved.to(hidden.dtype))


def join(clips: Sequence[tuple[Tensor, Tensor]], t5: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Combine the encoders' outputs: Esser et al. 2024 (https://arxiv.org/abs/2403.03206), figure 2.

    clips: of each CLIP, L before G, features (B, n, D) and pooled vectors (B, P); t5: features (B, m, width) or None.
    CLIP's features lie side by side on the channels, filled with zeros up to `width`; T5's tokens follow
    them. Returns the context (B, n + m, width) and the pooled vectors side by side, in
    CLIP's dtype and on its device. Raises ValueError where CLIP's channels exceed `width` or T5's miss it.
    """
    context = torch.cat([hidden for hidden, _ in clips], dim=-1)  # (B, n, D_l + D_g)
    pooled = torch.cat([vector for _, vector in clips], dim=-1)  # (B, P_l + P_g)
    if context.shape[-1] > width:
        raise ValueError(f"CLIP's {context.shape[-1]} channels exceed the context width of {width}")
    context = F.pad(context, (0, width - context.shape[-1]))  # (B, n, W)
    if t5 is None:
        return context, pooled
    if t5.shape[-1] != width:
        raise ValueError(f"T5's width of {t5.shape[-1]} is not the context width of {width}")
    return torch.cat([context, t5.to(context)], dim=-2), pooled  # (B, n + m, W), (B, P)


def check_ids(ids: Tensor, rows: int, name: str) -> None:
    if ids.numel() and int(ids.max()) >= rows:
        raise TokenizerError(
            f"{name}: the prompt has token {int(ids.max())}, the model knows {rows}: are these its tokenizers?"
        )


def warn_of_cuts(batches: dict[str, Tokens], warn: Callable[[str], object]) -> None:
    """One line for every end of a prompt that was cut off, naming all the encoders that lost this end."""
    for i in range(max(len(batch.lost) for batch in batches.values())):
        losers: dict[tuple[str, int], list[str]] = {}
        for key, batch in batches.items():
            lost, length = shortened(" ".join(batch.lost[i].split())), batch.ids.shape[1]
            if lost:
                losers.setdefault((lost, length), []).append(NAMES[key])
        for (lost, length), encoders in losers.items():
            told = f'prompt too long for the {length} tokens of {" and ".join(encoders)}, which lost "{lost}"'
            warn(f"{told}: --long-prompts reads all of it")


def shortened(text: str) -> str:
    """Both ends of a text that is too long for a line."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


_SHOWN = 300
