"""What the server's log has beside the lines of requests: none of it shows a prompt."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmdit.driver.pipeline import Pipeline
from text_encoders import TextEncoder

_LONGEST = 500  # characters


class _Lines(logging.Handler):
    def __init__(self, log: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            told = record.getMessage()
        except (TypeError, ValueError):  # their arguments do not fit; whoever logs is not to fail of it
            told = str(record.msg)
        told += f": {record.exc_info[1]!r}" if record.exc_info else ""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))}
        line |= {"level": record.levelname.lower(), "from": record.name, "message": " ".join(told.split())[:_LONGEST]}
        self._log(json.dumps(line))


@contextmanager
def in_json(log: Callable[[str], object]) -> Iterator[None]:
    """Meanwhile what libraries warn of is a line of JSON each."""
    handler = _Lines(log)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def discreet(pipeline: Pipeline) -> None:
    """Have it not warn of prompts that are cut off, whose ends such a warning shows."""
    if isinstance(pipeline.text, TextEncoder):
        pipeline.text.warn = lambda _: None
