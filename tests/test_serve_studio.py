"""The thread that draws: its queue, what it lets go, how it fails and is mended. The pipeline is a played one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import Gate, pipeline, wait

from mmdit.driver.settings import Settings
from mmdit.driver.stages import NotFiniteError
from mmdit.serve.events import ClosedError, DiedError, Drawn, Ended, FullError, LetGoError, Stepped
from mmdit.serve.metrics import Metrics
from mmdit.serve.studio import Studio
from mmdit.serve.waiting import Turns


class Told:
    """An event of the loop."""

    def __init__(self, index: int) -> None:
        self.index, self.stopped, self.denoised = index, False, "latents"

    def stop(self) -> None:
        self.stopped = True


class Played:
    """A pipeline whose pictures are their seeds; it waits at a gate before each step."""

    device = SimpleNamespace(type="cpu")
    plan = SimpleNamespace(peak=1000)
    remembered = SimpleNamespace(bytes=70, hits=5, misses=2)

    def __init__(self) -> None:
        self.gate = Gate()
        self.batches: list[list[int]] = []  # seeds
        self.fails: dict[int, BaseException] = {}  # by seed

    def drawing(self, pictures: Sequence[Settings], watchers: Any, seconds: dict[str, float], _: Any) -> Any:
        self.batches.append([s.seed for s in pictures])
        seconds["denoise"] = 1.0
        return self.Drawing(self, pictures, watchers[0])

    def preview(self, latents: str) -> Image.Image:
        assert latents == "latents"
        return Image.new("RGB", (2, 2))

    class Drawing:
        def __init__(self, pipe: "Played", pictures: Sequence[Settings], watcher: Any) -> None:
            self._pipe, self._pictures, self._watcher = pipe, pictures, watcher
            self.settings = dict(enumerate(pictures))

        def __iter__(self) -> Iterator[tuple[int, Image.Image]]:
            on_way = []
            for i in self.settings:
                self._watcher.encoded(told := Told(i))
                on_way += [] if told.stopped else [i]
            for _ in range(self._pictures[0].steps or 0):
                for i in list(on_way):
                    seed = self._pictures[i].seed
                    self._pipe.gate.step(seed)
                    if seed in self._pipe.fails:
                        raise self._pipe.fails[seed]
                    self._watcher.step(told := Told(i))
                    if told.stopped:
                        on_way.remove(i)
            for i in on_way:
                yield i, Image.new("RGB", (1, 1), (self._pictures[i].seed, 0, 0))


def asked(*seeds: int, **more: Any) -> list[Settings]:
    return [Settings(seed=seed, **{"width": 64, "height": 48, "steps": 2, "cfg": 1.0, **more}) for seed in seeds]


class Heard(list[Any]):
    """What was told of a ticket."""

    @property
    def seeds(self) -> list[int]:
        return [event.settings.seed for event in self if isinstance(event, Drawn)]

    @property
    def end(self) -> Ended | None:
        ends = [event for event in self if isinstance(event, Ended)]
        assert len(ends) <= 1
        return ends[0] if ends else None

    @property
    def error(self) -> Exception | None:
        wait(lambda: self.end)
        assert self.end is not None
        return self.end.error


@contextmanager
def studio(most: int = 20) -> Iterator[tuple[Studio, Played]]:
    pipe = Played()
    found = Studio(lambda: pipe, most, Metrics())  # type: ignore[arg-type, return-value]
    found.start()
    wait(lambda: found.ready)
    try:
        yield found, pipe
    finally:
        pipe.gate.open()
        found.close()
        found.join(30)


def test_waiting_pictures_of_a_kind_are_one_batch_the_oldest_first() -> None:
    """At most eight; other steps are another kind."""
    with studio() as (found, pipe):
        heard = [Heard() for _ in range(5)]
        found.submit(asked(1), heard[0].append)
        wait(lambda: pipe.batches)
        for ear, some in zip(heard[1:], (asked(2, 3), asked(4, steps=3), asked(5, 6, 7, 8, 9), asked(10, 11))):
            found.submit(some, ear.append)
        pipe.gate.open()
        assert [ear.error for ear in heard] == [None] * 5
        assert [ear.seeds for ear in heard] == [[1], [2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
        assert pipe.batches == [[1], [2, 3, 5, 6, 7, 8, 9, 10], [4], [11]]
        wait(lambda: found.metrics.value("mmdit_batch_pictures_sum") == 11)  # counted after the last answer
        assert found.metrics.value("mmdit_step_pictures_sum") == 2 * 10 + 3
        assert found.metrics.value("mmdit_step_pictures_count") == 2 * 3 + 3


def test_clients_have_their_turns() -> None:
    """A picture each; who comes anew is last; another kind has its turn too, before what is older of who was served."""
    with studio() as (found, pipe):
        heard = [Heard() for _ in range(6)]
        found.submit(asked(1), heard[0].append, client="a")
        wait(lambda: pipe.batches)
        found.submit(asked(*range(11, 21)), heard[1].append, client="a")
        found.submit(asked(21, 22), heard[2].append, client="b")
        found.submit(asked(31, 32, steps=3), heard[3].append, client="c")
        found.submit(asked(41), heard[4].append, client="d")
        found.submit(asked(51, steps=3), heard[5].append, client="a")
        pipe.gate.open()
        assert [ear.error for ear in heard] == [None] * 6
        assert pipe.batches == [[1], [11, 21, 41, 12, 22, 13, 14, 15], [31, 51, 32], [16, 17, 18, 19, 20]]


def test_a_client_among_many_waits_for_one_of_each() -> None:
    """Whoever has been served goes behind those who have not been yet, and newcomers behind both."""
    turns = Turns()

    def places(clients: str) -> list[Any]:
        return [SimpleNamespace(ticket=SimpleNamespace(client=client)) for client in clients]

    def names(some: list[Any]) -> str:
        return "".join(place.ticket.client for place in some)

    assert names(turns.take(places("aaaabbc"), 4)) == "abca"
    assert names(turns.take(places("xyabb"), 4)) == "baxy"
    turns.forget(places("xb"))
    assert names(turns.take(places("abxb"), 9)) == "bxab"
    assert turns.first(places("bbba")).ticket.client == "a"
    for client in "bc":
        turns.comes(client)
    turns.take(places("c"), 1)  # joins, while what "b" asked for is of another kind
    assert turns.first(places("cb")).ticket.client == "b"


def test_what_is_let_go_counts_until_its_next_step() -> None:
    """Not until the end of those that it was drawn with, who may go on as others join."""
    with studio(most=3) as (found, pipe):
        heard = [Heard() for _ in range(4)]
        found.submit(asked(9), heard[0].append)
        wait(lambda: pipe.batches)
        left = found.submit(asked(1), heard[1].append)
        found.submit(asked(2), heard[2].append)
        pipe.gate.let(2)
        wait(lambda: pipe.gate.steps == [9, 9, 1])
        left.cancel()
        with pytest.raises(FullError):
            found.submit(asked(3, 4), heard[3].append)
        pipe.gate.let(1)
        wait(lambda: pipe.gate.steps == [9, 9, 1, 2])
        found.submit(asked(3, 4), heard[3].append)
        pipe.gate.open()
        assert [ear.error for ear in heard if ear is not heard[1]] == [None] * 3


def test_steps_are_told_with_a_look_at_the_picture() -> None:
    with studio() as (found, pipe):
        pipe.gate.open()
        looked: list[Any] = []
        heard = Heard()

        def tell(event: Any) -> None:
            heard.append(event)
            looked.extend([event.look().size] if isinstance(event, Stepped) else [])

        found.submit(asked(1, steps=3), tell)
        assert heard.error is None and looked == [(2, 2)] * 3
        assert [(event.step, event.steps) for event in heard if isinstance(event, Stepped)] == [(1, 3), (2, 3), (3, 3)]


def test_what_is_let_go_takes_no_further_step() -> None:
    """One that is drawn, beside another which goes on; one that waits; a single picture of two that is skipped."""
    with studio() as (found, pipe):
        heard = [Heard() for _ in range(4)]
        first = found.submit(asked(1, steps=5), heard[0].append)
        pipe.gate.reached.wait(30)
        both = [found.submit(asked(*seeds, steps=4), ear.append) for seeds, ear in zip(((2, 3), (4,)), heard[1:3])]
        waits = found.submit(asked(5), heard[3].append)
        first.cancel("left")
        waits.cancel("left")
        assert isinstance(heard[0].error, LetGoError) and isinstance(heard[3].error, LetGoError)
        pipe.gate.let(1)
        wait(lambda: len(pipe.batches) == 2)
        pipe.gate.let(3)
        wait(lambda: len(pipe.gate.steps) == 5)
        both[0].skip()
        assert heard[1].error is None and heard[1].seeds == []
        pipe.gate.open()
        assert heard[2].error is None and heard[2].seeds == [4]
        assert pipe.gate.steps == [1, 2, 3, 4, 2, 3, 4, 4, 4] and pipe.batches == [[1], [2, 3, 4]]
        assert found.metrics.value("mmdit_cancelled_total", reason="left") == 2


def test_the_queue_is_bounded_by_pictures_and_by_owner() -> None:
    with studio(most=6) as (found, pipe):
        heard = Heard()
        found.submit(asked(1, 2, 3), heard.append, owner="a")
        with pytest.raises(FullError, match="3 pictures wait or are drawn, 6 at most") as caught:
            found.submit(asked(*range(4)), heard.append)
        assert caught.value.seconds == 5  # no step was taken
        with pytest.raises(FullError, match="of this key"):
            found.submit(asked(4), heard.append, owner="a", most=3)
        found.submit(asked(4, 5, 6), Heard().append, owner="b", most=3)
        pipe.gate.open()
        assert heard.error is None


def test_pictures_that_were_sent_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that unfinished requests hold, each once; one request alone is always taken."""
    monkeypatch.setattr("mmdit.serve.studio._SENT", 100)
    sent = [Settings(init=Image.new("RGB", (8, 8), (i, 0, 0)), mask=Image.new("L", (8, 4))) for i in range(2)]  # type: ignore[arg-type]
    own = [{"init": s.init, "mask": s.mask, "strength": 1.0} for s in sent]
    with studio() as (found, pipe):
        heard = Heard()
        found.submit(asked(1, 2, 3, **own[0]), heard.append)
        found.submit(asked(4), Heard().append)
        with pytest.raises(FullError, match="fill the memory"):
            found.submit(asked(5, **own[1]), Heard().append)
        pipe.gate.open()
        assert heard.error is None
        wait(lambda: not found.busy)
        found.submit(asked(5, **own[1]), Heard().append)


