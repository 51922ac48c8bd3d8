"""The command line: `python -m mmdit.run "a horse and a bear on a green background"`."""

import argparse
import gc
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, get_args, get_origin, get_type_hints

from tqdm import tqdm

from mmdit.driver.output import Saver, check_writable, is_file, save_images, sweep, whole_file
from mmdit.driver.prompts import Folders, read_prompts, told_at
from mmdit.driver.settings import Settings
from mmdit.errors import SettingsError

if TYPE_CHECKING:
    from mmdit.driver.pipeline import Pipeline
    from mmdit.memory.plan import Plan


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


def make_parser() -> Parser:
    """An option for every field of Settings, under the field's name; the prompt is the one argument, None if absent."""
    parser = Parser(prog="python -m mmdit.run", description=__doc__, allow_abbrev=False)
    types = get_type_hints(Settings)
    for f in fields(Settings):
        name = "prompt" if f.name == "prompt" else "--" + f.name.replace("_", "-")
        kind = next(t for t in (*get_args(types[f.name]), types[f.name]) if t is not type(None))
        metadata = f.metadata
        more = {"choices": metadata["choices"]} if "choices" in metadata else {}
        if "metavar" in metadata:
            more["metavar"] = metadata["metavar"]
        if kind is bool:
            parser.add_argument(name, action="store_true", help=metadata["help"])
            continue
        more |= {"nargs": "?"} if name == "prompt" else {"default": f.default}
        if get_origin(types[f.name]) is tuple:
            more |= {"action": "append", "default": []}
        shown = "" if f.default in (None, "", ()) or name == "prompt" else " (default: %(default)s)"
        parser.add_argument(name, type=kind, help=metadata["help"] + shown, **more)
    return parser


def settings_of(arguments: Sequence[str] | None) -> Settings:
    """What a command line asks for."""
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    if given["prompt"] is None and given["prompts"] is None:
        parser.error("expected a prompt, or --prompts FILE")
    if given["prompts"] is not None:
        if given["prompt"] is not None:
            parser.error("expected a prompt or --prompts FILE, not both")
        if given["dump"] is not None:
            parser.error("--dump is for a single run, not for --prompts")
        if is_file(given["out"]):
            parser.error(f"--out: {given['out']}: expected a folder, for the pictures of --prompts")
        given["prompt"] = ""
    return Settings(**given)


def draw(settings: Settings) -> None:
    """Load, draw, save and report."""
    check_writable(settings)
    start = time.perf_counter()
    from safetensors.torch import save_file

    from mmdit.driver.pipeline import USER_ERRORS, Pipeline  # here, so that --help and mistakes answer at once

    imported = time.perf_counter()
    try:
        pipeline = Pipeline.from_settings(settings)
        settle()
        loaded = time.perf_counter()
        pipeline.check(settings)
        show_plan(pipeline, pipeline.plan)
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
    print(f"{told(seconds)}; {time.perf_counter() - start:.2f} s in all")


def draw_list(settings: Settings) -> None:
    """Draw what a list says and is not there yet; each picture is saved while the next are drawn."""
    start = time.perf_counter()
    assert settings.prompts is not None
    base = replace(settings, prompts=None)
    lines = read_prompts(settings.prompts, base)
    from mmdit.driver.loading import load_parts
    from mmdit.driver.loop import Drawing
    from mmdit.driver.pipeline import USER_ERRORS, Pipeline

    seconds = {"import": time.perf_counter() - start}
    try:
        parts = load_parts(base)  # no weights yet
        wanted = []
        for line in lines:
            with told_at(line):
                wanted.append(parts.check(line.settings))
        missing = Folders().missing(wanted)
        pictures, paths = [s for s, _ in missing], [path for _, path in missing]
        if pictures:
            largest = max(pictures, key=lambda s: (s.width or 0) * (s.height or 0))
            pipeline = Pipeline.from_settings(largest, parts)
            settle()
            seconds["load"] = time.perf_counter() - start - seconds["import"]
            show_plan(pipeline, pipeline.plan)
            for folder in {path.parent for path in paths}:
                sweep(folder)
            with Saver(lambda path: tqdm.write(str(path))) as save:
                for i, image in Drawing(pipeline, pictures, seconds=seconds):
                    save(image, replace(pictures[i], **pipeline.actual), paths[i])
            seconds["save"] = save.waited
    except USER_ERRORS as error:
        raise SettingsError(str(error)) from error
    report(seconds, time.perf_counter() - start, len(paths), sum(s.count for s in wanted) - len(paths))


def begin() -> None:
    """What belongs to a process of its own, before PyTorch is imported."""
    gc.disable()  # until `settle`: to go through all that is imported and loaded takes a seventh of the start
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait actively keep attention's from their cores


def settle() -> None:
    """Call after loading: what is there stays, and the garbage collector, if it was off, begins with what follows."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def show_plan(pipeline: "Pipeline", plan: "Plan") -> None:
    """Say what is on the device when, where that was asked for or is not as fast as can be."""
    if pipeline.settings.memory != "auto" or not (plan.everything_stays or pipeline.device.type == "cpu"):
        print(f"plan: {plan}")


def report(seconds: dict[str, float], whole: float, written: int, skipped: int) -> None:
    """The last two lines of a list's run; pictures a minute are of the time after loading."""
    drawing = whole - seconds["import"] - seconds.get("load", 0)
    rate = f", {60 * written / drawing:.1f} a minute" if written else ""
    print(f"{written} written{rate}; {skipped} skipped (there already, or twice in the list)")
    print(f"{told(seconds)}; {whole:.2f} s in all")


def told(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        try:
            settings = settings_of(arguments)
            draw(settings) if settings.prompts is None else draw_list(settings)
        except SettingsError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted: nothing more was written", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    begin()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed run cleans up as an interrupted one does
    sys.exit(main())
