"""Text encoders of Stable Diffusion 3: two CLIPs and a T5, their tokenizers, and how their outputs join."""

from typing import TYPE_CHECKING

from mmdit.common.lazy import lazy

if TYPE_CHECKING:
    from text_encoders.clip import CLIP_G, CLIP_L, CLIPConfig, CLIPTextEncoder
    from text_encoders.conditioning import Conditioning, EncodesText, TextEncoder, join
    from text_encoders.inversion import Words
    from text_encoders.prompts import Prompt
    from text_encoders.t5 import T5_XXL, T5Config, T5Encoder
    from text_encoders.tokenizers import CLIPTokenizer, Read, T5Tokenizer, TokenizerError, Tokens

__all__ = [
    "CLIP_G",
    "CLIP_L",
    "T5_XXL",
    "CLIPConfig",
    "CLIPTextEncoder",
    "CLIPTokenizer",
    "Conditioning",
    "EncodesText",
    "Prompt",
    "Read",
    "T5Config",
    "T5Encoder",
    "T5Tokenizer",
    "TextEncoder",
    "TokenizerError",
    "Tokens",
    "Words",
    "join",
]
__getattr__ = lazy(
    __name__,
    {
        "clip": ["CLIP_G", "CLIP_L", "CLIPConfig", "CLIPTextEncoder"],
        "conditioning": ["Conditioning", "EncodesText", "TextEncoder", "join"],
        "inversion": ["Words"],
        "prompts": ["Prompt"],
        "t5": ["T5_XXL", "T5Config", "T5Encoder"],
        "tokenizers": ["CLIPTokenizer", "Read", "T5Tokenizer", "TokenizerError", "Tokens"],
    },
)
