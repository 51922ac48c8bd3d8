"""What draws on a machine of the cluster: a model, loaded once, and parts of the list that are claimed one by one."""

import json
import os
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

from mmdit.common.command import hush
from mmdit.common.errors import SettingsError
from mmdit.driver.prompts import line_of, picture_settings
from mmdit.driver.settings import Settings
from mmdit.driver.writing import draw
from mmdit.parallel.claimed import Tally, draw_part, is_of_the_process
from mmdit.parallel.claims import Claim, Claims, State
from mmdit.parallel.options import ManyOptions
from mmdit.parallel.shards import Part, part_name

ERROR = "error"  # a state beside those of claims: this machine cannot draw it
_PAUSE = 5  # seconds that a machine waits that cannot draw: it is not to take the parts from those that can


def row_of(part: Part, out: str) -> dict[str, str]:
    """A part as a row of Ray Data's, which goes over the network: what its lines say, not the pictures' settings."""
    lines = [[line_of(s, out), None if path is None else str(path)] for s, path in part.pictures]
    return {"part": part.name, "pictures": json.dumps(lines)}


class Painter:
    """Draws parts of the list. Whatever goes wrong becomes a row, since an exception would end the whole job."""

    def __init__(self, run: Settings, largest: Settings, since: float, folder: str) -> None:
        """run: what the command was told, in this folder. largest: of its pictures. since: as `Claims` takes it."""
        hush()
        with suppress(OSError):  # where there is none, paths have to be whole
            os.chdir(folder)
        many = {name: getattr(ManyOptions, name) for name in ("shard", "claim", "ray", "ray_actors", "ray_cores")}
        self.run, self.base, self.since = run, replace(run, prompts=None, **many), since
        self.failed, self.in_a_row = "", 0  # why it draws nothing more; pictures that failed since one was drawn
        try:
            self.load(largest)
        except Exception as error:  # told with the first row
            self.failed = f"{type(error).__name__}: {error}"

    def load(self, largest: Settings) -> None:
        import torch

        from mmdit.driver.loading import load_parts
        from mmdit.driver.pipeline import Pipeline

        torch.set_num_threads(self.run.ray_cores)
        # As it was read: of the driver's number format.
        self.parts = load_parts(largest)
        self.pipeline = Pipeline.from_settings(largest, self.parts)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """What became of a part: its state, lines of pictures that were given up, what went wrong."""
        tally, told = Tally(in_a_row=self.in_a_row), self.failed
        try:
            state = ERROR if told else self.draw(row, tally)
        except Exception as error:
            state, told = ERROR, f"{type(error).__name__}: {error}"
            self.failed = told if is_of_the_process(error) else ""
        self.in_a_row = tally.in_a_row
        if state == ERROR:
            sleep(_PAUSE)
        return {"part": row["part"], "state": state, "failed": json.dumps(tally.failed), "error": told}

    def draw(self, row: dict[str, Any], tally: Tally) -> str:
        out, part = self.run.out, self.part_of(row)
        assert self.run.claim is not None
        with Claims(Path(out).expanduser(), self.run.claim, self.since) as claims:
            claim = claims.take(part.name)
            if isinstance(claim, State):
                return claim.value
            assert isinstance(claim, Claim)
            drawn = partial(draw, self.pipeline, run=self.run, seconds={}, told=tally.count)
            return (State.DONE if draw_part(claim, part, out, drawn, tally) else State.BUSY).value

    def part_of(self, row: dict[str, Any]) -> Part:
        """The part that a row asks for. Raises SettingsError where its pictures would be others on this machine."""
        pictures = []
        for line, path in json.loads(row["pictures"]):
            s = self.parts.check(picture_settings(line, self.base))
            pictures.append((s, None if path is None else Path(path)))
        name = part_name([s for s, _ in pictures], self.run.out)
        if name != row["part"]:
            raise SettingsError(
                "the pictures would be others on this machine than on the one that read the list: expected the same "
                "files, of the model and of pictures to begin with"
            )
        return Part(name, pictures)
