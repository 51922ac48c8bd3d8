"""What the command lines have in common: mistakes on one line, exit codes, and what may reach the terminal."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from tqdm import tqdm

from mmdit.common.errors import UserError, one_line
from mmdit.common.options import Mark, kind, of_each, rooms

MISTAKE, INTERRUPTED, CLOSED_PIPE = 2, 130, 141  # exit codes; the last two as shells have them for these signals


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        say(f"error: {message[:1000]} (--help lists the options)")
        raise SystemExit(MISTAKE)

    def _print_message(self, message: str, file: Any = None) -> None:
        """What argparse does, but for errors of the output, which it passes over."""
        with standard_output():
            (file or sys.stderr).write(message or "")


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """An option for every field that is one, under its name; a prompt is the one argument, None if absent."""
    for heading, own in rooms(options).items():
        group = parser.add_argument_group(heading)
        for f in own:
            if Mark.FOUND in f.metadata["marks"]:
                continue
            name = "prompt" if f.name == "prompt" else "--" + f.name.replace("_", "-")
            of, told = kind(options, f.name), f.metadata
            if of is bool:
                group.add_argument(name, action="store_true", help=told["help"])
                continue
            more: dict[str, Any] = {"nargs": "?"} if name == "prompt" else {"default": f.default}
            if of is tuple:
                more |= {"action": "append", "default": []}
            shown = "" if f.default in (None, "", ()) or name == "prompt" else " (default: %(default)s)"
            shown = shown if told["usual"] is None else " (default: the model's own)"
            more |= {key: told[key] for key in ("metavar", "choices") if told[key]}
            group.add_argument(name, type=of_each(options, f.name), help=told["help"] + shown, **more)


def given_of(options: type, given: dict[str, Any]) -> dict[str, Any]:
    """What the options of a command line were given, as the fields of `options` take it."""
    return {name: tuple(value) if kind(options, name) is tuple else value for name, value in given.items()}


_silent = False


def hush() -> None:
    """Say nothing from now on: another process of the run speaks for all."""
    global _silent
    _silent = True


def speak() -> None:
    """Say what there is to say again."""
    global _silent
    _silent = False


def silent() -> bool:
    return _silent


def say(text: str) -> None:
    """One line for people, on standard error, above the progress bar; standard output is for results alone."""
    if _silent:
        return
    with suppress(BrokenPipeError):  # nobody reads it; the results may still be wanted
        tqdm.write(one_line(text), file=sys.stderr)


def give(result: object) -> None:
    """One line of results, on standard output, at once: who reads from a pipe does not wait for the end."""
    with standard_output():
        tqdm.write(one_line(str(result)), file=sys.stdout)
        sys.stdout.flush()


@contextmanager
def standard_output() -> Iterator[None]:
    """What goes wrong with it is a UserError, but for a reader who has left."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"standard output: {error.strerror or error}") from None


def exit_code(work: Callable[[], None], interrupted: str) -> int:
    """Do the work of a command line; says what went wrong. interrupted: what to say after an interrupt."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        try:
            try:
                work()
            finally:
                with standard_output():
                    sys.stdout.flush()  # a closed pipe is noticed here, not when Python has ended
        except UserError as error:
            say(f"error: {error}")
            return MISTAKE
        except KeyboardInterrupt:
            say(f"interrupted: {interrupted}")
            return INTERRUPTED
        except BrokenPipeError:
            return CLOSED_PIPE
    return 0


def program(main: Callable[[], int]) -> NoReturn:
    """Run `main` as a process of its own, and end with its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever called
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")  # names that a terminal cannot show
    code = main()
    try:
        sys.stdout.flush()
    except OSError:  # at its end Python tries once more to write what is left, and would say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
