"""The command line: `python -m mmdit.run "a horse and a bear on a green background"`."""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn, get_args, get_origin, get_type_hints

from tqdm import tqdm

from mmdit.output import check_writable, save_images, whole_file
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
            more["default"] = f.default
        if kind is bool:
            parser.add_argument(name, action="store_true", help=metadata["help"])
            continue
        if get_origin(types[f.name]) is tuple:
            more |= {"action": "append", "default": []}
        shown = "" if f.default in (None, "", ()) or name == "prompt" else " (default: %(default)s)"
        parser.add_argument(name, type=kind, help=metadata["help"] + shown, **more)
    return parser


def draw(settings: Settings) -> None:
    """Load, draw, save and report."""
    check_writable(settings)
    start = time.perf_counter()
    from safetensors.torch import save_file

    from mmdit.pipeline import USER_ERRORS, Pipeline  # here, so that --help and mistakes answer at once

    imported = time.perf_counter()
    try:
        pipeline = Pipeline.from_settings(settings)
        loaded = time.perf_counter()
        trace = {} if settings.dump else None
        result = pipeline.run(settings, trace)
        drawn = time.perf_counter()
        for path in save_images(result.images, result.settings):
            print(path)
        if settings.dump and trace is not None:
            with whole_file(Path(settings.dump).expanduser()) as partial:
                save_file(trace, partial)
            print(settings.dump)
    except USER_ERRORS as error:
        raise SettingsError(str(error)) from error
    seconds = {"import": imported - start, "load": loaded - imported, **result.seconds}
    seconds["save"] = time.perf_counter() - drawn
    stages = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    print(f"{stages}; {time.perf_counter() - start:.2f} s in all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        try:
            draw(Settings(**vars(make_parser().parse_args(arguments))))
        except SettingsError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted: nothing more was written", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
