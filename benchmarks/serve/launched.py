"""The server as `python -m mmdit.serve` begins it, in a process whose thread that draws can be killed from outside.

    python -m benchmarks.serve.launched --port 0      SIGUSR1 kills the thread, wherever it is just then

Nothing of the server is changed: CPython is asked to raise SystemExit in that thread, at its next instruction.
"""

import ctypes
import signal
import sys
import threading
import time
from types import FrameType

from mmdit.serve.__main__ import command


def kill_thread(name: str = "studio") -> bool:
    """Have the thread of this name die; whether there is one.

    Not while it begins another thread, whose state has the id of the one that begins it until it runs: CPython would
    raise in the new one, and the other would wait for that for ever.
    """
    while idents := [thread.ident for thread in threading.enumerate() if thread.name == name and thread.ident]:
        if not _begins_a_thread(sys._current_frames().get(idents[0])):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(idents[0]), ctypes.py_object(SystemExit))
            return True
        time.sleep(0.001)
    return False


def _begins_a_thread(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not threading.Thread.start.__code__:
        frame = frame.f_back
    return frame is not None


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: kill_thread())
    command()
