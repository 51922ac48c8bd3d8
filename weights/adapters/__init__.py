"""Adapters: LoRA and its relatives, merged into the weights of a filled model, and taken out again.

    adapters = Adapters({"transformer": transformer, "clip_l": clip_l})
    report = adapters.add("style.safetensors", 0.8)
    adapters.rescale(report.name, 0.5)
    adapters.remove(report.name)

`groups` sorts a file's tensors by module and role, `targets` says which weight of the model a module's name means in
any of the dialects, `scale` what alpha makes of the strength, `kinds` holds the arithmetic of each kind, `plan` puts
these together from the headers alone, and `merge` applies plans. The package knows names and shapes only: it is given
the modules and imports none of them.
"""

from weights.adapters.merge import Adapters
from weights.adapters.plan import Plan, Report

__all__ = ["Adapters", "Plan", "Report"]
