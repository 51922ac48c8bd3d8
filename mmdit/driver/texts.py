"""The texts of many pictures: each distinct one encoded once, as many at a time as there is room for."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules import module as everywhere

from mmdit.driver.reading import Text, context_length, in_chunks, texts_of
from mmdit.driver.remembered import Texts
from mmdit.driver.settings import Settings
from mmdit.driver.stages import Stages
from mmdit.memory.budget import DeviceMemoryError
from mmdit.memory.residency import Role, of_role
from text_encoders import Conditioning, Prompt, TextEncoder

__all__ = ["Text", "Texts", "encode", "parts", "texts_of"]

_AT_A_TIME = 64  # more are no faster
_KEPT = 0.1  # of the budget, for texts that are encoded and wait
_KEPT_AT_MOST = 1e9  # bytes


def size(stages: Stages, text: Text) -> int:
    """Bytes of a text, encoded."""
    length = context_length(stages.text, text.t5_length, text.chunks)
    return length * stages.text.width * stages.dtype.itemsize


def parts(stages: Stages, pictures: Sequence[Settings]) -> Iterator[tuple[list[int], int]]:
    """The list in parts whose texts, encoded, are few enough to keep, each with the bytes of these texts.

    What is remembered of other runs is added to them.
    """
    remembered = 0 if stages.remembered is None else stages.remembered.most
    part: list[int] = []
    texts: dict[Text, int] = {}
    budgets = {memory: stages.budget(memory) for memory in sorted({s.memory for s in pictures})}
    taken = 0
    for i, s in enumerate(pictures):
        most = min(_KEPT * budgets[s.memory], _KEPT_AT_MOST)
        new = {text: size(stages, text) for text in texts_of(s).values() if text not in texts}
        if part and taken + sum(new.values()) > most:
            yield part, taken + remembered
            part, texts, taken = [], {}, 0
            new = {text: size(stages, text) for text in texts_of(s).values()}
        part.append(i)
        texts |= new
        taken += sum(new.values())
    if part:
        yield part, taken + remembered


def encode(stages: Stages, pictures: Sequence[Settings], waiting: int, seconds: dict[str, float]) -> Texts:
    """All texts of these pictures. waiting: the bytes that they take. seconds: the time is added to.

    Where the stages remember texts, those of a picture are encoded as they are where it is drawn alone.
    """
    remembered = stages.remembered
    if remembered is None:
        return _encode(stages, pictures, waiting, seconds)
    alike: dict[tuple[Text, ...], list[Settings]] = {}
    for s in pictures:
        alike.setdefault(tuple(dict.fromkeys(texts_of(s).values())), []).append(s)
    every, state = Texts(), state_of(stages)
    for texts, some in alike.items():
        found = remembered.find(texts, state)
        if found is None:
            found = _encode(stages, some, waiting, seconds)
            remembered.keep(texts, found)
        every |= found
    return every


def _encode(stages: Stages, pictures: Sequence[Settings], waiting: int, seconds: dict[str, float]) -> Texts:
    lengths: dict[tuple[int, int], list[Text]] = {}
    for text in dict.fromkeys(text for s in pictures for text in texts_of(s).values()):
        lengths.setdefault((text.t5_length, text.chunks), []).append(text)
    largest = max(pictures, key=lambda s: (s.width or 0) * (s.height or 0))
    t5_tokens, clip_chunks = map(max, zip(*lengths))
    emphasis = any(
        isinstance(text.prompt, Prompt) and text.prompt.emphasis for some in lengths.values() for text in some
    )
    longest = replace(largest, t5_tokens=t5_tokens, clip_chunks=clip_chunks, emphasis=emphasis)
    job = stages.job(longest, waiting=waiting)
    plan = stages.plan_for(job)
    most = min(_AT_A_TIME, max(map(len, lengths.values())))
    stages.follow(plan, job)
    budget = stages.budget(job.memory)
    first = stages.planner.texts(job, plan, budget, most) if stages.plan is plan else job.texts
    sizes = iter((first, job.texts))  # the second for a second try

    def work() -> Texts:
        at_once, found = next(sizes), {}
        for (t5_length, chunks), texts in lengths.items():
            for i in range(0, len(texts), at_once):
                some = texts[i : i + at_once]
                encoded = stages.encode([text.prompt for text in some], t5_length, **in_chunks(chunks))
                for k, text in enumerate(some):
                    one = encoded[k : k + 1]
                    found[text] = Conditioning(one.context.cpu().clone(), one.pooled.cpu().clone(), one.tokens)
        return found

    try:
        return stages.stage("encode", job, seconds, work)
    except DeviceMemoryError:
        fewer = next(sizes, None)
        if fewer is None:
            raise
    sizes = iter((fewer, fewer))
    return stages.stage("encode", job, seconds, work)


def state_of(stages: Stages) -> object | None:
    """What an encoding depends on beside its texts, as `Remembered` compares it."""
    text, networks = stages.text, stages.parts.networks
    own = [networks[name] for name in of_role(Role.ENCODES_TEXT, networks)]
    modules = [module for network in own for module in network.module.modules()]
    if type(text) is not TextEncoder or any(network.editable for network in own):
        return None
    if "encode" in vars(stages) or "encode" in vars(text) or any(map(_touched, modules)) or _hooks(everywhere):
        return None
    reader = {**vars(text), "words": {**text.words}}  # as it is now: it may be changed in its place
    return stages.actual["weights"], stages.actual["lora"], reader, modules


def _touched(module: nn.Module) -> bool:
    """Whether somebody else's hooks look at its calls, or its forward was replaced."""
    return "forward" in vars(module) or bool(_hooks(module))


def _hooks(of: Any) -> list[Any]:
    """Hooks of a module, or of all modules, that are not this engine's, which only bring weights."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    lists = [getattr(of, name, None) or getattr(of, f"_global{name}", {}) for name in names]
    every = [hook for some in lists for hook in some.values()]
    return [hook for hook in every if not getattr(hook, "__module__", "").startswith("mmdit.memory.")]
