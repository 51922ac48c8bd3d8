"""What a user may say of the picture, of the model's files, and of where things go."""

from dataclasses import dataclass, fields
from typing import Any

from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, from_one, from_one_to, option, shown, wrong
from mmdit.common.paths import split_scale
from mmdit.driver.likeness import LIKE
from mmdit.parallel.options import ManyOptions, ParallelOptions
from samplers.focus.options import GAINS, LOSSES
from samplers.options import between
from text_encoders.subjects import subjects_of

_STRONGEST = 1000  # scale of a focus
_MOST = 100_000  # pictures of one prompt, and steps from one preview to the next


@dataclass(frozen=True)
class PictureOptions:
    """The picture"""

    prompt: str = option("", "what to draw", Mark.OWN)
    negative: str = option("", "what to steer away from", Mark.OWN, metavar="TEXT")
    width: int | None = option(None, "picture width in pixels", usual=1024, metavar="W", check=from_one)
    height: int | None = option(None, "picture height in pixels", usual=1024, metavar="H", check=from_one)
    seed: int = option(0, "seed of the first picture; picture i has seed S + i", Mark.OWN, metavar="S")
    count: int = option(1, "number of pictures", Mark.OWN, Mark.NOT_SEEN, metavar="N", check=from_one_to(_MOST))

    def check_together(self) -> None:
        if not -(2**63) <= self.seed <= 2**64 - self.count:
            raise wrong("seed", self.seed, "a whole number of at most 64 bits")


@dataclass(frozen=True)
class LikeOptions:
    """Whose picture it is to be"""

    like: str | None = option(
        None, "do as this program where programs differ; what is given besides holds", choices=LIKE
    )  # fmt: skip
    rng: str = option(
        "cpu",
        "who draws the noise: cpu, the same on every machine; cuda, as a CUDA device would",
        choices=("cpu", "cuda"),
    )


def _check_subjects(name: str, value: Any) -> None:
    subjects_of(value, name)


@dataclass(frozen=True)
class FocusOptions:
    """Several subjects"""

    focus: str | None = option(
        None, "keep these subjects apart, as they stand in the prompt; horse#2 is the second horse", Mark.OWN,
        metavar="TEXT;TEXT", check=_check_subjects,
    )  # fmt: skip
    focus_scale: float = option(
        0.3, "how strongly; with relative, as a share of the velocity", metavar="X", check=between(0, _STRONGEST)
    )
    focus_loss: str = option("focus", "what it costs that subjects mix", choices=LOSSES)
    focus_until: float = option(
        0.9, "rest where the share of noise is below this; 0: never", metavar="X", check=between(0, 1)
    )
    focus_gain: str = option("relative", "how the strength goes over the steps", choices=GAINS)
    attention_maps: str | None = option(
        None,
        "where the picture attends to these words, as a sheet beside it: NAME.attention.png",
        Mark.OWN,
        Mark.NOT_SEEN,
        metavar="TEXT;TEXT",
        check=_check_subjects,
    )

    def check_together(self) -> None:
        for f in fields(FocusOptions):
            if self.focus is None and f.name.startswith("focus_") and getattr(self, f.name) != f.default:
                raise SettingsError(
                    f"{f.name} is {shown(getattr(self, f.name))}, but focus is not given: "
                    "expected the subjects to keep apart, as in horse; bear"
                )


def _check_lora(_: str, value: Any) -> None:
    split_scale(value)


def _file(what: str) -> Any:
    return option(None, f"{what} from this file, not the model's", Mark.LOADED, Mark.PATH, metavar="FILE")


@dataclass(frozen=True)
class ModelOptions:
    """The model"""

    model: str | None = option(
        None,
        "diffusers folder, .safetensors or .gguf file, or Hugging Face id (default: the demo model)",
        Mark.LOADED,
        Mark.PATH,
        metavar="FOLDER|FILE|ID",
    )
    clip_l: str | None = _file("CLIP-L")
    clip_g: str | None = _file("CLIP-G")
    t5xxl: str | None = _file("T5")
    vae: str | None = _file("autoencoder")
    tokenizers: str | None = option(
        None,
        "folder with tokenizer/, tokenizer_2/, tokenizer_3/, for a single file",
        Mark.LOADED,
        Mark.PATH,
        metavar="FOLDER",
    )
    lora: tuple[str, ...] = option(
        (),
        "adapter to merge, a file or a folder, with its strength (default 1); repeat it for more",
        Mark.LOADED,
        Mark.PATH,
        metavar="FILE|FOLDER[:SCALE]",
        check=_check_lora,
    )
    variant: str | None = option(
        None,
        "the file or module that registers another architecture (mmdit/variants.py)",
        Mark.LOADED,
        Mark.PATH,
        metavar="FILE|MODULE",
    )
    weights: str | None = option(None, "a hash of what these files hold", Mark.FOUND)


@dataclass(frozen=True)
class WatchOptions:
    """Watching, and repeating"""

    preview: int | None = option(
        None,
        "every N steps write the picture that is to come beside the result, as NAME.preview.png, until that is drawn",
        Mark.OF_THE_RUN,
        Mark.NOT_SEEN,
        metavar="N",
        check=from_one_to(_MOST),
    )
    verbose: bool = option(
        False, "say what every step does: noise level, and what the subjects cost", Mark.OF_THE_RUN, Mark.NOT_SEEN
    )
    from_png: str | None = option(
        None,
        "repeat this picture from what it says of itself; what else is given here comes first",
        Mark.OF_THE_RUN,
        Mark.NOT_SEEN,
        metavar="FILE",
    )


@dataclass(frozen=True)
class OutputOptions:
    """What is written, and a list in place of a prompt"""

    out: str = option(
        "out",
        "PNG file, or folder for files named after prompt and seed",
        Mark.OWN,
        Mark.NOT_SEEN,
        metavar="FILE|FOLDER",
    )
    prompts: str | None = option(
        None,
        "draw a list: a prompt a line, or JSON lines with any setting of a picture; what is there is skipped",
        Mark.OF_THE_RUN,
        Mark.NOT_SEEN,
        metavar="FILE",
    )
    dump: str | None = option(
        None,
        "write every stage's tensors into this file",
        Mark.OF_THE_RUN,
        Mark.NOT_SEEN,
        metavar="FILE.safetensors",
    )


# What is no setting of a picture from Python, and not of interest to other tools.
OF_THE_COMMAND = tuple(
    f.name for room in (WatchOptions, ParallelOptions, ManyOptions, OutputOptions) for f in fields(room)
)
