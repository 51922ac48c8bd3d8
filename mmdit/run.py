"""The command line: `mmdit "a horse and a bear on a green background"`, or `python -m mmdit.run ...`."""

import gc
import os
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmdit.common.command import MISTAKE, Parser, add_options, exit_code, give, hush, program, say, silent
from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, marked
from mmdit.driver.likeness import filled
from mmdit.driver.output import check_beside, check_writable, is_file, picture_path, preview_path, sheet_path
from mmdit.driver.pictures import check_pictures
from mmdit.driver.prompts import Folders, Line, read_prompts, told_at
from mmdit.driver.repeat import settings_of_picture, without_levels
from mmdit.driver.settings import Settings, alone
from mmdit.driver.writing import draw
from mmdit.parallel.options import ManyOptions
from mmdit.parallel.started import see_one_gpu, started

if TYPE_CHECKING:
    from mmdit.driver.loading import Parts
    from mmdit.driver.pipeline import Pipeline
    from mmdit.memory.plan import Plan
    from mmdit.parallel.ranks import Ranks

_TO_SPEAK = 5  # seconds


def make_parser(options: type = Settings) -> Parser:
    """An option for every field that is one, under its name; the prompt is the one argument, None if absent."""
    parser = Parser(prog="mmdit", usage="mmdit PROMPT [options], or mmdit --prompts FILE [options]",
                    description="Draw pictures.", allow_abbrev=False)  # fmt: skip
    add_options(parser, options)
    return parser


def settings_of(arguments: Sequence[str] | None) -> Settings:
    """What a command line asks for."""
    parser = make_parser()
    given = said_in(parser, arguments)
    if not given.keys() & {"prompt", "prompts", "from_png"}:
        parser.error("expected a prompt, --prompts FILE, or --from-png FILE")
    for name in (f.name for f in fields(ManyOptions) if f.name in given and "prompts" not in given):
        parser.error(f"--{name.replace('_', '-')} is for a list: expected --prompts FILE")
    if "prompts" in given:
        if "prompt" in given:
            parser.error("expected a prompt or --prompts FILE, not both")
        if "dump" in given:
            parser.error("--dump is for a single run, not for --prompts")
        if is_file(given.get("out", "")):
            parser.error(f"--out: {given['out']}: expected a folder, for the pictures of --prompts")
        given["prompt"] = ""
        if given.keys() & {"ray_actors", "ray_cores"} and "ray" not in given:
            parser.error("--ray-actors and --ray-cores are for --ray")
    return Settings(**(repeating(given) if "from_png" in given else filled(given)))


