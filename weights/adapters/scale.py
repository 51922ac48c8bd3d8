"""What alpha makes of a strength: the factor s in W + strength * s * delta.

In order of precedence: PEFT's configuration (adapter_config.json, or diffusers' metadata in the file), the alpha stored
beside the tensors, else s = 1. With rank r, s is alpha / r; rsLoRA's (Kalajdzievski 2023, arXiv 2312.03732) is
alpha / sqrt(r). Alpha 0, which no trainer writes, means r, as in kohya's and LyCORIS's trainers.

References: PEFT tuners/lora/layer.py, tuners/lokr/layer.py and utils/other.py (get_pattern_key); kohya
networks/lora_flux.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weights.errors import CheckpointError

# A pattern comes from a file and is matched against every name: only what is sure to end soon is let through.
_MOST_PATTERNS, _LONGEST_PATTERN, _MOST_REPEATS, _ALL_REPEATS = 2000, 200, 2, 10
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_REPEAT = re.compile(r"[*+{]")


# PEFT's word for a kind: the name of the kind, and the word for its alpha.
PEFT_KINDS = {"LORA": ("LoRA", "lora_alpha"), "LOHA": ("LoHa", "alpha"), "LOKR": ("LoKr", "alpha")}

Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True)
class Scaling:
    """PEFT's alpha: one for all modules, and those of `alpha_pattern` for the modules it matches, the first counts.

    kind: of the adapters that it is for; rank, ranks: of LoKr's two whole factors, whose shapes tell none, likewise.
    """

    alpha: float
    patterns: Patterns = ()
    rslora: bool = False
    kind: str = "LoRA"
    rank: float | None = None
    ranks: Patterns = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "Scaling | None":
        """From a PEFT config as JSON, None where it has no alpha; CheckpointError, naming `where`, for a broken one.

        `r` and `rank_pattern` are read for LoKr alone: else the rank of each module is the shape of its tensors.
        """
        word = values.get("peft_type") or "LORA"
        if not isinstance(word, str) or word not in PEFT_KINDS:
            raise CheckpointError(f"{where}: peft_type {word!s:.40} is not supported: expected {', '.join(PEFT_KINDS)}")
        kind, alpha = PEFT_KINDS[word]
        if values.get(alpha) is None:
            return None
        rank = values.get("r") if kind == "LoKr" else None
        return cls(
            alpha=_number(values[alpha], alpha, where),
            patterns=_patterns(values, "alpha_pattern", where),
            rslora=bool(values.get("use_rslora")),
            kind=kind,
            rank=None if rank is None else _number(rank, "r", where),
            ranks=_patterns(values, "rank_pattern", where) if kind == "LoKr" else (),
        )

    def factor(self, module: str, rank: int | None) -> float:
        """s for a module of this name and rank (1 or more, None where its tensors do not tell)."""
        alpha = _matching(self.patterns, module, self.alpha)
        known = rank or _matching(self.ranks, module, self.rank or 0)
        return _factor(alpha, math.sqrt(known) if self.rslora else known, known) if known else 1.0


def _matching(patterns: Patterns, module: str, otherwise: float) -> float:
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), otherwise)


def _patterns(values: Mapping[str, Any], key: str, where: str) -> Patterns:
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
        raise CheckpointError(f"{where}: {key} is not {{name: number}} of at most {_MOST_PATTERNS} names")
    if sum(len(_REPEAT.findall(pattern)) for pattern in patterns) > _ALL_REPEATS:
        raise CheckpointError(f"{where}: {key} has more than {_ALL_REPEATS} repeats in all")
    return tuple((_compiled(p, key, where), _number(value, p, where)) for p, value in patterns.items())


def alpha_factor(alpha: float | None, rank: int) -> float:
    """s by the alpha stored in the file, None for none. rank: 1 or more."""
    return 1.0 if alpha is None else _factor(alpha, rank, rank)


def _factor(alpha: float, divisor: float, rank: float) -> float:
    return (alpha or rank) / divisor


def _number(value: Any, name: str, where: str) -> float:
    try:
        if not isinstance(value, bool | str) and math.isfinite(value):
            return float(value)
    except (TypeError, OverflowError):
        pass
    raise CheckpointError(f"{where}: {name:.60} is {value!s:.40}: expected a number")


def _compiled(pattern: str, key: str, where: str) -> re.Pattern[str]:
    """PEFT's rule: the pattern, a regular expression, is the module's name or what follows one of its dots."""
    slow = len(_REPEAT.findall(pattern)) > _MOST_REPEATS or _REPEATED_GROUP.search(pattern)
    try:
        if not slow and len(pattern) <= _LONGEST_PATTERN:
            return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except (re.error, RecursionError, OverflowError):
        pass
    raise CheckpointError(f"{where}: {key} {pattern!r:.60} is not a name or a simple pattern of names")
