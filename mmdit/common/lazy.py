"""Names of a package that are imported when they are asked for, so that its torch-free modules load without PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package. modules: {module: names that the package has from it}.

    No name may be that of a module: once this is imported, the package has the module under it.
    """
    places = {name: module for module, names in modules.items() for name in names}
    assert not places.keys() & modules.keys()

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)

    return get