def test_the_wait_is_that_of_the_pace() -> None:
    """So many steps of so many pixels, twice with guidance; between a second and two minutes."""
    with studio(most=4) as (found, pipe):
        found.submit(asked(1, 2, steps=10, cfg=2.0), Heard().append)
        found.submit(asked(3, 4, steps=20), Heard().append)
        wait(lambda: pipe.batches)
        found._seconds, found._work = 2.0, 64 * 48 * 2.0  # a guided step takes two seconds
        for count, seconds in ((1, 20), (2, 40), (3, 60), (4, 80)):
            with pytest.raises(FullError) as caught:
                found.submit(asked(*range(count)), Heard().append)
            assert caught.value.seconds == seconds
        found._seconds = 1e6
        with pytest.raises(FullError) as caught:
            found.submit(asked(1), Heard().append)
        assert caught.value.seconds == 120


def test_a_failure_is_told_to_whom_it_belongs() -> None:
    """Others of the batch are drawn; nobody's place is kept."""
    with studio() as (found, pipe):
        heard = [Heard() for _ in range(4)]
        found.submit(asked(1), heard[0].append)
        pipe.gate.reached.wait(30)
        pipe.fails[3] = NotFiniteError("NaN")
        for seed, ear in zip((2, 3, 4), heard[1:]):
            found.submit(asked(seed), ear.append)
        pipe.gate.open()
        assert [type(ear.error) for ear in heard] == [type(None), type(None), NotFiniteError, type(None)]
        assert [ear.seeds for ear in heard] == [[1], [2], [], [4]]
        wait(lambda: not found.busy)
        assert found.metrics.value("mmdit_failed_total") == 1


