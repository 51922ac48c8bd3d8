"""One thread owns the pipeline and draws what requests ask for; a bounded queue before it.

`submit` takes pictures and gives a `Ticket`; what becomes of them is told as events, the last of which is `Ended`.
Waiting pictures of one kind are drawn together, clients in turn. How is up to `Studio._draw` alone.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from threading import Condition, Thread

from PIL import Image

from mmdit.driver import watch
from mmdit.driver.loop import kind
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import Settings
from mmdit.serve.events import ClosedError, DiedError, Drawn, Ended, Event, FullError, LetGoError, Stepped, Tell
from mmdit.serve.metrics import Labels, Metrics
from mmdit.serve.waiting import Place, Ticket, Turns
from mmdit.serve.words import Words

_TOGETHER = 8  # pictures that are on their way at a time
_AT_MOST = 500  # that one drawing takes in before it ends, and another begins
_PATIENCE = 5.0  # seconds that pictures of another kind wait before nobody joins any more
_SENT = 2**28  # pixels of pictures that unfinished requests hold, three bytes each
_LONGEST_WAIT = 120  # seconds of Retry-After; clients give up where it is more
_UNKNOWN_WAIT = 5  # seconds, where no step was taken yet
_FADES = 0.98  # what counts of the pace before, at each step


class Studio:
    """Draws, in a thread of its own."""

    def __init__(self, load: Callable[[], Pipeline], most: int, metrics: Metrics | None = None) -> None:
        """load: called in the thread. most: pictures that may wait or be drawn."""
        self.most, self.metrics = most, metrics or Metrics()
        self.failed: Exception | None = None  # why it could not be loaded
        self._load, self._pipeline = load, None
        self._changed = Condition()
        self._waiting, self._drawing, self._turns = deque[Place](), list[Place](), Turns()
        self._stopping = self._finished = False
        self._seconds = self._work = 0.0  # of steps, fading
        self._last = 0.0  # when the last step was done

    # ---- from any thread -------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = Thread(target=self._run, name="studio", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        return self._pipeline is not None and not self._stopping

    @property
    def loaded(self) -> bool:
        return self._pipeline is not None

    @property
    def pipeline(self) -> Pipeline:
        """Raises ClosedError while there is none."""
        if self._stopping:
            raise ClosedError("the server stops")
        if self._pipeline is None:
            raise ClosedError("the model is being loaded")
        return self._pipeline

    def submit(
        self,
        pictures: Sequence[Settings],
        tell: Tell,
        owner: str = "",
        most: int | None = None,
        client: str | None = None,
    ) -> Ticket:
        """Have these drawn, each of which has count 1 and was checked by the pipeline.

        tell: called with what happens, mostly in the thread that draws, which waits for it. owner, most: who asks, and
        how many pictures of theirs may be unfinished. client: who takes turns with others, if not the owner. Raises
        FullError or ClosedError.
        """
        with self._changed:
            _ = self.pipeline
            every = [*self._begun, *self._waiting]
            own = [place for place in every if place.ticket.owner == owner]
            for places, limit in ((every, self.most), (own, most)):
                if limit is not None and len(places) + len(pictures) > limit:
                    seconds = self._until(places, len(places) + len(pictures) - limit)
                    whose = "" if places is every else " of this key"
                    raise FullError(f"{len(places)} pictures{whose} wait or are drawn, {limit} at most", seconds)
            ticket = Ticket(self, pictures, tell, owner, owner if client is None else client)
            held = sum(other.sent for other in {place.ticket for place in every})
            if held and held + ticket.sent > _SENT:
                raise FullError("the pictures that other requests sent fill the memory", self._until(every, len(every)))
            self._waiting.extend(ticket.places)
            self._turns.comes(ticket.client)
            self._changed.notify_all()
        return ticket

    def end(self, ticket: Ticket, error: Exception | None = None) -> None:
        """The end of a ticket, which is told once."""
        with self._changed:
            if ticket.ended:
                return
            ticket.ended = True
            gone = [place for place in (*self._waiting, *self._drawing) if place.ticket is ticket and not place.dropped]
            for place in gone:
                place.dropped = True
            self._waiting = deque(place for place in self._waiting if not place.dropped)
            self._changed.notify_all()
        if isinstance(error, LetGoError):
            self.metrics.add("mmdit_cancelled_total", len(gone), reason=str(error))
        elif error is not None:
            self.metrics.add("mmdit_failed_total", len(gone))
        self._tell(ticket, Ended(error))
        ticket.told = True

    def skip(self, ticket: Ticket) -> None:
        with self._changed:
            gone = [place for place in self._drawing if place.ticket is ticket and not place.dropped]
            for place in gone:
                place.dropped = True
            ticket.left -= len(gone)
        self.metrics.add("mmdit_cancelled_total", len(gone), reason="skipped")
        if not ticket.left:
            self.end(ticket)

    def stop(self) -> None:
        """Take no more, and answer those that wait; requests of which a picture is being drawn go on."""
        with self._changed:
            self._stopping = True
            begun = {place.ticket for place in self._drawing}
            waiting = {place.ticket: None for place in self._waiting if place.ticket not in begun}
        for ticket in waiting:
            self.end(ticket, ClosedError("the server stops"))

    def close(self) -> None:
        """Let everything go, and the thread end."""
        self.stop()
        with self._changed:
            self._finished = True
            drawing = {place.ticket: None for place in self._drawing}
            self._changed.notify_all()
        for ticket in drawing:
            self.end(ticket, ClosedError("the server stops"))

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    @property
    def busy(self) -> bool:
        with self._changed:
            return bool(self._drawing or self._waiting)

    @property
    def _begun(self) -> list[Place]:
        """What is drawn and not done, with what is let go at its next step."""
        return [place for place in self._drawing if not place.drawn]

    def gauges(self) -> dict[tuple[str, Labels], float]:
        """What `Metrics.text` takes."""
        with self._changed:
            counts = {"queue": len(self._waiting), "running": len(self._begun)}
        found: dict[tuple[str, Labels], float] = {(f"mmdit_{name}_pictures", ()): n for name, n in counts.items()}
        found["mmdit_ready", ()] = float(self.ready)
        if self._pipeline is not None:
            found["mmdit_memory_bytes", (("what", "predicted"),)] = self._pipeline.plan.peak
            if (held := held_by(self._pipeline)) is not None:
                found["mmdit_memory_bytes", (("what", "held"),)] = held
            if (texts := self._pipeline.remembered) is not None:
                found["mmdit_memory_bytes", (("what", "texts"),)] = texts.bytes
                found["mmdit_texts_total", (("by", "cache"),)] = texts.hits
                found["mmdit_texts_total", (("by", "encoders"),)] = texts.misses
        return found

    def _until(self, places: Sequence[Place], count: int) -> int:
        """Seconds until so many of these should be done, by the pace of the last steps."""
        if not self._work:
            return _UNKNOWN_WAIT
        seconds = sum(place.work for place in places[:count]) * self._seconds / self._work
        return min(max(1, math.ceil(seconds)), _LONGEST_WAIT)

    def _tell(self, ticket: Ticket, event: Event) -> None:
        """What goes wrong with whoever asked is no matter of the others."""
        try:
            ticket.tell(event)
        except Exception as error:
            if not isinstance(event, Ended):
                self.end(ticket, error)

    # ---- in the thread that draws ----------------------------------------------------------------

    def _run(self) -> None:
        """The thread. Where it dies of anything, those it drew for are told, and another one begins."""
        try:
            if self._pipeline is None:
                try:
                    self._pipeline = self._load()
                except Exception as error:
                    self.failed = error
                    return
            for batch in self._batches():
                self._attempt(batch)
        except BaseException as error:  # a thread has nobody to raise to
            self.metrics.add("mmdit_worker_deaths_total")
            with self._changed:
                lost, self._drawing = {place.ticket: None for place in self._drawing}, []
            for ticket in lost:
                died = DiedError(f"the thread that drew it ended: {type(error).__name__}")
                self.end(ticket, died)
                if not ticket.told:  # it ended on the way there
                    self._tell(ticket, Ended(died))
            if not self._finished:
                self.start()

    def _batches(self) -> Iterator[list[Place]]:
        """The picture whose turn it is, with those of its kind; for ever."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._finished)
                if self._finished:
                    return
                first = self._turns.first(self._waiting)
            yield self.take(first, _TOGETHER)

    def take(self, first: Place, most: int) -> list[Place]:
        """So many at most of those that wait and go with this one, clients in turn: from now on they are drawn."""
        with self._changed:
            taken = self._turns.take([place for place in self._waiting if self._goes_with(first, place)], most)
            self._drawing = [*self._drawing, *taken]  # first: where the thread dies here, they are told
            self._waiting = deque(place for place in self._waiting if place not in taken)
            self._turns.forget(self._waiting)
        now = time.monotonic()
        for place in taken:
            self.metrics.observe("mmdit_queue_seconds", now - place.since)
        return taken

    def joins(self, batch: list[Place]) -> bool:
        """Whether others wait that go with these, and none of another kind has waited as long as its turn takes."""
        with self._changed:
            if len(batch) >= _AT_MOST or not self._waiting:
                return False
            patience = time.monotonic() - _PATIENCE
            if any(place.since < patience and not self._goes_with(batch[0], place) for place in self._waiting):
                return False
            return any(self._goes_with(batch[0], place) for place in self._waiting)

    def _goes_with(self, first: Place, place: Place) -> bool:
        if (first.ticket.alone or place.ticket.alone) and first.ticket is not place.ticket:
            return False
        return kind(first.settings) == kind(place.settings)

    def _attempt(self, batch: list[Place]) -> None:
        """Draw a batch. Where it fails, each of its requests is tried once more alone: only one may be the cause."""
        self._last = time.monotonic()
        try:
            if batch:  # else they were let go in the meantime
                self._draw(batch)
        except Exception as error:
            tickets = {place.ticket: None for place in self._drawing}
            with self._changed:
                if len(tickets) > 1:
                    for place in self._drawing:
                        place.ticket.alone, place.steps, place.together = True, 0, 0
                    self._waiting.extendleft(place for place in reversed(self._drawing) if not place.dropped)
            for ticket in tickets if len(tickets) == 1 else ():
                self.end(ticket, error)
        with self._changed:
            self._drawing = []

    def _draw(self, batch: list[Place]) -> None:
        """Draw these, which are of one kind.

        Each step goes to `stepped` and each result to `drawn`; a place that is `dropped` is let go at its next step;
        others of the kind join between two steps. What is raised is the matter of all that are in `_drawing` then.
        """
        seconds: dict[str, float] = {}
        pictures, telling, words = [place.settings for place in batch], Telling(self, batch), Words()
        drawing = self.pipeline_owned.drawing(pictures, [telling, words], seconds, Joining(self, batch))
        for i, image in drawing:
            telling.round_ends()
            self.drawn(batch[i], Drawn(batch[i].index, drawing.settings[i], image, words.of(i)))
        self.metrics.observe("mmdit_batch_pictures", len(batch))
        for stage, value in seconds.items():
            self.metrics.observe("mmdit_stage_seconds", value, stage=stage)

    @property
    def pipeline_owned(self) -> Pipeline:
        assert self._pipeline is not None
        return self._pipeline

    def stepped(self, place: Place, look: Callable[[], Image.Image]) -> None:
        """A picture took a step."""
        now = time.monotonic()
        self._seconds = _FADES * self._seconds + now - self._last
        self._work = _FADES * self._work + place.each
        self.metrics.observe("mmdit_step_seconds", now - self._last)
        self._last, place.steps = now, place.steps + 1
        self._tell(place.ticket, Stepped(place.index, place.steps, place.all_steps, look))

    def drawn(self, place: Place, event: Drawn) -> None:
        """A picture is done."""
        with self._changed:
            if place.dropped:
                self._counts_no_more(place)
                return
            place.dropped = place.drawn = True
            place.ticket.left -= 1
        self.metrics.add("mmdit_pictures_total")
        self._tell(place.ticket, event)
        if not place.ticket.left:
            self.end(place.ticket)
        self._counts_no_more(place)  # at last: where the thread dies before, they are told

    def let_go(self, place: Place) -> bool:
        """Whether a picture is to take no further step; then its place is free."""
        dropped = place.dropped
        if dropped:
            self._counts_no_more(place)
        return dropped

    def _counts_no_more(self, place: Place) -> None:
        with self._changed:
            self._drawing = [other for other in self._drawing if other is not place]


