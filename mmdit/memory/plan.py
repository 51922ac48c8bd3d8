"""Plans of what is on the device when: the fastest whose predicted peak keeps to a budget.

A prediction adds up the weights that lie on the device and what the computation needs at its peak, which is found by
running the real code, of a model cut short, without memory (`mmdit.memory.meter`). On a CPU memory means what a process
has of its own; weights that are used where they lie in the mapped file cost nothing.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from mmdit.attention import attention_by
from mmdit.errors import SettingsError
from mmdit.memory.empty import on_meta
from mmdit.memory.host import available_bytes, own_bytes
from mmdit.memory.meter import peak_bytes
from mmdit.memory.options import memory_bytes
from mmdit.memory.residency import Mode, Network
from mmdit.memory.streaming import Unit
from mmdit.model import MMDiT
from mmdit.prepared import Prepared
from vae import cpu_rows, decode_peak, rows_for

_WORKSPACE = {"cuda": 40_000_000, "cpu": 80_000_000}  # bytes that matrix products and their like take for themselves
_LIGHT = 0.25  # of a network's weights: so few that need memory beside the mapped file may stay
_UNITS = 20  # tensors as large as all tokens together that a step never needs more of at a time
_LESS = 0.75  # of the memory that could not be had
_LOW = 16  # rows of the latent: strips lower than this are slow
_ROOM = 0.95  # of a budget, for decoding, where convolutions may take memory of their own, and for blocks that stay
_LIBRARIES = ("ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")  # cuBLAS and cuDNN out of memory
_SHARE = 0.9  # of what is free: the rest is for what allocators waste
_LIBRARY = 500_000_000  # bytes on a GPU that kernels and libraries may still take when they are first used


class Job(NamedTuple):
    """What is to be drawn, as far as memory is concerned."""

    rows: int  # of the latent
    columns: int
    count: int  # pictures
    steps: int
    texts: int  # for each picture: 2 with guidance, else 1
    t5_length: int
    apart: bool = False  # whether each picture has texts of its own, else all have the same
    attention: str = "auto"  # who computes it
    memory: str = "auto"  # the budget, as a user gives it
    waiting: int = 0  # bytes of texts, encoded, that wait in the host's memory


@dataclass(frozen=True)
class Plan:
    """What is where, and the bytes that this is predicted to take at the peak of each stage."""

    modes: dict[str, Mode]
    batch: int  # pictures denoised at a time
    strip: int | None  # height of the strips that are decoded, in rows of the latent; None: whole
    peaks: dict[str, int]
    kept: int = 0  # blocks of the transformer that stay where it comes block by block
    blocks: int = 0  # of it that take memory of the device, those kept among them

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def everything_stays(self) -> bool:
        return set(self.modes.values()) == {Mode.RESIDENT}

    def __str__(self) -> str:
        encoders = {mode for name, mode in self.modes.items() if name not in ("transformer", "vae")}
        text = "come block by block" if Mode.STREAMED in encoders else "stay"
        ways = {Mode.RESIDENT: "stays", Mode.STAGED: "is there while it runs", Mode.STREAMED: "comes block by block"}
        kept = f", {self.kept} of {self.blocks} blocks stay" if self.kept else ""
        batch = f", {self.batch} pictures at a time" if self.batch > 1 else ""
        strips = "whole" if self.strip is None else f"in strips of {self.strip} latent rows"
        return (
            f"{told(self.peak)} at the peak; encode {told(self.peaks['encode'])}: text encoders {text}; "
            f"denoise {told(self.peaks['denoise'])}: transformer {ways[self.modes['transformer']]}{kept}{batch}; "
            f"decode {told(self.peaks['decode'])}: {strips}"
        )


def told(count: float) -> str:
    """Bytes in words, rounded up."""
    return f"{math.ceil(count / 1e7) / 100:.2f} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"


class Planner:
    """Plans for one model."""

    def __init__(self, networks: Mapping[str, Network], device: torch.device, dtype: torch.dtype) -> None:
        self._networks, self._device, self._dtype = networks, device, dtype
        self._measured: dict[tuple[object, ...], int] = {}
        self._ready = False  # whether what measuring needs is loaded
        self._refused = math.inf  # bytes of weights that were to stay and could not be had
        self._own = self._beside()

    def plan(self, job: Job, budget: int, exact: bool = True) -> Plan:
        """The fastest plan that keeps to `budget` bytes; SettingsError, with what would be needed, where none does.

        exact: without it, where memory abounds, the peaks are bounds from above, found without loading PyTorch's
        compiler, which "meta" tensors need and which takes longer than all else before the first step.
        """
        if self._device.type == "cuda":
            self._own = self._beside()  # others of this process may have come to the device, or left it
        if not exact:
            plan = self.predict(self.ladder()[0], job, job.count, budget, rough=True)
            if self.fits(plan, budget):
                return plan
        if not self._ready and self._device.type == "cpu":
            self._ready = True
            peak_bytes(lambda: torch.zeros(1, device="meta") + 1)  # loads what measuring needs, which is counted too
            self._own = self._beside()
        smallest = None
        for plan in self.plans(job, budget):
            if self.fits(plan, budget):
                return plan
            smallest = plan if smallest is None or plan.peak < smallest.peak else smallest
        assert smallest is not None
        stage = max(smallest.peaks, key=smallest.peaks.__getitem__)
        raise SettingsError(
            f"memory: {told(budget)} do not suffice for {8 * job.columns}x{8 * job.rows}: the smallest plan "
            f"takes {told(smallest.peak)}, to {stage}"
        )

    def fits(self, plan: Plan, budget: int) -> bool:
        """Whether it keeps to the budget, and fewer weights stay than could not be had before."""
        return plan.peak <= budget and self.staying(plan.modes) < self._refused

    def _beside(self) -> int:
        """Bytes that this process has on the device beside this model's networks, or will have."""
        here = {name: network for name, network in self._networks.items() if network.here}
        ours = sum(self.weights(name, network.mode, network.kept) for name, network in here.items())
        return _WORKSPACE.get(self._device.type, 0) + max(0, taken_bytes(self._device) - ours)

    def smaller(self, job: Job, plan: Plan, stage: str) -> Plan | None:
        """A plan for when this one's memory could not be had in a stage: the fastest that takes much less there.

        Where none takes much less, the smallest; None where that takes no less. Where that can be, no other stage takes
        more than this one's most. In the stage "loading" weights come to stay: where they could not, every stage is to
        take less than they would have, and they are not to stay again.
        """
        now, most, refused = plan.peaks[stage], plan.peak, self._refused
        if stage != "decode":  # it may have been a bound from above
            now = self.predict(plan.modes, job, plan.batch, 0, kept=plan.kept).peaks[stage]
        enough = self._own + int(_LESS * (now - self._own))
        if stage == "loading":
            most, refused = enough, min(refused, self.staying(plan.modes))
        loop = enough if stage in ("denoise", "loading") else plan.peaks["denoise"]
        others = [other for other in self.plans(job, enough, loop) if self.staying(other.modes) < refused]
        within = [other for other in others if other.peak <= most] or others
        if stage == "decode":
            within.sort(key=lambda other: other.strip is not None and other.strip < _LOW)
        found = next((other for other in within if other.peaks[stage] <= enough), None)
        found = found or min(within, key=lambda other: (other.peaks[stage], other.peak), default=None)
        if found is None or found.peaks[stage] >= now:
            return None
        self._refused = refused
        return found

    def plans(self, job: Job, budget: int, loop: int | None = None) -> Iterator[Plan]:
        """All plans, the fastest first; each decodes in the highest strips, and keeps the most blocks, that fit.

        loop: bytes that denoising may take, if not the budget.
        """
        batches = [job.count]
        while batches[-1] > 1:
            batches.append(-(-batches[-1] // 2))
        for modes in self.ladder():
            if modes["transformer"] is not Mode.STREAMED:
                yield from (self.predict(modes, job, batch, budget) for batch in batches)
                continue
            if loop is None:  # a C library keeps some of what blocks that come and go leave free
                loop = int(_ROOM * budget) if self._device.type == "cpu" else budget
            every = [self.keeping(modes, job, batch, budget, loop) for batch in batches]
            # Blocks come anew for every batch: where steps wait for them, what counts is how many come for all batches
            # together. Where no step waits, two small batches take hardly longer than a large one.
            yield from sorted(every, key=lambda plan: (plan.blocks - plan.kept) * -(-job.count // plan.batch))

    def keeping(self, modes: dict[str, Mode], job: Job, batch: int, budget: int, loop: int) -> Plan:
        """The plan with as many blocks kept while others come and go as fit into `loop` bytes; none where none do."""
        blocks = range(len(self._networks["transformer"].going(0)))

        def peak(kept: int) -> int:
            return self.predict(modes, job, batch, budget, kept=kept).peaks["denoise"]

        return self.predict(modes, job, batch, budget, kept=max(0, bisect_right(blocks, loop, key=peak) - 1))

    def ladder(self) -> list[dict[str, Mode]]:
        """Where the networks can be, the fastest way first."""
        staged = {n: Mode.STAGED if n in ("transformer", "vae") else Mode.STREAMED for n in self._networks}
        streamed = {**staged, "transformer": Mode.STREAMED}
        if self._device.type == "cpu":
            # To convert weights again for the next picture takes little beside the picture; to keep them takes memory.
            light = {n for n in self._networks if self.weights(n, Mode.RESIDENT) <= _LIGHT * self.size(n)}
            return [{n: Mode.RESIDENT if n in light else mode for n, mode in staged.items()}, staged, streamed]
        resident = dict.fromkeys(self._networks, Mode.RESIDENT)
        return [resident, {**staged, "transformer": Mode.RESIDENT, "vae": Mode.RESIDENT}, staged, streamed]

    def predict(
        self, modes: dict[str, Mode], job: Job, batch: int, budget: int, rough: bool = False, kept: int = 0
    ) -> Plan:
        """The plan with these modes and this batch, decoding in the highest strips that keep it within the budget.

        rough: bounds from above. kept: blocks of the transformer that stay, where it comes block by block.
        """
        encoding = self.encoding_bound if rough else self.encoding
        denoising = self.denoising_bound if rough else self.denoising
        stay = self._own + self.staying(modes)
        if self._device.type == "cpu":  # weights under adapters
            stay += sum(network.source.put_bytes for network in self._networks.values())
        stays = {n: kept if n == "transformer" else 0 for n in modes}
        comes = {n: 0 if mode is Mode.RESIDENT else self.weights(n, mode, stays[n]) for n, mode in modes.items()}
        encoders = [name for name in modes if name not in ("transformer", "vae")]
        encode = max(comes[n] + self.visit(*self.streamed(n, modes[n])) + encoding(n, job) for n in encoders)
        network, table = self._networks["transformer"], self.modulations(job, batch)
        before = self.visit(network, [] if modes["transformer"] is Mode.RESIDENT else network.before)
        loop = self.visit(*self.streamed("transformer", modes["transformer"], kept)) + denoising(job, batch)
        denoise = comes["transformer"] + table + max(before, loop)
        strip, picture = self.decoding(job, int(_ROOM * budget) - stay - comes["vae"])
        peaks = {"encode": stay + encode, "denoise": stay + denoise, "decode": stay + comes["vae"] + picture}
        peaks["loading"] = stay
        blocks = len(network.going(0)) if modes["transformer"] is Mode.STREAMED else 0
        return Plan(modes, batch, strip, peaks, kept, blocks)

    # ---- weights ---------------------------------------------------------------------------------

    def staying(self, modes: dict[str, Mode]) -> int:
        """Bytes of the weights that are on the device for good."""
        return sum(self.weights(name, mode) for name, mode in modes.items() if mode is Mode.RESIDENT)

    def weights(self, name: str, mode: Mode, kept: int = 0) -> int:
        """Bytes of what lies on the device as long as the network is there."""
        network = self._networks[name]
        apart = {n for unit in network.apart(mode, kept) for n in unit.names}
        if self._device.type != "cpu" and network.layout.table is not None:
            apart.add(network.layout.table)
        return network.cost(*(n for n in network.source.shapes if n not in apart))

    def size(self, name: str) -> int:
        """Bytes of all weights of a network, wherever they lie."""
        return sum(map(self._networks[name].source.nbytes, self._networks[name].source.shapes))

    def streamed(self, name: str, mode: Mode, kept: int = 0) -> tuple[Network, list[Unit]]:
        network = self._networks[name]
        return network, network.going(kept) if mode is Mode.STREAMED else []

    def visit(self, network: Network, units: list[Unit]) -> int:
        """Bytes of two of the units, as many as are there at a time."""
        return 2 * max((network.cost(*unit.names) for unit in units), default=0)

    # ---- computation -----------------------------------------------------------------------------

    def encoding(self, name: str, job: Job) -> int:
        """Bytes for the texts of one picture, all at once; with two layers, for more take no more."""
        network = self._networks[name]
        config, dtype = network.module.config, network.source.dtype(next(iter(network.shapes)))
        length = job.t5_length if name == "t5" else config.max_length

        def encode() -> int:
            module = on_meta(type(network.module), replace(config, num_layers=2), dtype)
            return peak_bytes(module, torch.zeros(job.texts, length, dtype=torch.long, device="meta"))

        return self._once((name, job.texts, length), encode)

    def encoding_bound(self, name: str, job: Job) -> int:
        """Bytes that `encoding` does not exceed."""
        network = self._networks[name]
        config, dtype = network.module.config, network.source.dtype(next(iter(network.shapes)))
        length = job.t5_length if name == "t5" else config.max_length
        wide = config.d_ff if name == "t5" else config.intermediate_size
        return dtype.itemsize * job.texts * length * (8 * wide + 4 * config.num_heads * length)

    def texts(self, job: Job, plan: Plan, budget: int, most: int) -> int:
        """How many texts can be encoded at a time under a plan for this job: as many as the job's, at most `most`."""
        encoders = [name for name in self._networks if name not in ("transformer", "vae")]

        def more(texts: int) -> int:
            larger = job._replace(texts=texts)
            return max(self.encoding(name, larger) - self.encoding(name, job) for name in encoders)

        while most > job.texts and plan.peaks["encode"] + more(most) > budget:
            most = -(-most // 2)
        return most if most > job.texts else job.texts

    def modulations(self, job: Job, batch: int) -> int:
        """Bytes of what every block is told in all steps, and once more in this one for each picture of a batch."""
        shapes = self._networks["transformer"].shapes
        each = sum(shape[0] for name, shape in shapes.items() if name.endswith("adaLN_modulation.1.weight"))
        texts = job.texts * (batch if job.apart else 1)
        spread = job.texts * batch if texts < job.texts * batch else 0
        return (job.steps * texts + spread) * each * self._dtype.itemsize

    def denoising(self, job: Job, batch: int) -> int:
        """Bytes for one step of `batch` pictures, by a transformer of two blocks, for more take no more."""
        network = self._networks["transformer"]
        config = network.module.config
        short = replace(config, depth=2, dual_attention_blocks=config.dual_attention_blocks[:1] and (0,))
        length = self._networks["clip_l"].module.config.max_length + job.t5_length
        size = (batch, config.in_channels, job.rows, job.columns)
        texts, each = (job.texts * batch, 1) if job.apart else (job.texts, batch)

        def step(model: Any) -> object:
            context = torch.empty(texts, length, config.context_size, dtype=self._dtype, device="meta")
            pooled = torch.empty(texts, config.pooled_size, dtype=self._dtype, device="meta")
            attention_by(model, job.attention)
            latents = torch.cat([torch.empty(size, device="meta")] * job.texts).to(self._dtype)
            rows = [text for text in range(texts) for _ in range(each)]
            return Prepared(model, context, pooled)(latents, 1.0, rows).float()

        return self._once(
            (size, job.texts, texts, length, job.attention),
            lambda: peak_bytes(step, network.change(on_meta(MMDiT, short, self._dtype))),
        )

    def denoising_bound(self, job: Job, batch: int) -> int:
        """Bytes that `denoising` does not exceed."""
        config = self._networks["transformer"].module.config
        length = self._networks["clip_l"].module.config.max_length + job.t5_length
        rows = job.texts * batch
        tokens = rows * (job.rows * job.columns // config.patch_size**2 + length)
        return self._dtype.itemsize * (tokens * _UNITS * config.hidden_size + rows * length * config.context_size)

    def _once(self, key: tuple[object, ...], measure: Callable[[], int]) -> int:
        if key not in self._measured:
            self._measured[key] = measure()
        return self._measured[key]

    def decoding(self, job: Job, budget: int) -> tuple[int | None, int]:
        """The height of the strips, None for the whole, and the bytes for one picture in them."""
        network, apart = self._networks["vae"], self._device.type != "cpu"
        config, dtype = network.module.config, network.source.dtype(next(iter(network.shapes)))
        rows = rows_for(config, job.rows, job.columns, dtype, budget, apart) or 1
        if not apart and dtype.itemsize == 2:  # strips are faster there; float32 keeps to the plain path's bits
            rows = min(rows, cpu_rows(job.rows, job.columns))
        rows = -(-job.rows // -(-job.rows // rows))  # as many strips of equal height
        strip = None if rows >= job.rows else rows
        return strip, decode_peak(config, job.rows, job.columns, strip, dtype, apart)


def budget_of(memory: str, device: torch.device) -> int:
    """Bytes that `--memory` allows; of "auto" most of what is free on the device. SettingsError for what is no size."""
    given = memory_bytes(memory)
    if given is not None:
        return given
    free = free_bytes(device)
    return max(0, min(int(_SHARE * free), free - _LIBRARY)) if device.type == "cuda" else int(_SHARE * free)


class DeviceMemoryError(ValueError):
    """The device's memory does not suffice; the message names the stage and what to try."""


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn running out of memory, the device's or the host's, into a DeviceMemoryError that names the stage."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = ("out of memory", "not enough memory", "can't allocate memory", *_LIBRARIES)
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(w in str(error) for w in words):
            raise
        tries = "--quantise int8, --t5 off, a smaller picture, or --device cpu"
        said = f" ({str(error).splitlines()[0]})" if any(word in str(error) for word in _LIBRARIES) else ""
        raise DeviceMemoryError(f"{what}: the device's memory does not suffice{said}; try {tries}") from None


def taken_bytes(device: torch.device) -> int:
    """What this process has on the device already."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return own_bytes() if device.type == "cpu" else 0


def free_bytes(device: torch.device) -> int:
    """What this process may take of the device without harm to others, what it has there already included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    available = available_bytes()
    if available is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return available + own_bytes()
