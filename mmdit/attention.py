"""The transformer's one attention function. Another backend, a probe or a shard goes here and nowhere else."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over all tokens, without mask, scaled by 1 / sqrt(head size).

    q, k, v: `(B, N, heads, head size)`. Returns `(B, N, heads * head size)`.
    """
    q, k, v = (rearrange(t, "b n h d -> b h n d") for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