class Joining:
    """Lets pictures join those that are drawn, between two steps (`mmdit.driver.loop.Arrivals`)."""

    def __init__(self, studio: Studio, batch: list[Place]) -> None:
        """batch: those that are drawn, by their index; who joins comes behind."""
        self._studio, self._batch = studio, batch

    def waiting(self, _: Settings) -> bool:
        return self._studio.joins(self._batch)

    def take(self, _: Settings, most: int) -> list[Settings]:
        room = min(most, _TOGETHER - sum(not place.dropped for place in self._batch))
        taken = self._studio.take(self._batch[0], room) if room > 0 and self._studio.joins(self._batch) else []
        self._batch += taken
        return [place.settings for place in taken]


class Telling(watch.Watcher):
    """Tells the studio of steps, and lets pictures go that nobody waits for."""

    def __init__(self, studio: Studio, batch: Sequence[Place]) -> None:
        self._studio, self._batch = studio, batch
        self._round: list[Place] = []  # that took the same step

    def encoded(self, event: watch.Encoded) -> None:
        if self._studio.let_go(self._batch[event.index]):
            event.stop()

    def step(self, event: watch.Stepped) -> None:
        place = self._batch[event.index]
        if place in self._round:
            self.round_ends()
        self._round.append(place)
        for other in self._round:
            other.together = max(other.together, len(self._round))
        if not place.dropped:
            self._studio.stepped(place, lambda: self._studio.pipeline_owned.preview(event.denoised))
        if self._studio.let_go(place):
            event.stop()

    def round_ends(self) -> None:
        """What is told next is another step."""
        if self._round:
            self._studio.metrics.observe("mmdit_step_pictures", len(self._round))
        self._round = []


def held_by(pipeline: Pipeline) -> int | None:
    """Bytes of memory that are held: tensors on a GPU, else this process."""
    if pipeline.device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(pipeline.device)
    with suppress(OSError, ValueError, IndexError), open("/proc/self/statm") as file:
        import resource

        return int(file.read().split()[1]) * resource.getpagesize()
    return None
