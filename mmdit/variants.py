"""Other architectures than the published one, each in a file of its own that registers it under a name.

    # rope.py
    @dataclass(frozen=True)
    class Config(MMDiTConfig):
        base: float = 10000.0              # what the published model has no number for

    @variant("rope", Config)
    class Rope(MMDiT):                     # a subclass, or a function that changes a built model
        ...

`--variant rope.py` draws with it, `Pipeline.load(..., variant="rope.py")` likewise, and a dotted module serves as well.
A saved model's config.json has the name and all numbers. Opening a model runs none of its code: a variant is known only
where its file was named, or imported.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mmdit.common.errors import SettingsError, one_line
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT

if TYPE_CHECKING:
    from text_encoders import EncodesText

Made = TypeVar("Made", bound=Callable[..., Any])
ENCODERS = ("clip_l", "clip_g", "t5")


class Variant(NamedTuple):
    """An architecture: its numbers, and how a model is made of them."""

    name: str
    config: type[MMDiTConfig]
    make: Callable[..., Any]  # of a config a model, or of a built model None or another
    module: str  # that it was registered in
    file: Path | None
    encoders: tuple[str, ...] = ENCODERS  # which of the published ones it reads texts with
    text: "Callable[[MMDiTConfig], EncodesText] | None" = None  # or who reads them in their place

    def build(self, config: MMDiTConfig) -> MMDiT:
        """The model, without values where the default device is "meta"; its name is its attribute `variant`."""
        if isinstance(self.make, type):
            model = self.make(config)
        else:
            model = MMDiT(config)
            model = self.make(model) or model
        vars(model)["variant"] = self.name
        return model


PLAIN = Variant("", MMDiTConfig, MMDiT, "mmdit.model", None)
_known: dict[str, Variant] = {}  # by name, the last of each
_made: dict[tuple[str, str], Variant] = {}  # by module and name


def variant(
    name: str,
    config: type[MMDiTConfig] = MMDiTConfig,
    encoders: Sequence[str] = ENCODERS,
    text: "Callable[[MMDiTConfig], EncodesText] | None" = None,
) -> Callable[[Made], Made]:
    """Register the class or function that follows under a name; the last of a name counts.

    encoders: those of the published text encoders that it has, one CLIP at least; the others' files are not opened.
    text: called with the model's config, whoever reads prompts in the place of all of them (`EncodesText`).
    """
    assert {*encoders} <= {*ENCODERS} and any(encoder.startswith("clip") for encoder in encoders), encoders

    def register(make: Made) -> Made:
        file = getattr(sys.modules.get(make.__module__), "__file__", None)
        own = () if text else tuple(e for e in ENCODERS if e in encoders)
        found = Variant(name, config, make, make.__module__, file and Path(file), own, text)
        _known[name] = _made[make.__module__, name] = found
        return make

    return register


def known(name: str) -> Variant | None:
    """The variant of this name, if it was registered in this process."""
    return _known.get(name)


def load(text: str) -> Variant:
    """The one variant that a file, `NAME.py`, or a dotted module registers.

    Runs it. Raises SettingsError where there is none, or more than one, or its code fails.
    """
    path = Path(text).expanduser()
    try:
        name = _run(path) if text.endswith(".py") else importlib.import_module(text).__name__
    except ModuleNotFoundError as error:
        if error.name != text.split(".")[0] and error.name != text:
            raise _failed(text, error) from error
        raise SettingsError(f"variant: no module {text}: expected a file NAME.py or a module's dotted name") from None
    except Exception as error:
        raise _failed(text, error) from error
    found = [v for (module, _), v in _made.items() if module == name]
    if len(found) != 1:
        what = f"registers {', '.join(v.name for v in found)}: expected one" if found else "registers no variant"
        raise SettingsError(f"variant: {text} {what}; one stands under @variant(NAME) of mmdit.variants")
    return found[0]


def _run(path: Path) -> str:
    """Run a file as a module of its own; returns the module's name."""
    if not path.is_file():
        raise SettingsError(f"variant: {path}: no such file")
    name = f"variant_{path.resolve()}"
    for old in [key for key in _made if key[0] == name]:
        del _made[old]
    spec = importlib.util.spec_from_file_location(name, path, loader=_AsItIs(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return name


class _AsItIs(SourceFileLoader):
    """Compiles a file anew: Python takes one of the same size, changed within the same second, for the same."""

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        return self.source_to_code(self.get_data(self.path), self.path)


def _failed(text: str, error: Exception) -> SettingsError:
    if isinstance(error, SettingsError):
        return error
    trace, line = error.__traceback__, getattr(error, "lineno", None)
    while trace is not None:
        if text in (trace.tb_frame.f_code.co_filename, trace.tb_frame.f_globals.get("__name__")):
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f", line {line}" if line else ""
    return SettingsError(one_line(f"variant: {text}{where}: {type(error).__name__}: {error}"))


def config_json(model: MMDiT) -> dict[str, Any]:
    """What a model's config.json has to say so that it is built alike: diffusers' names, the variant's, its numbers."""
    name = getattr(model, "variant", "")
    own = {"_class_name": "MMDiT", "variant": name} if name else {"_class_name": "SD3Transformer2DModel"}
    return own | model.config.to_json()
