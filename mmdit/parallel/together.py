"""One picture drawn by several processes: the stages of a loaded model, shared.

Every process goes through the same loop with the same latents, and is given all velocities. What differs is who
computes what of an evaluation. A function applied to a loaded model, and taken away again: `together`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmdit.common.errors import SettingsError
from mmdit.control.adding import Added
from mmdit.control.rows import added
from mmdit.driver.stages import Controls, Stages
from mmdit.maps import Seen
from mmdit.model import MMDiT
from mmdit.parallel import tokens
from mmdit.parallel.costs import Link, Question, chosen, told
from mmdit.parallel.decoding import StripsOf
from mmdit.parallel.ranks import Layout, LostError, Ranks
from mmdit.prepared import Row, predict
from vae import decode_in_strips

T = TypeVar("T")

_TRIED = 3  # times that something is measured, of which the fastest counts


class Shared:
    """How the evaluations of a loaded model are shared between processes."""

    def __init__(self, stages: Stages, ranks: Ranks, way: str, say: Callable[[str], object]) -> None:
        """See `together`."""
        self.stages, self.ranks, self.way, self._say = stages, ranks, way, say
        self.model, config = stages.transformer, stages.transformer.config
        reason = tokens.lacking(self.model)
        if stages.settings.compile and stages.device.type != "cpu":
            reason = "compiled blocks do not exchange; leave out --compile"
        self.splits = reason is None
        if way in ("tokens", "both"):
            by = ranks.size if way == "tokens" else ranks.size // 2
            if reason is not None:
                raise SettingsError(f"parallel: tokens cannot be split: {reason}")
            if config.num_heads % max(by, 1):
                raise SettingsError(
                    f"parallel: {by} processes cannot share {config.num_heads} heads: expected a number that divides it"
                )
        if way in ("guidance", "both") and ranks.size % 2:
            raise SettingsError(f"parallel: {way} needs an even number of processes, these are {ranks.size}")
        ranks.on(stages.device)
        self.link = measured(ranks, stages) if way == "auto" else None
        self.layouts: dict[Question, Layout] = {}

    def layout(self, asked: Question) -> Layout:
        if asked not in self.layouts:
            config = self.model.config
            layout = chosen(self.way, config, asked, self.ranks.size, self.link, self.splits)
            self.layouts[asked] = layout
            self._say(told(config, asked, layout, self.ranks.size, self.link))
        return self.layouts[asked]

    def predict(
        self, latents: Tensor, rows: Sequence[Row], attention: str | None = None, controls: Controls = ()
    ) -> Tensor:
        """As `Stages.predict`, by all processes, each with the same arguments; all are given all velocities."""
        if torch.is_grad_enabled() and latents.requires_grad:
            return Stages.predict(self.stages, latents, rows, attention, controls)
        self.ranks.agree()  # all are here: who failed before is known
        asked = self._question(latents, rows)
        layout = self.layout(asked)
        beside, within = self.ranks.lines(layout)
        edges = [len(rows) * i // layout.rows for i in range(layout.rows + 1)]
        own = slice(edges[beside.place], edges[beside.place + 1])
        given = latents[own].to(self.stages.device, self.stages.dtype)
        exchange = tokens.exchanges_of(self.model, within, given, asked.text) if within.size > 1 else None
        velocity, failed = torch.zeros(0), None
        try:
            velocity = self._own(latents, rows[own], attention, controls[own], own, exchange)
        except LostError:
            raise
        except Exception as error:
            failed = self.ranks.packed(error)
        if failed is not None and exchange is not None:
            exchange.answer_the_rest()
        self.ranks.agree(failed)
        if layout.rows == 1:
            return velocity
        shapes = [(end - begin, *latents.shape[1:]) for begin, end in pairwise(edges)]
        return torch.cat(beside.gather(velocity, shapes))

    def _own(
        self,
        latents: Tensor,
        rows: Sequence[Row],
        attention: str | None,
        controls: Controls,
        own: slice,
        exchange: tokens.Exchanges | None,
    ) -> Tensor:
        """The velocities `(R, C, h, w)`, float32, of the own rows, their tokens shared as `exchange` says.

        latents: of all rows.
        """
        with self.stages.before_transformer(latents, attention) as x:
            more = added(self.model, x[own], rows, controls)
            more = more if exchange is None else [_own_tokens(one, exchange.part) for one in more]
            with (
                _embedded(self.model, x, own) if self.splits and len(rows) < len(x) else nullcontext(),
                tokens.split(self.model, exchange) if exchange is not None else nullcontext(),
            ):
                return predict(x[own], rows, more).float()

    def look(
        self, latents: Tensor, rows: Sequence[Row], attention: str | None = None, controls: Controls = ()
    ) -> tuple[Tensor, list[Seen | None]]:
        """As `Stages.look`: by every process as a whole; all are given what the first one saw."""
        self.ranks.agree()
        found = self.ranks.together(lambda: Stages.look(self.stages, latents, rows, attention, controls))
        _, line = self.ranks.lines(Layout(tokens=self.ranks.size))
        return tree_map_only(Tensor, lambda x: line.gather(x, [x.shape] * line.size)[0], found)

    def decode_by(self, latents: Tensor, rows: int, pin: bool) -> Tensor:
        """As `Stages.decode_by`: the strips of the plan, and on a GPU, where it has none, one for each process."""
        whole = rows >= latents.shape[2]
        if whole and self.stages.device.type == "cuda":
            rows = -(-latents.shape[2] // self.ranks.size)
        _, line = self.ranks.lines(Layout(tokens=self.ranks.size))
        store = latents.device if whole else "cpu"
        share = StripsOf(line, self.ranks.agree, latents.device)
        return decode_in_strips(self.stages.vae, latents, rows, store, pin, share)

    def budget(self, memory: str) -> int:
        return self.ranks.least(Stages.budget(self.stages, memory))

    def decided(self, stopped: bool, ended: bool) -> tuple[bool, bool]:
        """Whether any process has it stopped, or ended."""
        self.ranks.agree()  # a watcher may have failed
        most = -self.ranks.least(-(2 if ended else int(stopped)))
        return most > 0, most > 1

    def attempt(self, name: str, work: Callable[[], T]) -> T:
        return self.ranks.together(lambda: Stages.attempt(self.stages, name, work))

    def arrange(self) -> None:
        self.ranks.together(lambda: Stages.arrange(self.stages))

    def _question(self, latents: Tensor, rows: Sequence[Row]) -> Question:
        height, width = self.model.grid(latents)
        return Question(len(rows), height * width, rows[0].prepared.length, self.stages.dtype.itemsize)


@contextmanager
def together(stages: Stages, ranks: Ranks, way: str, say: Callable[[str], object] = lambda _: None) -> Iterator[None]:
    """Meanwhile pictures are drawn by all processes together; each gets them.

    way: of `options.WAYS`, but not pictures. say: is told once, for each kind of evaluation, how it is shared. Raises
    SettingsError for what this model, or so many processes, cannot do.
    """
    shared = Shared(stages, ranks, way, say)
    names = ("predict", "look", "decode_by", "budget", "decided", "attempt", "arrange")
    own = {name: vars(stages)[name] for name in names if name in vars(stages)}
    stages.planner.refused = min(ranks.everybody(stages.planner.refused))  # what one has learned holds for all
    vars(stages).update({name: getattr(shared, name) for name in names})
    try:
        yield
    finally:
        for name in names:
            del vars(stages)[name]
        vars(stages).update(own)


def measured(ranks: Ranks, stages: Stages) -> Link:
    """How fast the first process multiplies, and exchanges with all others."""
    device, cuda = stages.device, stages.device.type == "cuda"
    _, line = ranks.lines(Layout(tokens=ranks.size))
    side, many = (4096, 2**24) if cuda else (512, 2**20)
    a = torch.randn(side, side, device=device).to(stages.dtype)
    few = a.new_zeros(ranks.size)
    much = a.new_zeros(many // ranks.size * ranks.size)

    def exchanged(numbers: Tensor) -> float:
        parts = numbers.chunk(ranks.size)
        return _fastest(lambda: line.exchange(parts, [part.shape for part in parts]), cuda)

    multiply, wait, send = _fastest(lambda: a @ a, cuda), exchanged(few), exchanged(much)
    bytes_sent = much.numel() * much.itemsize * (ranks.size - 1) / ranks.size
    return ranks.of_first(Link(2 * side**3 / multiply, bytes_sent / max(send - wait, 1e-9), wait))


def _fastest(work: Callable[[], object], cuda: bool) -> float:
    """Seconds."""
    found = []
    for _ in range(_TRIED):
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


@contextmanager
def _embedded(model: MMDiT, every: Tensor, own: slice) -> Iterator[None]:
    """Meanwhile the embedding of the own rows is what it is in the batch of all.

    It costs next to nothing, and on a CPU its convolution alone of all products sums a smaller batch in another order.
    """
    embedded = model.x_embedder(every)[own]
    hook = model.x_embedder.register_forward_hook(lambda *_: embedded)
    try:
        yield
    finally:
        hook.remove()


def _own_tokens(one: Added, part: tokens.Part) -> Added:
    return one._replace(residuals=[part.of(residual) for residual in one.residuals])
