"""Texts that were encoded, kept from run to run: for a server, or a program that draws the same prompts over and over.

    pipe.remembered = Remembered(256e6)

What is kept are the texts of one picture together, as they are encoded where it is drawn alone: so a picture that is
drawn alone is bit for bit the one that it is without this. They are forgotten when adapters change. Where encoders may
change unseen, because the model was loaded with `editable`, hooks look on or methods were replaced, nothing is kept and
nothing answered. Writing to weights of a model that is not editable is not seen.
"""

from collections import OrderedDict

from mmdit.driver.reading import Text
from text_encoders import Conditioning

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

    def find(self, unit: Unit, state: object | None) -> Texts | None:
        """The texts of a picture, if they were encoded by what would encode them now; copies.

        state: what an encoding depends on beside its texts, to be compared; None where that cannot be told.
        """
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
        self.bytes = sum(map(size_of, self._kept.values()))  # anew: right also after a thread that died in here
        while self.bytes > self.most:
            self.bytes -= size_of(self._kept.popitem(last=False)[1])


def copied(texts: Texts) -> Texts:
    """Whoever looks on may write into what they see."""
    return {
        text: Conditioning(
            one.context.clone(), one.pooled.clone(), {name: ids.clone() for name, ids in one.tokens.items()}
        )
        for text, one in texts.items()
    }


def size_of(texts: Texts) -> int:
    every = [tensor for one in texts.values() for tensor in (one.context, one.pooled, *one.tokens.values())]
    return sum(tensor.numel() * tensor.itemsize for tensor in every)
