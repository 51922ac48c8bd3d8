"""What holds for the repository as a whole."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from adapter_rows import DIALECTS, KINDS
from layout_rows import ROWS

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "mmdit", "samplers", "text_encoders", "vae", "weights")
RUN_TIME = {"torch", "safetensors", "sentencepiece", "tokenizers", "einops", "numpy", "pillow", "tqdm"}
OPTIONAL = {"gguf": "weights/gguf.py", "huggingface_hub": "weights/hub.py"}  # package: the one file that asks for it
MODULES = {"PIL": "pillow"}

# Which packages of the project each may import: data flows one way, and only the driver knows all of them.
SEAMS = {
    "common": set(), "samplers": {"common"}, "text_encoders": {"common"}, "vae": set(), "weights": {"common"},
    "mmdit": set(PACKAGES),
}  # fmt: skip


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Names of the top-level packages that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_run_time_needs_the_agreed_packages_and_no_more() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.split(r"[<>=~! ]", line)[0] for line in project["dependencies"]} == RUN_TIME
    for path in sources(*PACKAGES):
        others = imported(path) - set(sys.stdlib_module_names) - set(PACKAGES)
        others -= {package for package, place in OPTIONAL.items() if path == ROOT / place}
        assert {MODULES.get(name, name) for name in others} <= RUN_TIME, path


def test_packages_know_only_what_they_may() -> None:
    for package, allowed in SEAMS.items():
        for path in sources(package):
            assert imported(path) & set(PACKAGES) <= allowed | {package}, path
    for name in ("config", "attention", "model"):
        assert imported(ROOT / "mmdit" / f"{name}.py") & set(PACKAGES) <= {"mmdit"}


def test_files_fit_the_budget() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PACKAGES, "benchmarks", "tests")
    }
    assert {str(path): n for path, n in lengths.items() if n > 400} == {}


def test_the_model_alone_loads_nothing_else() -> None:
    code = "import sys, mmdit.model; print([m for m in ('vae', 'weights', 'text_encoders', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_readme_names_every_file_of_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sources("mmdit"):
        assert path.name == "__init__.py" or f"  {path.name} " in readme, f"{path.name} is not in the README's tree"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
def test_readme_links_lead_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()


def table(heading: str) -> list[list[str]]:
    """The cells of the README's table whose first column has this heading."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


# What is no way of writing the same file again: formats of single tensors, a place, other kinds, what does not load.
OTHER_ROWS = ("GGUF: every type", "Hugging Face id", "PEFT folder: LoHa", "refused by name: ")


@pytest.mark.parametrize(("heading", "rows"), [("layout", ROWS), ("dialect", DIALECTS), ("kind", KINDS)])
def test_readme_lists_what_is_tested_and_no_more(heading: str, rows: Sequence[Any]) -> None:
    named = [cells[0] for cells in table(heading)]
    assert len(named) == len(set(named))
    assert {name for name in named if not name.startswith(OTHER_ROWS)} == {row.name for row in rows}
    for cells in table(heading):
        assert "::" in cells[-1], cells[0]


def test_tests_that_the_readme_names_are_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", readme)
    assert len(named) > 50
    for file, function in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in functions or not function, f"{file}::{function}"
