"""What an adapter would do to a model, decided from headers: before a weight is read, it is known what applies."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmdit.common.errors import one_line
from weights.adapters.groups import AdapterFile, open_adapter
from weights.adapters.kinds import DIFF, SET, Kind, Shapes, fits, kind_of, magnitude_shape
from weights.adapters.targets import Lookup, Target, is_idle, other_model, owner
from weights.errors import CheckpointError

_SHOWN, _LONGEST = 3, 160  # names in a message, characters of one
_PEFT = "adapter_model.safetensors"
_BIAS_ROLES = ("up_bias", "diff_b")


@dataclass(frozen=True)
class Step:
    """What one module of the file changes: kind None leaves the weight, bias False leaves the bias."""

    target: Target
    kind: Kind | None
    bias: bool


@dataclass
class Report:
    """What became of an adapter's modules, by the names they have in the file.

    name: what `Adapters` calls it from now on; applied: those merged; absent: how many are for a component that is not
    loaded; unknown: those the model does not have; unfit: why a module could not be used; notes: anything else.
    """

    name: str
    path: Path
    applied: tuple[str, ...] = ()
    absent: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def left_out(self) -> str:
        """What does not apply, on one line; empty if all does."""
        told = [f"{_modules(n)} of {part}, which is not loaded" for part, n in self.absent.items()]
        if self.unknown:
            told.append(f"{len(self.unknown)} that this model does not have ({_first(self.unknown)})")
        if self.unfit:
            told.append(f"{len(self.unfit)} that do not fit ({_first(f'{k} {v}' for k, v in self.unfit.items())})")
        return "; ".join(told)

    def warning(self) -> str | None:
        """One line if a part was left out or guessed, else None."""
        left_out = self.left_out()
        told = [f"{_modules(len(self.applied))} applied, left out: {left_out}"] if left_out else []
        return one_line(f"{self.path}: {'; '.join([*told, *self.notes])}") if told or self.notes else None


@dataclass
class Plan:
    """An opened adapter and its steps by module as spelled in the file."""

    file: AdapterFile
    steps: dict[str, Step]
    report: Report


def make_plan(path: Path, lookup: Lookup, components: Collection[str]) -> Plan:
    """Open an adapter and resolve its modules; reads headers only.

    Raises CheckpointError where it is for another model, nothing of it applies, or it cannot be used at all.
    """
    file = open_adapter(path)
    report = Report(_name(path), path, unknown=list(file.unknown))
    shapes = {module: {role: info.shape for role, info in roles.items()} for module, roles in file.groups.items()}
    stranger = other_model({module: _delta_shape(roles) for module, roles in shapes.items()}, lookup.width)
    if stranger is not None:
        here = f" (width {lookup.width})" if "width" in stranger else ""
        raise CheckpointError(f"{path}: an adapter for {stranger}; this model is Stable Diffusion 3 or 3.5{here}")
    steps = _steps(shapes, lookup, components, report)
    if not steps:
        raise CheckpointError(
            f"{path}: nothing of it applies to this model: {report.left_out() or 'it has a projection of CLIP-L only'}"
        )
    bare = any(module.startswith("base_model.model.") and "alpha" not in shapes[module] for module in steps)
    if bare and not file.scalings:
        report.notes.append("no alpha and no adapter_config.json beside it: taken as trained with scale 1")
    report.applied = tuple(steps)
    return Plan(file, steps, report)


def _steps(
    modules: Mapping[str, Shapes], lookup: Lookup, components: Collection[str], report: Report
) -> dict[str, Step]:
    """The modules that apply; what becomes of the others goes into the report."""
    steps: dict[str, Step] = {}
    claimed: dict[tuple[Target, str], str] = {}
    for module, roles in modules.items():
        target = lookup.find(module)
        if owner(module) not in components:
            report.absent[owner(module)] = report.absent.get(owner(module), 0) + 1
        elif target is None and not is_idle(module):
            report.unknown.append(module)
        elif target is not None:
            try:
                step = _step(target, roles)
                _claim(claimed, module, step)
            except ValueError as error:
                report.unfit[module] = str(error)
                continue
            steps[module] = step
            if not step.bias and not roles.keys().isdisjoint(_BIAS_ROLES):
                report.unfit[f"{module} (bias)"] = "has no place in the model"
    return steps


def _step(target: Target, shapes: Shapes) -> Step:
    """Raises ValueError, on one line, for tensors that cannot change this target."""
    kind = kind_of(shapes)
    if kind is not None:
        shape = kind.shape(shapes)
        if not fits(shape, target.shape):
            raise ValueError(f"is {list(shape)}, should be {list(target.shape)}")
        dora = magnitude_shape(shapes, target.shape) is not None
        if len(target.shape) == 1 and (dora or kind not in (DIFF, SET)):
            what = "DoRA" if dora else kind.name
            raise ValueError(f"is {what}, which changes matrices; a norm's vector takes diff, w_norm or set_weight")
    found = [shapes[role] for role in _BIAS_ROLES if role in shapes]
    for shape in found:
        if shape != target.shape[:1]:
            raise ValueError(f"has a bias of {list(shape)}, should be {list(target.shape[:1])}")
    if found and not target.bias and kind is None:
        raise ValueError("has a bias, the model's has none")
    if kind is None and not found:
        raise ValueError(f"has only {', '.join(shapes)}")
    return Step(target, kind, bool(found) and target.bias)


def _claim(claimed: dict[tuple[Target, str], str], module: str, step: Step) -> None:
    """Raises ValueError where the file has the same rows under another name: some converters write two spellings."""
    leaves = [leaf for leaf, there in (("weight", step.kind), ("bias", step.bias)) if there]
    for leaf in leaves:
        if (step.target, leaf) in claimed:
            raise ValueError(f"is {claimed[step.target, leaf]} again")
    claimed.update({(step.target, leaf): module for leaf in leaves})


def _name(path: Path) -> str:
    """The file's name without ending; the folder's, where every such file is named alike."""
    if path.is_file() and path.name != _PEFT:
        return path.stem
    return (path.parent if path.is_file() else path).resolve().name


def _delta_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    try:
        kind = kind_of(shapes)
        return kind.shape(shapes) if kind else ()
    except (ValueError, IndexError):
        return ()


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"


def _first(names: Iterable[str]) -> str:
    names = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in names]
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
