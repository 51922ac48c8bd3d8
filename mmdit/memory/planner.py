"""Choosing a plan: the fastest whose predicted peak keeps to a budget."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping

import torch

from mmdit.common.errors import SettingsError
from mmdit.memory.costs import Costs
from mmdit.memory.meter import peak_bytes
from mmdit.memory.plan import Bytes, Job, Plan, told
from mmdit.memory.residency import Mode, Network, Role, of_role

_LIGHT = 0.25  # of a network's weights: so few that need memory beside the mapped file may stay
_LESS = 0.75  # of the memory that could not be had
_CUT = {"init": "init_strip", "decode": "strip"}  # stages that may go in strips, and the plan's field for their height
_LOW = 16  # rows of the latent: strips lower than this are slow
_ROOM = 0.95  # of a budget, for decoding, where convolutions may take memory of their own, and for blocks that stay


class Planner:
    """Plans for one model."""

    def __init__(self, networks: Mapping[str, Network], device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of the latents, as the networks that denoise are given them."""
        self.costs = Costs(networks, device, dtype)
        self._networks, self._device = networks, device
        self._ready = False  # whether what measuring needs is loaded
        self.refused = math.inf  # bytes of weights that were to stay and could not be had
        self._beside, self._expected = self.costs.beside(), 0

    # ---- choosing --------------------------------------------------------------------------------

    def plan(self, job: Job, budget: int, exact: bool = True) -> Plan:
        """The fastest plan that keeps to `budget` bytes; SettingsError, with what would be needed, where none does.

        exact: without it, where memory abounds, the peaks are bounds from above, found without loading PyTorch's
        compiler, which "meta" tensors need and which takes longer than all else before the first step. They hold for
        the published architecture, so a variant is measured all the same.
        """
        if self._device.type != "cpu":  # others of this process may have come to the device, or left it
            self._beside = max(self.costs.beside(), self._expected)
        if not exact and not any(getattr(network.module, "variant", "") for network in self._networks.values()):
            plan = self.predict(self.ladder()[0], job, job.count, budget, rough=True)
            if self._fits(plan, budget):
                return plan
        self._load()
        smallest = None
        for plan in self.plans(job, budget):
            if self._fits(plan, budget):
                return plan
            smallest = plan if smallest is None or plan.peak < smallest.peak else smallest
        assert smallest is not None
        stage = max(smallest.peaks, key=smallest.peaks.__getitem__)
        raise SettingsError(
            f"memory: {told(budget)} do not suffice for {8 * job.columns}x{8 * job.rows}: the smallest plan "
            f"takes {told(smallest.peak)}, to {stage}"
        )

    def smaller(self, job: Job, plan: Plan, stage: str) -> Plan | None:
        """A plan for when this one's memory could not be had in a stage: the fastest that takes much less there.

        Where none takes much less, the smallest; None where that takes no less. Where that can be, no other stage takes
        more than this plan's peak. In the stage "loading" weights come to stay: where they could not, every stage is to
        take less than they would have, and they are not to stay again.
        """
        took, most, refused = plan.peaks[stage], plan.peak, self.refused
        if stage not in _CUT:  # it may have been a bound from above
            took = self.predict(plan.modes, job, plan.batch, 0, kept=plan.kept).peaks[stage]
        budget = self._beside + int(_LESS * (took - self._beside))
        if stage == "loading":
            most, refused = budget, min(refused, self.costs.staying(plan.modes))
        loop = budget if stage in ("denoise", "loading") else plan.peaks["denoise"]
        others = [other for other in self.plans(job, budget, loop) if self.costs.staying(other.modes) < refused]
        others = [other for other in others if other.peak <= most] or others
        if stage in _CUT:
            others.sort(key=lambda other: (getattr(other, _CUT[stage]) or _LOW) < _LOW)
        found = next((other for other in others if other.peaks[stage] <= budget), None)
        found = found or min(others, key=lambda other: (other.peaks[stage], other.peak), default=None)
        if found is None or found.peaks[stage] >= took:
            return None
        self.refused = refused
        return found

    def texts(self, job: Job, plan: Plan, budget: int, most: int) -> int:
        """How many texts can be encoded at a time under a plan for this job: as many as the job's, at most `most`."""
        encoders, encoding = of_role(Role.ENCODES_TEXT, self._networks), self.costs.activations.encoding

        def more(texts: int) -> int:
            larger = job._replace(texts=texts)
            return max((encoding(name, larger) - encoding(name, job) for name in encoders), default=0)

        while most > job.texts and plan.peaks["encode"] + more(most) > budget:
            most = -(-most // 2)
        return max(most, job.texts)

    def _fits(self, plan: Plan, budget: int) -> bool:
        """Whether it keeps to the budget, and fewer weights stay than could not be had before."""
        return plan.peak <= budget and self.costs.staying(plan.modes) < self.refused

    def _load(self) -> None:
        """On a CPU, load what measuring needs now: it is of the memory that is there beside the model."""
        if not self._ready and self._device.type == "cpu":
            self._ready = True
            peak_bytes(lambda: torch.zeros(1, device="meta") + 1)
            self._beside = self.costs.beside()

    def expect(self, nbytes: int) -> None:
        """Plan with so much more beside the model than there is now, since its user is going to have it there."""
        self._load()
        self._beside = self._expected = self._beside + nbytes

    # ---- what there is to choose from ------------------------------------------------------------

    def plans(self, job: Job, budget: int, loop: int | None = None) -> Iterator[Plan]:
        """All plans, the fastest first; each decodes in the highest strips, and keeps the most blocks, that fit.

        loop: bytes that denoising may take, if not the budget.
        """
        batches = [job.count]
        while batches[-1] > 1:
            batches.append(-(-batches[-1] // 2))
        for modes in self.ladder():
            if Mode.STREAMED not in (modes[name] for name in of_role(Role.DENOISES, modes)):
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
        blocks = range(self._blocks(modes))

        def peak(kept: int) -> int:
            return self.predict(modes, job, batch, budget, kept=kept).peaks["denoise"]

        return self.predict(modes, job, batch, budget, kept=max(0, bisect_right(blocks, loop, key=peak) - 1))

    def ladder(self) -> list[dict[str, Mode]]:
        """Where the networks can be, the fastest way first."""
        encoders, denoisers = (of_role(role, self._networks) for role in (Role.ENCODES_TEXT, Role.DENOISES))
        resident = dict.fromkeys(self._networks, Mode.RESIDENT)
        if any(network.editable for network in self._networks.values()):
            return [resident]
        staged = dict.fromkeys(self._networks, Mode.STAGED) | dict.fromkeys(encoders, Mode.STREAMED)
        streamed = staged | dict.fromkeys(denoisers, Mode.STREAMED)
        if self._device.type == "cpu":
            # To convert weights again for the next picture takes little beside the picture; to keep them takes memory.
            light = [n for n in resident if self.costs.weights(n, Mode.RESIDENT) <= _LIGHT * self.costs.size(n)]
            return [staged | dict.fromkeys(light, Mode.RESIDENT), staged, streamed]
        return [resident, resident | dict.fromkeys(encoders, Mode.STREAMED), staged, streamed]

    def predict(
        self, modes: dict[str, Mode], job: Job, batch: int, budget: int, rough: bool = False, kept: int = 0
    ) -> Plan:
        """The plan with these modes and this batch, decoding in the highest strips that keep it within the budget.

        rough: bounds from above. kept: blocks that stay of a network that denoises, where it comes block by block.
        """
        costs, waiting = self.costs, job.waiting if self._device.type == "cpu" else 0
        always = Bytes(beside=self._beside + costs.adapted() + waiting, staying=costs.staying(modes))
        room = int(_ROOM * budget) - always.peak
        strip, decode = costs.decoding(modes, job, room)
        init_strip, init = costs.encoding_picture(modes, job, room) if job.init else (None, Bytes())
        stages = {
            "encode": always.plus(costs.encoding(modes, job, rough)),
            **({"init": always.plus(init)} if job.init else {}),
            "denoise": always.plus(costs.denoising(modes, kept, job, batch, rough)),
            "decode": always.plus(decode),
            "loading": always,
        }
        locked = costs.locked(modes, kept, job, strip)
        return Plan(modes, batch, strip, stages, kept, self._blocks(modes), locked, init_strip)

    def _blocks(self, modes: dict[str, Mode]) -> int:
        """How many blocks come and go where none is kept."""
        streamed = [name for name in of_role(Role.DENOISES, modes) if modes[name] is Mode.STREAMED]
        return max((len(self._networks[name].going(0)) for name in streamed), default=0)
