"""The server as `python -m mmdit.serve` begins it, in a process whose thread that draws can be killed from outside.

    python -m benchmarks.serve.launched --port 0      SIGUSR1 kills the thread, wherever it is just then

Nothing of the server is changed: CPython is asked to raise SystemExit in that thread, at its next instruction.
"""

import ctypes
import signal
import threading

from mmdit.serve.__main__ import command


def kill_thread(name: str = "studio") -> bool:
    """Have the thread of this name die; whether there is one."""
    for thread in threading.enumerate():
        if thread.name == name and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            return True
    return False


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: kill_thread())
    command()
