"""Pictures that wait: the places of a request, and in which order clients have their turns."""

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from PIL import Image

from mmdit.common.options import Mark, marked
from mmdit.driver.settings import Settings
from mmdit.images.given import Given
from mmdit.images.options import steps_of
from mmdit.serve.events import LetGoError, Tell


class Draws(Protocol):
    """Who draws a ticket's pictures."""

    def end(self, ticket: "Ticket", error: Exception | None = None) -> None: ...

    def skip(self, ticket: "Ticket") -> None: ...


class Place:
    """One picture of a ticket."""

    def __init__(self, ticket: "Ticket", index: int, settings: Settings) -> None:
        self.ticket, self.index, self.settings = ticket, index, settings
        self.since, self.steps = time.monotonic(), 0
        self.dropped = self.drawn = False  # dropped: no step is to be taken any more
        self.together = 0  # pictures that took a step with it, at most, itself included
        self.all_steps = steps_of(settings)
        if settings.upscale is not None:
            self.all_steps += steps_of(replace(settings, init="first pass", strength=settings.upscale_strength))

    @property
    def work(self) -> float:
        """What is left, in steps times pixels."""
        return self.each * (self.all_steps - self.steps)

    @property
    def each(self) -> float:
        """What a step takes."""
        s = self.settings
        return float((s.width or 0) * (s.height or 0) * (1 if s.cfg == 1 else 2))


class Ticket:
    """Pictures that were asked for together."""

    def __init__(self, studio: Draws, pictures: Sequence[Settings], tell: Tell, owner: str, client: str) -> None:
        """owner: whose limit it counts to. client: with whom it takes turns."""
        self._studio, self.tell, self.owner, self.client = studio, tell, owner, client
        self.places = [Place(self, i, s) for i, s in enumerate(pictures)]
        self.sent = sum(image.width * image.height for image in sent_with(pictures))
        self.left = len(self.places)  # neither drawn nor dropped
        self.ended = self.told = False
        self.alone = False  # it was in a batch that failed

    def cancel(self, why: str = "cancelled") -> None:
        """Let all of it go that is not drawn; its places are free at the next step. From any thread."""
        self._studio.end(self, LetGoError(why))

    def skip(self) -> None:
        """Let those pictures go that are being drawn now."""
        self._studio.skip(self)


class Turns:
    """Clients in turn, a picture each: whoever was served is the last, and whoever comes anew is behind them.

    So nobody waits for more than a picture of each other client, however many these sent.
    """

    def __init__(self) -> None:
        self._clients: dict[str, None] = {}

    def comes(self, client: str) -> None:
        """Something of this client waits from now on."""
        self._clients.setdefault(client)

    def first(self, waiting: Iterable[Place]) -> Place:
        """The oldest picture of the client whose turn it is; there is one."""
        oldest: dict[str, Place] = {}
        for place in waiting:
            oldest.setdefault(place.ticket.client, place)
        return next(oldest[client] for client in self._order(oldest) if client in oldest)

    def take(self, waiting: Iterable[Place], most: int) -> list[Place]:
        """So many of these at most, from each client the oldest first."""
        own: defaultdict[str, deque[Place]] = defaultdict(deque)
        for place in waiting:
            own[place.ticket.client].append(place)
        taken: list[Place] = []
        while own and len(taken) < most:
            client = next(client for client in self._order(own) if client in own)
            taken.append(own[client].popleft())
            if not own[client]:
                del own[client]
            del self._clients[client]
            self._clients[client] = None
        return taken

    def forget(self, waiting: Iterable[Place]) -> None:
        """All clients but those of whom something waits."""
        left = {place.ticket.client for place in waiting}
        self._clients = {client: None for client in self._clients if client in left}

    def _order(self, clients: Iterable[str]) -> dict[str, None]:
        for client in clients:
            self._clients.setdefault(client)
        return self._clients


def sent_with(pictures: Sequence[Settings]) -> list[Image.Image]:
    """The pictures that these settings hold, each once."""
    found: dict[str, Image.Image] = {}
    for s in pictures:
        for name in marked(Settings, Mark.PICTURE):
            value = getattr(s, name)
            every = value if isinstance(value, tuple) else (value,)
            found |= {one.content: one.image for one in every if isinstance(one, Given)}
    return [*found.values()]
