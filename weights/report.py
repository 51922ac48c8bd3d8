"""The facts of `inspect` as lines for people."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from mmdit.common.errors import one_line

_SHOWN = 8  # of many ranks or alphas


def report(found: Mapping[str, Any]) -> list[str]:
    """What `inspect` returned, first the path with what it is, then one fact a line."""
    model = f"{found['model']}, " if found["model"] and found["kind"] == "checkpoint" else ""
    rows = [("format", f"{found['format']}; {_amount(found)}")]
    rows += [(part["name"], f"{_layout(part)}; {_amount(part)}") for part in found["components"]]
    if found["kind"] == "checkpoint":
        rows.append(("missing", ", ".join(found["missing"]) or "nothing"))
    rows += [("quantised", way) for way in found["quantisation"]]
    rows += _adapter(found["adapter"]) if found["adapter"] else []
    rows += [("metadata", f"{key}: {value}") for key, value in found["metadata"].items()]
    rows += [("note", note) for note in found["notes"]]
    rows.append(
        ("load", command(found["load"])) if found["load"]["loads"] else ("load", f"no: {found['load']['reason']}")
    )
    return [one_line(f"{found['path']}: {model}{found['what']}"), *(one_line(f"  {k:<12}{v}") for k, v in rows)]


def command(load: Mapping[str, Any]) -> str:
    """The command line that draws with what was inspected; names in capitals stand for files to be given."""
    options = [shlex.quote(word) for word in load["options"]]
    model = [] if "--model" in load["options"] else ["--model MODEL"]
    return " ".join(['python -m mmdit.run "a horse"', *model, *options, *load["needs"]])


def _adapter(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = {
        "dialect": ", ".join(facts["dialects"]),
        "kinds": _counted(facts["kinds"]),
        "targets": _counted(facts["targets"]),
        "rank": _few(facts["ranks"]),
        "alpha": _few(facts["alphas"]) or ("none: 1 is taken for its scale" if facts["ranks"] else ""),
    }
    return [(key, value) for key, value in rows.items() if value]


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _few(numbers: Iterable[float]) -> str:
    texts = [f"{number:g}" for number in numbers]
    return ", ".join(texts if len(texts) <= _SHOWN else [*texts[: _SHOWN - 2], "...", texts[-1]])


def _layout(part: Mapping[str, Any]) -> str:
    return f"{part['layout']} names" + (f" under {part['prefix']}" if part["prefix"] else "")


def _amount(sizes: Mapping[str, Any]) -> str:
    words = sorted(sizes["dtypes"], key=lambda word: -sizes["dtypes"][word]["bytes"])
    numbers = f"{_short(sizes['parameters']).strip()} parameters, {_short(sizes['bytes'])}B"
    count = f"{sizes['tensors']} tensor{'' if sizes['tensors'] == 1 else 's'}"
    return f"{count}, {numbers}" + (f"; {', '.join(words)}" if words else "")


def _short(number: int) -> str:
    """Three digits and a unit of thousands."""
    units = ["", "k", "M", "G", "T", "P", "E"]
    value, unit = float(number), 0
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {units[unit]}" if unit else f"{number} "
