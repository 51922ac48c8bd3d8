"""Merging adapters into a model's weights and taking them out: `Adapters`, bound to networks.

A weight under adapters is a new tensor, computed in float32 from the original by all of them in the order they were
added, and rounded once to the original's dtype; a step of the sampler costs nothing more. The original is put back as
it was. Nothing is ever written into a weight: it may be a view of a file.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from weights.adapters.kinds import Tensors, changed
from weights.adapters.plan import Plan, Report, Step, make_plan
from weights.adapters.scale import alpha_factor
from weights.adapters.targets import Lookup
from weights.errors import CheckpointError
from weights.fingerprint import of_adapter
from weights.keymap import convert

Place = tuple[str, str]  # component and name of a tensor in it

_LARGEST = 1e15  # of a scale and of what alpha makes of it: their product is a float32


class Change(NamedTuple):
    """What one module of a file does to one tensor of the model."""

    module: str  # as spelled in the file, for messages
    step: Step
    tensors: Tensors  # on the CPU, in the file's dtype
    factor: float  # s, by alpha and rank


@dataclass(frozen=True)
class Active:
    """An adapter that is merged in."""

    path: Path
    scale: float
    changes: dict[Place, list[Change]]
    contents: str = ""  # a hash of its files, as they were when it was merged


class Weights(Protocol):
    """Where a network's weights are read and replaced; `weights.fill.Source` is one."""

    shapes: dict[str, tuple[int, ...]]

    def original(self, name: str) -> Tensor:
        """The weight without adapters."""
        ...

    def put(self, name: str, tensor: Tensor | None) -> None:
        """Compute with this from now on; None: with the original."""
        ...


class FilledModule:
    """The weights of a filled module. The original of a replaced one rests on the CPU and comes back as it was."""

    def __init__(self, module: nn.Module) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        self._module = module
        self._originals: dict[str, nn.Parameter] = {}

    def original(self, name: str) -> Tensor:
        now = self._module.get_parameter(name)
        return self._originals.get(name, now).detach().to(now.device)

    def put(self, name: str, tensor: Tensor | None) -> None:
        now = self._module.get_parameter(name)
        original, device = self._originals.setdefault(name, now), now.device
        if tensor is None:
            parameter = self._originals.pop(name)
            original.data = original.data.to(device)
        else:
            parameter = nn.Parameter(tensor.to(device), original.requires_grad)
            original.data = original.data.cpu()
        owner, _, leaf = name.rpartition(".")
        self._module.get_submodule(owner)._parameters[leaf] = parameter


class Adapters:
    """The adapters of a model."""

    def __init__(self, networks: Mapping[str, Weights | nn.Module]) -> None:
        """networks: of "transformer", "clip_l", "clip_g" and "t5".

        A module is filled, or on "meta" for `plan` alone; it may be moved while an adapter is in, not converted.
        `turn`, a context, is entered while weights change: whoever computes with them in other threads holds it too.
        """
        self.turn: AbstractContextManager[object] = nullcontext()
        self._networks = {n: FilledModule(it) if isinstance(it, nn.Module) else it for n, it in networks.items()}
        self._active: dict[str, Active] = {}
        self._merged: dict[Place, Tensor] = {}

    @cached_property
    def _lookup(self) -> Lookup:
        return Lookup({name: network.shapes for name, network in self._networks.items()})

    @property
    def scales(self) -> dict[str, float]:
        """{name: scale} of those merged in, in their order."""
        return {name: adapter.scale for name, adapter in self._active.items()}

    @property
    def settings(self) -> tuple[str, ...]:
        """Those merged in as `--lora` takes them, FILE_OR_FOLDER:SCALE."""
        return tuple(f"{adapter.path}:{adapter.scale!r}" for adapter in self._active.values())

    @property
    def contents(self) -> tuple[str, ...]:
        """A hash of what each of those merged in holds, in their order."""
        return tuple(adapter.contents for adapter in self._active.values())

    def plan(self, path: str | Path) -> Plan:
        """What `add` would do, from the file's header; raises what it would raise for the names and shapes."""
        try:
            path = Path(path).expanduser()
            path.exists()
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        return make_plan(path, self._lookup, self._networks)

    def add(self, path: str | Path, scale: float = 1.0) -> Report:
        """Merge an adapter, a file or a folder, on top of those that are in; scale 0 leaves the weights as they were.

        Returns what applied, under a name for `rescale` and `remove`; warns, on one line, of what did not. Raises
        CheckpointError, leaving the weights as they were, where nothing applies, for another model's adapter and for
        files that cannot be used.
        """
        check_scale(scale)
        plan = self.plan(path)
        changes, contents = read_changes(plan), of_adapter(plan.report.path)
        with self.turn:
            name, again = plan.report.name, 2
            while name in self._active:
                name, again = f"{plan.report.name}-{again}", again + 1
            report = replace(plan.report, name=name)
            self._merge({**self._active, name: Active(report.path, float(scale), changes, contents)}, changes)
        if (warning := report.warning()) is not None:
            warnings.warn(warning, stacklevel=2)
        return report

    def rescale(self, name: str, scale: float) -> None:
        """Give an adapter another scale, in its place among the others. Raises CheckpointError for an unknown name."""
        check_scale(scale)
        with self.turn:
            adapter = replace(self._known(name), scale=float(scale))
            self._merge({**self._active, name: adapter}, adapter.changes)

    def remove(self, name: str | None = None) -> None:
        """Take an adapter out, or all; what no adapter changes any more is the original parameter again.

        Raises CheckpointError for an unknown name.
        """
        with self.turn:
            gone = list(self._active) if name is None else [name]
            places = {place for n in gone for place in self._known(n).changes}
            self._merge({n: adapter for n, adapter in self._active.items() if n not in gone}, places)

    def _known(self, name: str) -> Active:
        if name not in self._active:
            raise CheckpointError(f"no adapter {name!r}: there are {', '.join(self._active) or 'none'}")
        return self._active[name]

    @torch.no_grad()
    def _merge(self, active: dict[str, Active], places: Iterable[Place]) -> None:
        """Make `active` the adapters that are in; places: the tensors that differ for it. All or nothing."""
        before: dict[Place, Tensor | None] = {}
        try:
            for place in places:
                todo = [(a, c) for a in active.values() if a.scale != 0 for c in a.changes.get(place, ())]
                before[place] = self._merged.get(place)
                original = self._networks[place[0]].original(place[1])
                self._put(place, merged_tensor(place[1], original, todo) if todo else None)
        except BaseException:
            for place, tensor in before.items():
                self._put(place, tensor)
            raise
        self._active = active

    def _put(self, place: Place, tensor: Tensor | None) -> None:
        part, name = place
        self._networks[part].put(name, tensor)
        self._merged.pop(place, None)
        if tensor is not None:
            self._merged[place] = tensor