def test_a_thread_that_dies_is_begun_anew() -> None:
    """Those it drew for are told; those that wait are drawn."""
    with studio() as (found, pipe):
        heard = [Heard() for _ in range(3)]
        found.submit(asked(1, 2), heard[0].append)
        pipe.gate.reached.wait(30)
        thread = found._thread
        pipe.fails[2] = SystemExit(1)
        found.submit(asked(3, steps=3), heard[1].append)
        pipe.gate.open()
        assert isinstance(heard[0].error, DiedError) and heard[1].error is None and heard[1].seeds == [3]
        found.submit(asked(4), heard[2].append)
        assert heard[2].error is None
        assert found._thread is not thread and not thread.is_alive()
        assert found.metrics.value("mmdit_worker_deaths_total") == 1


def test_whoever_does_not_listen_is_no_matter_of_the_others() -> None:
    def deaf(_: object) -> None:
        raise RuntimeError("the event loop is closed")

    with studio() as (found, pipe):
        heard = Heard()
        found.submit(asked(1), deaf)
        found.submit(asked(2), heard.append)
        pipe.gate.open()
        assert heard.error is None and heard.seeds == [2]


def test_the_end_lets_be_done_what_was_begun() -> None:
    with studio() as (found, pipe):
        heard = [Heard() for _ in range(2)]
        found.submit(asked(1), heard[0].append)
        pipe.gate.reached.wait(30)
        found.submit(asked(2), heard[1].append)
        found.stop()
        assert isinstance(heard[1].error, ClosedError) and not found.ready
        with pytest.raises(ClosedError, match="stops"):
            found.submit(asked(3), Heard().append)
        pipe.gate.open()
        assert heard[0].error is None and heard[0].seeds == [1]


