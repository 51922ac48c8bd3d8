"""From prompts to what the transformer is conditioned on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from text_encoders.clip import CLIPTextEncoder
from text_encoders.t5 import T5Encoder
from text_encoders.tokenizers import CLIPTokenizer, T5Tokenizer, TokenizerError, Tokens


@dataclass
class Conditioning:
    """A batch of prompts, encoded."""

    context: Tensor  # (B, n, W), the sequence that the transformer attends to beside the image
    pooled: Tensor  # (B, P), the vector that modulates its blocks
    tokens: dict[str, Tensor]  # ids (B, n) int64 of "clip_l", "clip_g" and, where T5 ran, "t5"

    def __getitem__(self, rows: slice) -> Conditioning:
        """Some of the prompts."""
        return Conditioning(self.context[rows], self.pooled[rows], {n: ids[rows] for n, ids in self.tokens.items()})


@dataclass
class TextEncoder:
    """The three text encoders with their tokenizers, as Stable Diffusion 3 combines them.

    Without T5 the published pipelines disagree, and their images differ: zeros are not neutral, because
    the transformer attends to them.
    """

    tokenizer_l: CLIPTokenizer
    tokenizer_g: CLIPTokenizer
    tokenizer_t5: T5Tokenizer | None
    clip_l: CLIPTextEncoder
    clip_g: CLIPTextEncoder
    t5: T5Encoder | None
    t5_mode: str = "on"  # "off": zeros in place of T5's tokens (diffusers); "omit": no tokens (ComfyUI)
    t5_length: int = 256  # T5's tokens, or its zeros
    width: int = 4096  # W, the transformer's context width
    warn: Callable[[str], object] = warnings.warn  # gets one line for every end of a prompt that was cut off

    def encode(self, texts: list[str]) -> Conditioning:
        """Encode prompts, each module on its device and in its dtype.

        Returns context (B, 77 + t5_length, W), or (B, 77, W) with T5 omitted, and pooled (B, P), in the
        dtype and on the device of CLIP's output. Raises ValueError for mode "on" without a T5, for an
        unknown mode, and for a T5 in float16.
        """
        if self.t5_mode not in ("on", "off", "omit"):
            raise ValueError(f"t5_mode is {self.t5_mode!r}, not 'on', 'off' or 'omit'")
        batches = {
            "clip_l": self.tokenizer_l(texts, self.clip_l.config.max_length),
            "clip_g": self.tokenizer_g(texts, self.clip_g.config.max_length),
        }
        if self.t5_mode == "on":
            if self.t5 is None or self.tokenizer_t5 is None:
                raise ValueError("t5_mode is 'on' but there is no T5; 'off' and 'omit' go without")
            batches["t5"] = self.tokenizer_t5(texts, self.t5_length)
        for name, batch in batches.items():
            check_ids(batch.ids, getattr(self, name).config.vocab_size, name)
        warn_of_cuts(batches, self.warn)
        tokens = {name: batch.ids for name, batch in batches.items()}
        clip_l, clip_g = self.clip_l(tokens["clip_l"]), self.clip_g(tokens["clip_g"])
        t5 = self.encode_t5(tokens.get("t5"), len(texts))
        return Conditioning(*join(clip_l, clip_g, t5, self.width), tokens)

    def encode_t5(self, ids: Tensor | None, count: int) -> Tensor | None:
        """T5's part of the context (B, t5_length, W): its output, zeros, or none, by `t5_mode`."""
        if ids is not None:
            assert self.t5 is not None
            return self.t5(ids)
        return torch.zeros(count, self.t5_length, self.width) if self.t5_mode == "off" else None


def join(
    clip_l: tuple[Tensor, Tensor], clip_g: tuple[Tensor, Tensor], t5: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """Combine the encoders' outputs: Esser et al. 2024 (https://arxiv.org/abs/2403.03206), figure 2.

    clip_l, clip_g: features (B, n, D) and pooled vectors (B, P); t5: features (B, m, width) or None.
    CLIP's features lie side by side on the channels, filled with zeros up to `width`; T5's tokens follow
    them. Returns the context (B, n + m, width) and the pooled vectors side by side (B, P_l + P_g), in
    CLIP's dtype and on its device. Raises ValueError where CLIP's channels exceed `width` or T5's miss it.
    """
    (hidden_l, pooled_l), (hidden_g, pooled_g) = clip_l, clip_g
    context = torch.cat([hidden_l, hidden_g], dim=-1)  # (B, n, D_l + D_g)
    pooled = torch.cat([pooled_l, pooled_g], dim=-1)  # (B, P_l + P_g)
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
    names = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}
    for i in range(len(batches["clip_l"].lost)):
        losers: dict[tuple[str, int], list[str]] = {}
        for key, batch in batches.items():
            lost, length = " ".join(batch.lost[i].split()), batch.ids.shape[1]
            if lost:
                losers.setdefault((lost, length), []).append(names[key])
        for (lost, length), encoders in losers.items():
            warn(f'prompt too long for the {length} tokens of {" and ".join(encoders)}, which lost "{lost}"')
