"""The command line: `python -m mmdit.run "a horse and a bear on a green background"`."""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NoReturn, get_args, get_origin, get_type_hints

from mmdit.output import check_writable, save_dump, save_images
from mmdit.settings import Settings, SettingsError


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


def make_parser() -> Parser:
    """An option for every field of Settings, under the field's name; the prompt is the one argument."""
    parser = Parser(prog="python -m mmdit.run", description=__doc__, allow_abbrev=False)
    types = get_type_hints(Settings)
    for f in fields(Settings):
        name = "prompt" if f.name == "prompt" else "--" + f.name.replace("_", "-")
        kind = next(t for t in (*get_args(types[f.name]), types[f.name]) if t is not type(None))
        metadata = f.metadata
        more = {"choices": metadata["choices"]} if "choices" in metadata else {}
        if "metavar" in metadata:
            more["metavar"] = metadata["metavar"]
        if name != "prompt":
            more["default"] = None if f.default is MISSING else f.default
        if get_origin(types[f.name]) is tuple:
            more |= {"action": "append", "default": []}
        shown = "" if f.default in (None, "", ()) or name == "prompt" else " (default: %(default)s)"
        parser.add_argument(name, type=kind, help=metadata["help"] + shown, **more)
    return parser


def draw(settings: Settings) -> None:
    """Load, draw, save and report."""
    check_writable(settings)
    start = time.perf_counter()
    from mmdit.pipeline import Pipeline  # here, so that --help and mistakes answer at once

    imported = time.perf_counter()
    pipeline = Pipeline.from_settings(settings)
    loaded = time.perf_counter()
    trace = {} if settings.dump else None
    result = pipeline.run(settings, trace)
    drawn = time.perf_counter()
    paths = save_images(result.images, result.settings)
    if settings.dump and trace is not None:
        from safetensors.torch import save_file

        dump = Path(settings.dump).expanduser()
        save_dump(lambda path: save_file(trace, path), dump)
        paths.append(dump)
    seconds = {"import": imported - start, "load": loaded - imported, **result.seconds}
    seconds["save"] = time.perf_counter() - drawn
    for path in paths:
        print(path)
    stages = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    print(f"{stages}; {time.perf_counter() - start:.2f} s in all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        return attempt(arguments)


def attempt(arguments: Sequence[str] | None) -> int:
    try:
        settings = Settings(**vars(make_parser().parse_args(arguments)))
        try:
            draw(settings)
        except Exception as error:
            if isinstance(error, user_errors()):
                raise SettingsError(str(error)) from error
            raise
    except SettingsError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing more was written", file=sys.stderr)
        return 130
    return 0


def user_errors() -> tuple[type[Exception], ...]:
    """The errors that are the user's to mend; those of the other packages exist only once these are loaded."""
    pipeline = sys.modules.get("mmdit.pipeline")
    return pipeline.USER_ERRORS if pipeline else (SettingsError,)


if __name__ == "__main__":
    sys.exit(main())