def test_a_model_that_cannot_be_loaded() -> None:
    def load() -> Any:
        raise ValueError("no such file")

    found = Studio(load, 3)
    with pytest.raises(ClosedError, match="loaded"):
        found.submit(asked(1), Heard().append)
    found.start()
    found.join(30)
    assert isinstance(found.failed, ValueError) and not found.ready


def test_a_request_joins_those_that_are_drawn() -> None:
    """Between two steps of the first; another kind that waits long enough closes the door. By the demo itself."""
    pipe = pipeline()
    first, second, other, third = (
        pipe.check(pipe.asked({"prompt": prompt, "seed": i, "steps": 6, "cfg": cfg}))
        for i, (prompt, cfg) in enumerate([("a horse", 3.0), ("a bear", 3.0), ("a fox", 2.0), ("a cow", 3.0)])
    )
    found, order = Studio(lambda: pipe, 20, Metrics()), list[str]()
    heard = {name: Heard() for name in ("first", "second", "other", "third")}

    def tell(name: str, event: Any) -> None:
        heard[name].append(event)
        if isinstance(event, Stepped | Drawn):
            order.append(f"{name} {event.step if isinstance(event, Stepped) else 'drawn'}")
        if order == ["first 1"]:
            found.submit([second], lambda event: tell("second", event))
        if name == "second" and isinstance(event, Stepped) and event.step == 2:
            found.submit([other], lambda event: tell("other", event))
            found._waiting[0].since -= 100
            found.submit([third], lambda event: tell("third", event))

    found.start()
    wait(lambda: found.ready)
    found.submit([first], lambda event: tell("first", event))
    wait(lambda: heard["third"].end and heard["other"].end)
    found.close()
    found.join(30)
    at = order.index
    assert at("first 1") < at("second 1") < at("first drawn") < at("second drawn") < at("other 1") < at("third 1")
    for name, s in (("first", first), ("second", second), ("third", third)):
        (drawn,) = [event for event in heard[name] if isinstance(event, Drawn)]
        alone = np.asarray(pipe.run(s).images[0]).astype(int)
        assert np.abs(np.asarray(drawn.image).astype(int) - alone).mean() <= 1.0


def test_what_is_so_now_is_in_the_metrics() -> None:
    """Pictures that wait and are drawn, what they waited, steps, memory, what the cache of texts spared."""
    with studio() as (found, pipe):
        heard = Heard()
        found.submit(asked(1, 2), heard.append)
        pipe.gate.reached.wait(30)
        found.submit(asked(3, steps=1), Heard().append)
        told = {(name, *(value for _, value in labels)): number for (name, labels), number in found.gauges().items()}
        assert told["mmdit_running_pictures",] == 2 and told["mmdit_queue_pictures",] == 1 and told["mmdit_ready",] == 1
        assert told["mmdit_memory_bytes", "predicted"] == 1000 and told["mmdit_memory_bytes", "held"] > 10**7
        assert told["mmdit_memory_bytes", "texts"] == 70
        assert told["mmdit_texts_total", "cache"] == 5 and told["mmdit_texts_total", "encoders"] == 2
        pipe.gate.open()
        assert heard.error is None
        wait(lambda: found.metrics.value("mmdit_batch_pictures_count") == 2)  # counted after the last answer
        names = ("queue_seconds", "step_seconds", "stage_seconds", "batch_pictures", "step_pictures")
        labels = {"stage_seconds": {"stage": "denoise"}}
        assert [found.metrics.value(f"mmdit_{n}_count", **labels.get(n, {})) for n in names] == [3, 5, 2, 2, 3]
        assert found.metrics.value("mmdit_pictures_total") == 3
        text = found.metrics.text(found.gauges())
        assert 'mmdit_texts_total{by="cache"} 5' in text and 'mmdit_memory_bytes{what="predicted"} 1000' in text
