"""The command line in several processes: they meet, share a list's pictures, and draw the rest together."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from mmdit.common.command import say, speak
from mmdit.common.errors import SettingsError, UserError
from mmdit.driver.pipeline import Pipeline
from mmdit.memory.budget import shared_by
from mmdit.parallel.ranks import DECISIONS, Ranks, losing
from mmdit.parallel.started import Place
from mmdit.parallel.together import together

T = TypeVar("T")
Draw = Callable[[Sequence[T], bool], None]  # pictures, and whether they are written by this process

_MEETING = timedelta(minutes=5)  # for all to be there


@contextmanager
def joined(place: Place) -> Iterator[Ranks]:
    """All processes of the run, which meet here. Raises SettingsError where they do not."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise SettingsError(f"the environment has WORLD_SIZE but no {name}: expected those that torchrun sets")
    with losing(), shared_by(place.local_size):
        dist.init_process_group("gloo", rank=place.rank, world_size=place.size, timeout=_MEETING)
        dist.barrier()
        control = dist.new_group(backend="gloo", timeout=DECISIONS)
    with shared_by(place.local_size):
        yield Ranks(place.rank, place.size, control)
    dist.destroy_process_group()  # an error ends the process: others notice by that


def draw_shared(pipeline: Pipeline, ranks: Ranks, wanted: Sequence[T], way: str, draw: Draw, whole: bool) -> None:
    """Draw pictures, each once: first as many as all processes can draw alone, then the rest together.

    way: of `options.WAYS`. draw: called with some of the pictures; it may be called twice. whole: all are to be drawn
    by one call of it.
    """
    ranks.on(pipeline.device)
    alone = 0 if whole or way not in ("auto", "pictures") else len(wanted)
    if way == "pictures" and whole:
        raise SettingsError("parallel: pictures: a dump is written by one process: expected another way, or no --dump")
    alone -= alone % ranks.size if way == "auto" else 0
    if alone:
        if alone > 1:
            say(f"{alone} pictures by {ranks.size} processes, each its own")
        try:
            draw(wanted[ranks.rank : alone : ranks.size], True)
        except UserError as error:  # the others know nothing of it, and end when this one does
            speak()
            raise SettingsError(f"process {ranks.rank}: {error}") from None
    if wanted[alone:]:
        with together(pipeline, ranks, way, say):
            draw(wanted[alone:], ranks.first)
    ranks.agree()  # all are done
