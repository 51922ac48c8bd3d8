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
PACKAGES = ("mmdit", "samplers", "text_encoders", "vae", "weights")
RUN_TIME = {"torch", "safetensors", "sentencepiece", "tokenizers", "einops", "numpy", "pillow", "tqdm"}
# Package: the one file, or folder, that asks for it.
OPTIONAL = {
    "gguf": "weights/gguf.py",
    "huggingface_hub": "weights/hub.py",
    "starlette": "mmdit/serve",
    "uvicorn": "mmdit/serve",
    "ray": "mmdit/ray",
}
MODULES = {"PIL": "pillow"}

# Which packages of the project each may import: data flows one way, and only the driver knows all of them. What all of
# them use lies in mmdit/common, which imports nothing of the project.
SEAMS = {"samplers": set(), "text_encoders": set(), "vae": set(), "weights": set(), "mmdit": set(PACKAGES)}


READMES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("**/README.md") if ".venv" not in path.parts)


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


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
        others -= {package for package, place in OPTIONAL.items() if path.is_relative_to(ROOT / place)}
        assert {MODULES.get(name, name) for name in others} <= RUN_TIME, path


def test_packages_know_only_what_they_may() -> None:
    ground = ROOT / "mmdit" / "common"
    for package, allowed in SEAMS.items():
        for path in sources(package):
            others = {other for other in imports(path) if other.parent != ground}
            assert {other.relative_to(ROOT).parts[0] for other in others} - {"tests"} <= allowed | {package}, path
    assert {other.parent for path in ground.glob("*.py") for other in imports(path)} <= {ground}
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


def imports(path: Path) -> set[Path]:
    """The project's files that a file imports, anywhere and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            file = ROOT / f"{name.replace('.', '/')}.py"
            found |= {file} if file.exists() else set()
    return found


def test_no_file_imports_itself_by_way_of_others() -> None:
    edges = {path: imports(path) for path in sources(*PACKAGES, "benchmarks", "tests")}
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " -> ".join(p.name for p in (*way[way.index(path) :], path))
        if path not in done:
            for other in edges.get(path, ()):
                visit(other, (*way, path))
            done.add(path)

    for path in edges:
        visit(path, ())
    assert len(done) > 100 and sum(map(len, edges.values())) > 300


def named_in(readme: str) -> set[str]:
    """The Python files that a README names, each by its path from the README's folder, if there is one."""
    folder = (ROOT / readme).parent
    room, names = "", set()
    for line in (ROOT / readme).read_text(encoding="utf-8").splitlines():
        cells = line.split("|")
        if line.startswith("| ") and len(cells) > 3:
            rooms = re.findall(r"`([\w/]+/)`", cells[1])
            room = rooms[0] if rooms else room if not cells[1].strip() else ""
        names |= {place + name for name in re.findall(r"`([\w/]+\.py)`", line) for place in ("", room)}
    return {name for name in names if (folder / name).exists()}


def test_every_file_of_the_driver_has_its_line() -> None:
    named = named_in("mmdit/README.md")
    for path in sources("mmdit"):
        name = path.relative_to(ROOT / "mmdit").as_posix()
        assert path.name == "__init__.py" or name in named, f"{name} is not in mmdit/README.md"


def test_every_file_of_weights_has_its_line() -> None:
    named = named_in("weights/README.md")
    for path in (ROOT / "weights").glob("*.py"):
        assert path.name.startswith("__") or path.name in named, f"{path.name} is not in weights/README.md"


def test_a_stranger_reads_two_hundred_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_where_do_i_change_what_names_what_is_there() -> None:
    """Files, folders and tests of every row."""
    for what, *cells in table("README.md", "to change"):
        for name in re.findall(r"`([^`]+)`", " ".join(cells)):
            for word in name.split():
                if "/" in word:
                    assert list(ROOT.glob(word.rstrip("/"))), (what, word)


LINKS = [(name, link) for name in READMES for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(name))]


@pytest.mark.parametrize(("readme", "link"), LINKS)
def test_links_lead_somewhere(readme: str, link: str) -> None:
    assert link.startswith("https://") or ((ROOT / readme).parent / link).exists()


def anchors(path: Path) -> set[str]:
    """What can be linked to in a file, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_into_files_lead_to_headings() -> None:
    for readme in READMES:
        for file, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text_of(readme)):
            target = (ROOT / readme).parent / file if file else ROOT / readme
            assert anchor in anchors(target), (readme, file, anchor)


def table(readme: str, heading: str) -> list[list[str]]:
    """The cells of a README's table whose first column has this heading."""
    lines = text_of(readme).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


# What is no way of writing the same file again: formats of single tensors, a place, other kinds, what does not load.
OTHER_ROWS = ("GGUF: every type", "Hugging Face id", "PEFT folder: LoHa", "refused by name: ")


@pytest.mark.parametrize(("heading", "rows"), [("layout", ROWS), ("dialect", DIALECTS), ("kind", KINDS)])
def test_tables_list_what_is_tested_and_no_more(heading: str, rows: Sequence[Any]) -> None:
    cells_of = table("weights/README.md", heading)
    named = [cells[0] for cells in cells_of]
    assert len(named) == len(set(named))
    assert {name for name in named if not name.startswith(OTHER_ROWS)} == {row.name for row in rows}
    for cells in cells_of:
        assert "::" in cells[-1], cells[0]


def test_tests_that_are_named_are_there() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", "".join(map(text_of, READMES)))
    assert len(named) > 50
    functions = dict[str, set[str]]()
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for file, function in named:
        assert function in functions[file] or not function, f"{file}::{function}"
