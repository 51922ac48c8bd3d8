"""Serve pictures: `python -m mmdit.serve --model FOLDER`."""

import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from mmdit.common.command import Parser, add_options, exit_code, given_of, program
from mmdit.common.errors import SettingsError
from mmdit.run import begin
from mmdit.serve.options import ServeOptions

_NEEDS = ("starlette", "uvicorn", "python_multipart")  # the extra `serve`


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m mmdit.serve",
        description="Serve pictures, to clients of OpenAI's images and of AUTOMATIC1111's web UI.",
        allow_abbrev=False,
    )
    add_options(parser, ServeOptions)
    return parser


def run(arguments: Sequence[str]) -> None:
    """Serve as the arguments say; SettingsError where it cannot be done."""
    options = ServeOptions(**given_of(ServeOptions, vars(make_parser().parse_args(arguments))))
    options.check()
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise SettingsError(f"the server needs {', '.join(missing)}: pip install 'mmdit[serve]'")
    from mmdit.serve.app import serve  # here, so that --help and mistakes answer at once

    serve(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    return exit_code(lambda: run(sys.argv[1:] if arguments is None else arguments), "the server has stopped")


def command() -> NoReturn:
    begin()
    signal.signal(signal.SIGTERM, lambda *_: None)  # the server sees it too, and ends as it should
    program(main)


if __name__ == "__main__":
    command()
