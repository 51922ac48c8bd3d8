"""What alpha makes of a strength: the factor s in W + strength * s * delta.

In order of precedence: PEFT's configuration (adapter_config.json, or diffusers' metadata in the file), the alpha stored
beside the tensors, else s = 1. With rank r, s is alpha / r; rsLoRA's (Kalajdzievski 2023, arXiv 2312.03732) is
alpha / sqrt(r). Alpha 0, which no trainer writes, means r, as in kohya's and LyCORIS's trainers.

References: PEFT tuners/lora/layer.py and utils/other.py (get_pattern_key); kohya networks/lora_flux.py.
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


@dataclass(frozen=True)
class Scaling:
    """PEFT's alpha: one for all modules, and those of `alpha_pattern` for the modules it matches, the first counts."""

    alpha: float
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()
    rslora: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "Scaling | None":
        """From a LoraConfig as JSON, None where it has no alpha; CheckpointError, naming `where`, for a broken one.

        `r` and `rank_pattern` are not read: the rank of each module is the shape of its tensors.
        """
        if values.get("lora_alpha") is None:
            return None
        patterns = values.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
            raise CheckpointError(f"{where}: alpha_pattern is not {{name: number}} of at most {_MOST_PATTERNS} names")
        if sum(len(_REPEAT.findall(pattern)) for pattern in patterns) > _ALL_REPEATS:
            raise CheckpointError(f"{where}: alpha_pattern has more than {_ALL_REPEATS} repeats in all")
        alpha = _number(values["lora_alpha"], "lora_alpha", where)
        compiled = tuple((_compiled(p, where), _number(a, p, where)) for p, a in patterns.items())
        return cls(alpha, compiled, bool(values.get("use_rslora")))

    def factor(self, module: str, rank: int) -> float:
        """s for a module of this name and rank (1 or more)."""
        alpha = next((a for pattern, a in self.patterns if pattern.fullmatch(module)), self.alpha)
        return _factor(alpha, math.sqrt(rank) if self.rslora else rank, rank)


def alpha_factor(alpha: float | None, rank: int) -> float:
    """s by the alpha stored in the file, None for none. rank: 1 or more."""
    return 1.0 if alpha is None else _factor(alpha, rank, rank)


def _factor(alpha: float, divisor: float, rank: int) -> float:
    return (alpha or rank) / divisor


def _number(value: Any, name: str, where: str) -> float:
    try:
        if not isinstance(value, bool | str) and math.isfinite(value):
            return float(value)
    except (TypeError, OverflowError):
        pass
    raise CheckpointError(f"{where}: {name:.60} is {value!s:.40}: expected a number")


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    """PEFT's rule: the pattern, a regular expression, is the module's name or what follows one of its dots."""
    slow = len(_REPEAT.findall(pattern)) > _MOST_REPEATS or _REPEATED_GROUP.search(pattern)
    try:
        if not slow and len(pattern) <= _LONGEST_PATTERN:
            return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except (re.error, RecursionError, OverflowError):
        pass
    raise CheckpointError(f"{where}: alpha_pattern {pattern!r:.60} is not a name or a simple pattern of names")