def said_in(parser: Parser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """The options that a command line gives, without those that it leaves at their defaults."""
    unset = {a.dest: [] if isinstance(a.default, list) else object() for a in parser._actions}
    found = vars(parser.parse_args(arguments, Namespace(**unset)))
    return {name: value for name, value in found.items() if value is not unset[name] and value is not None}


def repeating(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the picture that `from_png` names, with what the command line gives; says what is left out."""
    found, left_out = settings_of_picture(given["from_png"])
    if left_out:
        say(f"{given['from_png']}: left out: {', '.join(left_out)}")
    hashes = {"weights": Mark.LOADED, "images": Mark.PICTURE, "control_pictures": Mark.PICTURE}
    for hashed, mark in hashes.items():
        if given.keys() & set(marked(Settings, mark)):  # others are wanted
            found.pop(hashed, None)
    return without_levels(found, given) | filled(given, found)


def run(settings: Settings) -> None:
    """Load, draw what is asked for, save each picture while the next are drawn, and report.

    Processes that were started together meet, and do it together.
    """
    place = started()
    if place is None:
        run_by(settings, None)
        return
    from mmdit.parallel.command import joined

    with joined(place) as ranks:
        run_by(settings, ranks)


def run_by(settings: Settings, ranks: "Ranks | None") -> None:
    """ranks: all processes, where there are several."""
    start = time.perf_counter()
    if settings.prompts is None:
        settings.check_pictures()
        check_writable(settings)
        check_pictures(settings)
        lines = None
    else:
        settings.resolved({})
        check_shared(settings, ranks)
        many = {f.name: f.default for f in fields(ManyOptions)}  # pictures tell nothing of who drew which
        lines = read_prompts(settings.prompts, replace(settings, prompts=None, **many))
    from mmdit.driver.loading import load_parts  # here, so that --help and mistakes answer at once
    from mmdit.driver.pipeline import USER_ERRORS, Pipeline

    seconds, skipped = {"import": time.perf_counter() - start}, 0
    at_once = (lambda work: work()) if ranks is None else ranks.together
    try:
        parts = at_once(lambda: load_parts(settings))  # no weights yet

        def load(wanted: Sequence[tuple[Settings, Path]]) -> Pipeline:
            pipeline = at_once(lambda: Pipeline.from_settings(largest([s for s, _ in wanted]), parts))
            settle()
            seconds["load"] = time.perf_counter() - start - seconds["import"]
            show_plan(pipeline, pipeline.plan)
            if lines is None or settings.verbose:
                show_words(pipeline, [s for s, _ in wanted])
            return pipeline

        wanted, told = [], ""
        if lines is not None and (settings.claim is not None or settings.ray is not None):
            told = draw_with_others(settings, lines, parts, load, seconds)
        else:
            wanted, skipped = at_once(lambda: wanted_of(settings, lines, parts))
        if ranks is not None:
            wanted, skipped = ranks.of_first((wanted, skipped))
        if wanted:
            pipeline = load(wanted)
            if ranks is None:
                draw(pipeline, wanted, run=settings, seconds=seconds)
            else:
                from mmdit.parallel.command import draw_shared

                drawn = partial(draw, pipeline, run=settings, seconds=seconds)
                draw_shared(pipeline, ranks, wanted, settings.parallel, drawn, whole=settings.dump is not None)
    except USER_ERRORS as error:
        raise SettingsError(str(error)) from error
    whole = time.perf_counter() - start
    if told:
        say(told)
    elif lines is not None:
        report(len(wanted), skipped, whole - seconds["import"] - seconds.get("load", 0))
    say(f"{', '.join(f'{name} {value:.2f} s' for name, value in seconds.items())}; {whole:.2f} s in all")


def wanted_of(
    settings: Settings, lines: Sequence[Line] | None, parts: "Parts"
) -> tuple[list[tuple[Settings, Path]], int]:
    """The pictures to be drawn, each with the file that it goes to, and how many of a list are there already."""
    if lines is not None:
        every = placed_of(settings, lines, parts)
        wanted = missing(every)
        skipped = len(every) - len(wanted)
    else:
        asked, skipped = parts.check(settings), 0
        wanted = [(s, picture_path(s, i, asked.count)) for i, s in enumerate(alone(asked))]
    if settings.weights not in (None, parts.weights):
        say(f"warning: {settings.from_png} was drawn by other weights")
    if lines is None and settings.images not in (None, wanted[0][0].images):
        say(f"warning: {settings.from_png} began with other pictures than there are now: {settings.init}")
    if lines is None and settings.control_pictures not in (None, wanted[0][0].control_pictures):
        say(f"warning: {settings.from_png} was controlled by other pictures than there are now")
    check_beside_all(settings, wanted)
    return wanted, skipped


def placed_of(settings: Settings, lines: Sequence[Line], parts: "Parts") -> list[tuple[Settings, Path | None]]:
    """All pictures of a list, or of the shard of it that is asked for, with their files; None: there already.

    Names are given before the list is cut: they are those of the whole list.
    """
    every = []
    for line in lines:
        with told_at(line):
            every.append(parts.check(line.settings))
    placed = Folders().placed(every)
    if settings.shard is None:
        return placed
    from mmdit.parallel.shards import shard_of

    return shard_of(placed, settings.shard)


def missing(placed: Sequence[tuple[Settings, Path | None]]) -> list[tuple[Settings, Path]]:
    return [(s, path) for s, path in placed if path is not None]


def check_beside_all(settings: Settings, wanted: Sequence[tuple[Settings, Path]]) -> None:
    """Raise SettingsError where what goes beside the pictures cannot have its name."""
    paths = [path for _, path in wanted]
    check_beside("preview", paths, paths if settings.preview is not None else (), preview_path)
    check_beside("attention_maps", paths, [p for s, p in wanted if s.attention_maps is not None], sheet_path)


def largest(pictures: Sequence[Settings]) -> Settings:
    return max(pictures, key=lambda s: (s.width or 0) * (s.height or 0))


def check_shared(settings: Settings, ranks: "Ranks | None") -> None:
    """Raise SettingsError where a list cannot be shared with others in the way that is asked for."""
    if settings.claim is None and settings.ray is None:
        return
    if ranks is not None:
        raise SettingsError("claim and ray are for processes that draw alone: expected no torchrun before them")
    if settings.ray is not None:
        lacking = [name for name in ("ray", "pyarrow") if find_spec(name) is None]
        if lacking:
            raise SettingsError(f"ray needs {' and '.join(lacking)}: pip install 'mmdit[ray]'")


def draw_with_others(
    settings: Settings,
    lines: Sequence[Line],
    parts: "Parts",
    load: "Callable[[Sequence[tuple[Settings, Path]]], Pipeline]",
    seconds: dict[str, float],
) -> str:
    """Draw what others do not of a list, or have actors draw it, until all of it is there; returns the report."""
    from mmdit.parallel.claimed import Tally, draw_claimed, write_failures
    from mmdit.parallel.claims import PATIENCE, Claims

    tally = Tally()
    if settings.ray is not None:
        from mmdit.ray.lists import join

        join(settings.ray)
    with Claims(Path(settings.out).expanduser(), settings.claim or PATIENCE) as claims:
        placed = placed_of(settings, lines, parts)
        wanted = missing(placed)
        check_beside_all(settings, wanted)

        def told(path: Path) -> None:
            tally.count(path)
            give(path)

        if wanted and settings.ray is not None:
            from mmdit.ray.lists import draw_by_ray

            draw_by_ray(settings, placed, largest([s for s, _ in wanted]), claims, tally, told)
        elif wanted:
            drawn = partial(draw, load(wanted), run=settings, seconds=seconds, told=told)
            draw_claimed(placed, settings.out, claims, drawn, tally)
        given_up = write_failures(claims, settings.out)
    others = len(wanted) - tally.drawn - len(tally.failed)
    return f"{tally.drawn} written; {len(placed) - len(wanted)} were there; {others} by others or given up{given_up}"


def begin() -> None:
    """What belongs to a process of its own, before PyTorch is imported."""
    with suppress(SettingsError):  # told later
        if (place := started()) is not None:
            see_one_gpu(place)
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
        say(f"plan: {plan}")


def show_words(pipeline: "Pipeline", pictures: Sequence[Settings]) -> None:
    """Say which pieces of each prompt were taken for its subjects."""
    from mmdit.driver.focusing import found_in, pieces

    for line in dict.fromkeys(line for s in pictures for line in pieces(found_in(s, pipeline.text))):
        say(line)


def report(written: int, skipped: int, seconds: float) -> None:
    """What a list's run did, in so many seconds after loading."""
    rate = f", {60 * written / seconds:.1f} a minute" if written else ""
    say(f"{written} written{rate}; {skipped} skipped (there already, or twice in the list)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted.

    Of several processes the first speaks.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        hush()
    code = exit_code(lambda: run(settings_of(arguments)), "nothing more was written")
    if code == MISTAKE and silent():  # torchrun ends all when one has ended: the first is to say why before
        with suppress(KeyboardInterrupt):
            time.sleep(_TO_SPEAK)
    return code


def command() -> NoReturn:
    """Be the program `mmdit`."""
    begin()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed run cleans up as an interrupted one does
    program(main)


if __name__ == "__main__":
    command()
