"""What torchrun tells a process of the others, in its environment. Imports nothing that takes time."""

import os
from typing import NamedTuple

from mmdit.common.errors import SettingsError


class Place(NamedTuple):
    """Which of the processes this is."""

    rank: int
    size: int
    local_rank: int  # of those on this machine
    local_size: int


def started() -> Place | None:
    """None where this process is alone. Raises SettingsError for an environment that contradicts itself."""
    told = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    if told["WORLD_SIZE"] in (None, "1"):
        return None
    rank, size = told["RANK"], told["WORLD_SIZE"]
    told["LOCAL_RANK"], told["LOCAL_WORLD_SIZE"] = told["LOCAL_RANK"] or rank, told["LOCAL_WORLD_SIZE"] or size
    try:
        place = Place(*(int(told[name] or "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    except ValueError:
        place = Place(0, 0, 0, 0)
    if not 0 <= place.rank < place.size:
        raise SettingsError(
            f"the environment has WORLD_SIZE {size!r:.40} and RANK {rank!r:.40}: expected those that torchrun sets"
        )
    return place


def see_one_gpu(place: Place) -> None:
    """Let this process see its own GPU alone; before CUDA is first asked for.

    Then "cuda" means that one to every thread and library.
    """
    there = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [str(place.local_rank)] if there is None else [name.strip() for name in there.split(",") if name.strip()]
    own = [str(place.local_rank)] if there is None else every[place.local_rank : place.local_rank + 1]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