def check_scale(scale: float) -> None:
    """Raise CheckpointError for a scale that is not a number which float32 can compute with."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= _LARGEST:
        raise CheckpointError(f"an adapter's scale is {scale!r:.60}: expected a number, 1 for as it was trained")


def read_changes(plan: Plan) -> dict[Place, list[Change]]:
    """{what is changed: the changes of a plan, their tensors read}."""
    changes: dict[Place, list[Change]] = {}
    for module, tensors in plan.file.read(plan.steps).items():
        step = plan.steps[module]
        change = Change(module, step, tensors, _factor(plan, module, tensors))
        for leaf, there in (("weight", step.kind), ("bias", step.bias)):
            if there:
                changes.setdefault((step.target.component, f"{step.target.module}.{leaf}"), []).append(change)
    return changes


def _factor(plan: Plan, module: str, tensors: Tensors) -> float:
    """s of one module; a bias that comes without a weight has none."""
    kind = plan.steps[module].kind
    if kind is None:
        return 1.0
    rank = kind.rank({role: tuple(t.shape) for role, t in tensors.items()})
    scaling, name = plan.file.scaling(module)
    if scaling is not None and kind.name == scaling.kind:
        factor = scaling.factor(name, rank)
    elif rank is None:
        factor = 1.0
    else:
        factor = alpha_factor(tensors["alpha"].float().item() if "alpha" in tensors else None, rank)
    if not abs(factor) <= _LARGEST:
        raise CheckpointError(f"{plan.file.path}: {module}: the factor of its alpha is {factor}: expected a number")
    return factor


def merged_tensor(name: str, original: Tensor, todo: list[tuple[Active, Change]]) -> Tensor:
    """A new tensor: the original under all changes, in order. Raises CheckpointError where it is not finite."""
    some = any(change.step.target.rows for _, change in todo)
    value = original.detach().to(torch.float32, copy=some)  # rows are written into it, all of it is replaced
    for adapter, change in todo:
        target = change.step.target
        tensors = {role: t.to(value.device, torch.float32) for role, t in change.tensors.items()}
        rows = value if target.rows is None else value[slice(*target.rows)]
        # In the order of rows that the adapter was trained on.
        seen = convert("swap_halves", [rows]) if target.swap else rows
        new = (_bias if name.endswith(".bias") else _weight)(seen, change, tensors, adapter)
        new = convert("swap_halves", [new]) if target.swap else new
        if target.rows is None:
            value = new
        else:
            rows.copy_(new)
    result = value.to(original.dtype)
    if not all(map(math.isfinite, torch.stack(torch.aminmax(result)).tolist())):
        path, module, dtype = todo[-1][0].path, todo[-1][1].module, str(original.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path}: with its {module}, {name} has NaN or infinity in {dtype}: expected finite numbers"
        )
    return result


def _weight(weight: Tensor, change: Change, tensors: Tensors, adapter: Active) -> Tensor:
    assert change.step.kind is not None
    return changed(weight, change.step.kind, tensors, change.factor, adapter.scale)


def _bias(bias: Tensor, change: Change, tensors: Tensors, adapter: Active) -> Tensor:
    """`up_bias` is LoRA's and has its factor; `diff_b` is a difference and has none."""
    if "up_bias" in tensors:
        bias = bias + adapter.scale * change.factor * tensors["up_bias"]
    return bias + adapter.scale * tensors["diff_b"] if "diff_b" in tensors else bias
