"""Texts that were encoded, kept from run to run: for a server, or a program that draws the same prompts over and over.

    pipe.remembered = Remembered(256e6)

What is kept are the texts of one picture together, as they are encoded where it is drawn alone: so a picture that is
drawn alone is bit for bit the one that it is without this. They are forgotten when adapters change. Where encoders may
change unseen, because the model was loaded with `editable`, hooks look on or methods were replaced, nothing is kept and
nothing answered. Writing to weights of a model that is not editable is not seen.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules import module as everywhere

from mmdit.driver.reading import Text
from mmdit.memory.residency import Role, of_role
from text_encoders import Conditioning, TextEncoder

if TYPE_CHECKING:
    from mmdit.driver.stages import Stages

Unit = tuple[Text, ...]  # the texts of a picture
Texts = dict[Text, Conditioning]  # each a batch of 1, on the CPU


class Remembered:
    """Encoded texts, of bytes at most; those that were asked for longest ago go first."""

    def __init__(self, most: float) -> None:
        """most: bytes of the host's memory, which a plan for the CPU takes into account."""
        self.most, self.bytes = int(most), 0
        self.hits = self.misses = 0  # texts
        self._kept: OrderedDict[Unit, Texts] = OrderedDict()
        self._state: object = None

    def find(self, stages: "Stages", unit: Unit) -> Texts | None:
        """The texts of a picture, if they were encoded by what would encode them now; copies."""
        state = state_of(stages)
        if state is None or state != self._state:
            self._kept.clear()
            self._state, self.bytes = state, 0
        found = self._kept.get(unit)
        if found is None:
            self.misses += len(unit)
            return None
        self._kept.move_to_end(unit)
        self.hits += len(unit)
        return copied(found)

    def keep(self, unit: Unit, texts: Texts) -> None:
        """Remember what was just encoded because `find` found nothing."""
        size = size_of(texts)
        if self._state is None or size > self.most or unit in self._kept:
            return
        self._kept[unit] = copied(texts)
        self.bytes += size
        while self.bytes > self.most:
            self.bytes -= size_of(self._kept.popitem(last=False)[1])


def copied(texts: Texts) -> Texts:
    """Whoever looks on may write into what they see."""
    return {text: Conditioning(one.context.clone(), one.pooled.clone(), one.tokens) for text, one in texts.items()}


def size_of(texts: Texts) -> int:
    every = [tensor for one in texts.values() for tensor in (one.context, one.pooled, *one.tokens.values())]
    return sum(tensor.numel() * tensor.itemsize for tensor in every)


def state_of(stages: "Stages") -> object | None:
    """What an encoding depends on beside its texts, to be compared; None where that cannot be told."""
    text, networks = stages.text, stages.parts.networks
    own = [networks[name] for name in of_role(Role.ENCODES_TEXT, networks)]
    modules = [module for network in own for module in network.module.modules()]
    if type(text) is not TextEncoder or any(network.editable for network in own):
        return None
    if "encode" in vars(stages) or "encode" in vars(text) or any(map(touched, modules)) or _hooks(everywhere):
        return None
    return stages.actual["weights"], stages.actual["lora"], text, modules


def touched(module: nn.Module) -> bool:
    """Whether somebody else's hooks look at its calls, or its forward was replaced."""
    return "forward" in vars(module) or bool(_hooks(module))


def _hooks(of: Any) -> list[Any]:
    """Hooks of a module, or of all modules, that are not this engine's, which only bring weights."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    lists = [getattr(of, name, None) or getattr(of, f"_global{name}", {}) for name in names]
    every = [hook for some in lists for hook in some.values()]
    return [hook for hook in every if not getattr(hook, "__module__", "").startswith("mmdit.memory.")]
