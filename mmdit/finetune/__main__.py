"""Train an adapter: `python -m mmdit.finetune focus --prompts FILE --out ADAPTER.safetensors`."""

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from mmdit.common.command import Parser, add_options, exit_code, given_of, program
from mmdit.finetune.options import FocusTuning

# What is trained: what it is told, and the module whose `run` does it.
KINDS = {"focus": (FocusTuning, "mmdit.finetune.focus", "keep the subjects of prompts apart, by adjoint matching")}


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m mmdit.finetune",
        description="Train a LoRA adapter for --lora and diffusers.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (options, _, what) in KINDS.items():
        usage = f"python -m mmdit.finetune {name} --prompts FILE --out FILE [options]"
        told = f"Train a LoRA adapter: {what}."
        add_options(kinds.add_parser(name, help=what, usage=usage, description=told, allow_abbrev=False), options)
    return parser


def run(arguments: Sequence[str]) -> None:
    """Do what the arguments say; SettingsError where it cannot be done."""
    given = vars(make_parser().parse_args(arguments))
    options, module, _ = KINDS[given.pop("kind")]
    asked = options(**given_of(options, given))
    asked.check()
    import_module(module).run(asked)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    told = "what was done is saved; the same command goes on"
    return exit_code(lambda: run(sys.argv[1:] if arguments is None else arguments), told)


def command() -> NoReturn:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed run saves what is done
    program(main)


if __name__ == "__main__":
    command()
