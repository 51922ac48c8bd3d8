"""The command line's options, frozen: a change here is a change that users see."""

import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from mmdit.driver.settings import Settings
from mmdit.run import make_parser, settings_of

ROOT = Path(__file__).parents[1]
OPTIONS = """\
prompt None what
--negative '' TEXT
--model None FOLDER|FILE|ID
--clip-l None FILE
--clip-g None FILE
--t5xxl None FILE
--vae None FILE
--tokenizers None FOLDER
--lora [] FILE|FOLDER[:SCALE]
--width None W
--height None H
--steps None N
--cfg None X
--cfg-interval None LOW:HIGH
--seed 0 S
--count 1 N
--t5 'on' on,off,omit
--t5-length None N
--dtype 'auto' auto,bf16,fp16,fp32
--quantise 'none' none,int8,fp8
--device 'auto' auto,cpu,cuda,mps
--memory 'auto' SIZE
--attention 'auto' auto,sdpa,cores,flash,xformers,cudnn,math
--compile False what
--out 'out' FILE|FOLDER
--prompts None FILE
--dump None FILE.safetensors
"""


def test_the_options_are_frozen() -> None:
    """Names, defaults and values of all of them, each a field of Settings and with its default."""
    actions = [a for a in make_parser()._actions if not isinstance(a, argparse._HelpAction)]
    told = [
        f"{[*a.option_strings, a.dest][0]} {a.default!r} {','.join(a.choices or [a.metavar or 'what'])}"
        for a in actions
    ]
    assert told == OPTIONS.splitlines()
    assert [a.dest for a in actions] == [f.name for f in fields(Settings)]
    assert settings_of(["x"]) == Settings("x")
    assert settings_of(["--prompts", "x.txt"]) == Settings(prompts="x.txt")


def test_help_does_not_load_torch() -> None:
    """In a process of its own; every option is in it."""
    code = "import sys, mmdit.run\ntry: mmdit.run.main(['--help'])\nfinally: print(sorted({'torch'} & {*sys.modules}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr, ran.stdout.splitlines()[-1]) == (0, "", "[]")
    assert all(line.split()[0] in ran.stdout for line in OPTIONS.splitlines())
