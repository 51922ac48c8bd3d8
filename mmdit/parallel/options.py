"""What a user may say of several processes that draw."""

import re
from dataclasses import dataclass
from typing import Any

from mmdit.common.options import Mark, from_one_to, option, wrong

WAYS = ("auto", "pictures", "guidance", "tokens", "both")


@dataclass(frozen=True)
class ParallelOptions:
    """Several processes"""

    parallel: str = option(
        "auto",
        "what processes started by torchrun share: pictures of a list; the texts of a step (guidance); the tokens of a "
        "text; both; auto: pictures first, then what is fastest for one",
        Mark.OF_THE_RUN,
        Mark.NOT_SEEN,
        choices=WAYS,
    )


def two_numbers(text: str, between: str) -> tuple[int, int] | None:
    """The numbers, from 1, of a text such as 2/8, the first at most the second; None for another text."""
    found = re.fullmatch(rf"([1-9]\d{{0,5}}){between}([1-9]\d{{0,5}})", text)
    pair = (int(found[1]), int(found[2])) if found else (1, 0)
    return pair if pair[0] <= pair[1] else None


def _check_shard(name: str, value: Any) -> None:
    if two_numbers(value, "/") is None:
        raise wrong(name, value, "I/N with I from 1 to N, as in 2/8")


def _check_actors(name: str, value: Any) -> None:
    if two_numbers(value, ":") is None:
        raise wrong(name, value, "LEAST:MOST, from 1, as in 1:8")


@dataclass(frozen=True)
class ManyOptions:
    """A list on many machines"""

    shard: str | None = option(
        None, "draw this part of the list alone, as 2/8; all parts are the list", Mark.OF_THE_RUN, Mark.NOT_SEEN,
        metavar="I/N", check=_check_shard,
    )  # fmt: skip
    claim: int | None = option(
        None,
        "share the list with all that have the same list, --out and option: each claims what it draws, and takes over "
        "what was not renewed for so many seconds; 120 is a good number",
        Mark.OF_THE_RUN,
        Mark.NOT_SEEN,
        metavar="SECONDS",
        check=from_one_to(86_400),
    )
    ray: str | None = option(
        None,
        "have the list drawn by actors of Ray: auto, the cluster of this machine; local, one started for it; or "
        "an address. All see --out",
        Mark.OF_THE_RUN,
        Mark.NOT_SEEN,
        metavar="auto|local|ADDRESS",
    )
    ray_actors: str | None = option(
        None, "how many of them (default: one for each GPU, or processor core)", Mark.OF_THE_RUN, Mark.NOT_SEEN,
        metavar="LEAST:MOST", check=_check_actors,
    )  # fmt: skip
    ray_cores: int = option(
        1, "processor cores of each, where there are no GPUs", Mark.OF_THE_RUN, Mark.NOT_SEEN, metavar="N",
        check=from_one_to(1024),
    )  # fmt: skip
