"""What a user may say of several processes that draw."""

from dataclasses import dataclass

from mmdit.common.options import Mark, option

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
