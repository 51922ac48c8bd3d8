"""What is this file? `python -m weights PATH`; and into another form: `python -m weights convert IN OUT ...`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mmdit.common.command import Parser, exit_code, give, program
from weights.convert import DTYPES, LAYOUTS, convert
from weights.inspect import OPTIONS, inspect
from weights.kinds import WHAT
from weights.report import report

SEPARATE = {part: option for part, option in OPTIONS.items() if option != "--model"}


def inspect_parser() -> Parser:
    parser = Parser(
        prog="python -m weights",
        description="Tell what a checkpoint, a part of one or an adapter is and how it is loaded; reads headers only.",
        epilog="python -m weights convert --help: how to write a checkpoint in another layout or number format",
    )
    parser.add_argument("path", help="file or folder")
    parser.add_argument("--json", action="store_true", help="the same as one JSON document, for programs")
    return parser


def convert_parser() -> Parser:
    parser = Parser(
        prog="python -m weights convert",
        description="Write a checkpoint in another layout or number format, one tensor after the other.",
    )
    parser.add_argument("source", metavar="IN",
                        help="diffusers folder, single .safetensors or .gguf file, or Hugging Face id")  # fmt: skip
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder (diffusers) or new file (single-file)")
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True,
                        help="fp8-scaled: linear layers of transformer and T5 as F8_E4M3 with a scale each, for this "
                        "engine and ComfyUI; everything else bf16")  # fmt: skip
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]",
                        help="adapter to merge, a file or a folder; as often as needed")  # fmt: skip
    for part, option in SEPARATE.items():
        parser.add_argument(option, dest=part, type=Path, metavar="FILE", help=f"{WHAT[part]} from this file")
    return parser


def run(arguments: Sequence[str]) -> None:
    """Do what the arguments say; CheckpointError where it cannot be done."""
    if [*arguments[:1]] == ["convert"]:
        given = vars(convert_parser().parse_args(arguments[1:]))
        separate = {part: given.pop(part) for part in SEPARATE}
        give(convert(**given, parts={part: file for part, file in separate.items() if file is not None}))
        return
    options = inspect_parser().parse_args(arguments)
    found = inspect(options.path)
    for line in json.dumps(found, indent=2).splitlines() if options.json else report(found):
        give(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a file or option that is of no use, 130 if interrupted."""
    return exit_code(lambda: run(sys.argv[1:] if arguments is None else arguments), "nothing was written")


if __name__ == "__main__":
    program(main)
