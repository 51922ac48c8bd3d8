"""The texts of many pictures: each distinct one encoded once, as many at a time as there is room for."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mmdit.driver.sampling import prompts_of
from mmdit.driver.settings import Settings
from mmdit.driver.stages import Stages
from mmdit.memory.budget import DeviceMemoryError, budget_of
from text_encoders import Conditioning

_AT_A_TIME = 64  # more are no faster
_KEPT = 0.1  # of the budget, for texts that are encoded and wait
_KEPT_AT_MOST = 1e9  # bytes

Text = tuple[str, int]  # with the number of T5's tokens
Texts = dict[Text, Conditioning]  # each a batch of 1, on the CPU


def texts_of(s: Settings) -> dict[str, Text]:
    """What is encoded for a picture, by its part in guidance."""
    assert s.t5_length
    return {name: (text, s.t5_length) for name, text in prompts_of(s).items()}


def size(stages: Stages, text: Text) -> int:
    """Bytes of a text, encoded."""
    _, t5_length = text
    return stages.text.length(t5_length) * stages.text.width * stages.dtype.itemsize


def parts(stages: Stages, pictures: Sequence[Settings]) -> Iterator[tuple[list[int], int]]:
    """The list in parts whose texts, encoded, are few enough to keep, each with the bytes of these texts."""
    part: list[int] = []
    texts: dict[Text, int] = {}
    budgets = {memory: budget_of(memory, stages.device) for memory in {s.memory for s in pictures}}
    taken = 0
    for i, s in enumerate(pictures):
        most = min(_KEPT * budgets[s.memory], _KEPT_AT_MOST)
        new = {text: size(stages, text) for text in texts_of(s).values() if text not in texts}
        if part and taken + sum(new.values()) > most:
            yield part, taken
            part, texts, taken = [], {}, 0
            new = {text: size(stages, text) for text in texts_of(s).values()}
        part.append(i)
        texts |= new
        taken += sum(new.values())
    if part:
        yield part, taken


def encode(stages: Stages, pictures: Sequence[Settings], waiting: int, seconds: dict[str, float]) -> Texts:
    """All texts of these pictures. waiting: the bytes that they take. seconds: the time is added to."""
    lengths: dict[int, list[str]] = {}
    for text, length in dict.fromkeys(text for s in pictures for text in texts_of(s).values()):
        lengths.setdefault(length, []).append(text)
    largest = max(pictures, key=lambda s: (s.width or 0) * (s.height or 0))
    job = stages.job(replace(largest, t5_length=max(lengths)), waiting=waiting)
    plan = stages.plan_for(job)
    most = min(_AT_A_TIME, max(map(len, lengths.values())))
    stages.follow(plan, job)
    budget = budget_of(job.memory, stages.device)
    first = stages.planner.texts(job, plan, budget, most) if stages.plan is plan else job.texts
    sizes = iter((first, job.texts))  # the second for a second try

    def work() -> Texts:
        at_once, found = next(sizes), {}
        for length, texts in lengths.items():
            for i in range(0, len(texts), at_once):
                some = texts[i : i + at_once]
                encoded = stages.encode(some, length)
                for k, text in enumerate(some):
                    one = encoded[k : k + 1]
                    found[text, length] = Conditioning(one.context.cpu().clone(), one.pooled.cpu().clone(), one.tokens)
        return found

    try:
        return stages.stage("encode", job, seconds, work)
    except DeviceMemoryError:
        fewer = next(sizes, None)
        if fewer is None:
            raise
    sizes = iter((fewer, fewer))
    return stages.stage("encode", job, seconds, work)
