"""Textual inversion: words that stand for trained vectors (Gal et al. 2022, https://arxiv.org/abs/2208.01618)."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Words:
    """The words of one CLIP that stand for vectors."""

    def __init__(self, vectors: Mapping[str, Tensor]) -> None:
        """vectors: for each word, there is one at least, as many as it stands for, `(n, D)`, in place of embeddings."""
        self.table = torch.cat(list(vectors.values()))  # (N, D)
        ends = torch.tensor([len(some) for some in vectors.values()]).cumsum(0).tolist()
        self._rows = [range(end - len(some), end) for end, some in zip(ends, vectors.values())]
        # The longest first: of two that begin alike the whole word counts. A hyphen belongs to a word.
        order = sorted(range(len(vectors)), key=lambda i: -len([*vectors][i]))
        self._order, words = order, "|".join(f"({re.escape([*vectors][i])})" for i in order)
        self._pattern = re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.IGNORECASE)

    def split(self, text: str) -> Iterator[tuple[int, int, range | None]]:
        """The text's parts, where they begin and end; of a word, whatever its case, its rows of the table."""
        at = 0
        for found in self._pattern.finditer(text):
            yield at, found.start(), None
            assert found.lastindex
            yield *found.span(), self._rows[self._order[found.lastindex - 1]]
            at = found.end()
        yield at, len(text), None
