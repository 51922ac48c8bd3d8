"""From settings to networks: which file becomes which module, on which device, in which number format."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmdit import variants
from mmdit.attention import missing
from mmdit.common.errors import SettingsError
from mmdit.common.paths import split_scale, user_path
from mmdit.driver.building import MODULES, build, variant_of
from mmdit.driver.controls import check_pictures, open_controls
from mmdit.driver.defaults import default_settings
from mmdit.driver.focusing import check_pushed, found_in
from mmdit.driver.pictures import enlarged, settled
from mmdit.driver.reading import fitted
from mmdit.driver.sampling import sigmas_of, with_layers, with_shift
from mmdit.driver.settings import Settings, check_defaults, check_size
from mmdit.kernels.compiled import lacking
from mmdit.kernels.quantise import QuantisedSource, quantised
from mmdit.memory.devices import indexed
from mmdit.memory.empty import on_meta
from mmdit.memory.residency import Network
from mmdit.variants import Variant
from text_encoders import CLIPTokenizer, EncodesText, T5Tokenizer, TextEncoder, TokenizerError, Words
from vae import TinyAutoencoder, VAEConfig
from vae.tiny import DOWNSCALE, HALVES, tiny_config
from weights import Checkpoint, CheckpointError, Component, Source, hub, open_checkpoint, published
from weights.adapters import Adapters
from weights.embeddings import read_embedding
from weights.fill import fill
from weights.fingerprint import of_adapter, of_model, with_adapters, with_autoencoder, with_embeddings
from weights.tiny import open_tiny

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEMO = Path(__file__).parents[2] / "weights" / "demo"

# The setting that names a separate file for a component.
SEPARATE = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl", "vae": "vae"}


class Parts(NamedTuple):
    """What a picture needs."""

    networks: dict[str, Network]  # empty as yet
    text: EncodesText  # by the modules of `networks`, but for a variant that has another
    adapters: Adapters
    defaults: dict[str, float]  # the model's own settings
    shift: float  # of its noise schedule
    device: torch.device
    dtype: torch.dtype  # of transformer, CLIPs and autoencoder
    fingerprint: str  # a hash of the model's files
    weights: str  # the same with the adapters that the settings name
    controls: dict[str, str | None]  # the networks that are ControlNets, and the type that their files say
    tiny: Callable[[], TinyAutoencoder] | None = None  # reads the small autoencoder, if there is one

    def check(self, settings: Settings) -> Settings:
        """The settings with the model's defaults, dtype and files; SettingsError for what this model cannot do."""
        checked = settings.resolved(self.defaults)  # mistakes first: pictures have to be read
        modules = {name: network.module for name, network in self.networks.items()}
        config, cell = modules["transformer"].config, modules["vae"].config.downscale
        seen = settled(settings, self.defaults, config.patch_size * cell)
        settings = checked if seen is settings else seen.resolved(self.defaults)
        settings = replace(settings, dtype=self.dtype_name, weights=self.weights)
        check_there(settings, self.device, self.dtype)
        nets = {name: modules[name] for name in self.controls}
        largest = settings if settings.upscale is None else enlarged(settings, config.patch_size * cell)
        for part in (config, *(net.config for net in nets.values())):
            check_size(settings, part, cell)
            check_size(largest, part, cell)
        settings = with_shift(settings, self.shift, self.defaults)
        check_pushed(settings, sigmas_of(settings, self.shift))  # there may be no so many noise levels
        settings = fitted(with_layers(settings, config.depth), self.text)
        found_in(settings, self.text)  # the words of its subjects may not be there
        return check_pictures(settings, nets)

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def load_parts(settings: Settings) -> Parts:
    """Open the model that the settings name, the demo if none; no tensor is read as yet.

    Without T5 (`settings.t5` off or omit) its files are not opened. All that can be wrong with the settings, the names
    and the shapes is found here. Raises SettingsError, CheckpointError or TokenizerError.
    """
    device, dtype = device_of(settings), dtype_of(settings)
    settings.resolved({})  # mistakes first: a model may have to be fetched
    check_there(settings, device, dtype)
    variant = None if settings.variant is None else variants.load(settings.variant)
    checkpoint = open_model(settings, wanted_by(settings, variant or variants.PLAIN))
    components = {"transformer": checkpoint.component("transformer")}
    made = variant_of(components["transformer"], variant)
    wanted = wanted_by(settings, made)
    modules = {"transformer": build(components["transformer"], variant)}
    defaults = default_settings(modules["transformer"].config)
    defaults |= check_defaults(checkpoint.defaults, str(checkpoint.path / "mmdit.json"))
    settings.resolved(defaults)
    for name in wanted:
        if not checkpoint.has(name):
            hint = " or --t5 off or --t5 omit runs without it" if name == "t5" else ""
            option = f"--{SEPARATE[name].replace('_', '-')} FILE brings one"
            raise CheckpointError(f"{checkpoint.path}: has no {name}, which a picture needs; {option}{hint}")
    shift = shift_of(checkpoint)
    folders = tokenizer_folders(settings, checkpoint, wanted)
    tokenizers = {name: _TOKENIZERS[name].load(folder) for name, folder in folders.items()}
    components |= {name: checkpoint.component(name) for name in wanted}
    modules |= {name: build(components[name]) for name in wanted if name != "transformer"}
    check_together(components, modules)
    check_size(settings, modules["transformer"].config, modules["vae"].config.downscale)
    controls = open_controls(settings, modules["transformer"].config)
    components |= {name: opened.component for name, opened in controls.items()}
    modules |= {name: opened.module for name, opened in controls.items()}
    networks = {}
    for name in (*wanted, *controls):
        source = Source(modules[name], components[name], part_dtype(name, dtype))
        if name == "transformer" and settings.quantise != "none":
            source = QuantisedSource(source, quantised(modules[name], settings.quantise))
        networks[name] = Network(name, modules[name], source, device)
    adapters = Adapters({name: network for name, network in networks.items() if name in wanted and name != "vae"})
    planned = [adapters.plan(split_scale(lora)[0]).report.path for lora in settings.lora]
    embeddings = embeddings_of(settings)
    text = text_by(made, modules, tokenizers, settings.t5)
    give_words(text, embeddings)
    configs = {name: module.config for name, module in modules.items()}
    fingerprint = of_model(components, configs, shift, folders.values(), [made.file] if made.file else [])
    fingerprint = with_embeddings(fingerprint, embeddings)
    tiny, files = None, []
    if settings.taesd is not None:
        tiny, files = tiny_of(
            user_path("taesd", settings.taesd), modules["vae"].config, device, part_dtype("vae", dtype)
        )
    if settings.taesd_decode:
        fingerprint = with_autoencoder(fingerprint, files)
    weights = with_adapters(fingerprint, [of_adapter(path) for path in planned])
    types = {name: opened.type for name, opened in controls.items()}
    return Parts(networks, text, adapters, defaults, shift, device, dtype, fingerprint, weights, types, tiny)


def tiny_of(
    path: Path, vae: VAEConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], TinyAutoencoder], list[Path]]:
    """What reads a small autoencoder, and its files; CheckpointError where it is none for this model."""
    parts, modules = open_tiny(path), dict[str, Any]()
    for name, part in parts.items():
        try:
            config = tiny_config(name, part.shapes)
            modules[name] = on_meta(HALVES[name].build, config)
        except (KeyError, ValueError, RuntimeError):
            raise CheckpointError(f"{part.path}: no TAESD3: the first or the last layer of its {name}") from None
        if (config.latent_channels, config.image_channels) != (vae.latent_channels, vae.image_channels):
            raise CheckpointError(
                f"{part.path}: a TAESD for latents of {config.latent_channels} channels, expected {vae.latent_channels}"
            )
        Source(modules[name], part)  # checks names and shapes
    if vae.downscale != DOWNSCALE:
        raise CheckpointError(f"{path}: a TAESD has cells of {DOWNSCALE} pixels, the model {vae.downscale}")

    def read() -> TinyAutoencoder:
        return TinyAutoencoder(**{name: fill(module, parts[name], dtype, device) for name, module in modules.items()})

    return read, [file for name in sorted(parts) for file in parts[name].files]


def shift_of(checkpoint: Checkpoint) -> float:
    """The shift of a folder's noise schedule, 3 where it says nothing; CheckpointError for another schedule."""
    scheduler = checkpoint.scheduler or {}
    shift = scheduler.get("shift", 3.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise CheckpointError(f"{checkpoint.path}: scheduler: shift is {shift!r}: expected a number above 0")
    for name, value, usual in published.other_schedule(scheduler):
        raise CheckpointError(
            f"{checkpoint.path}: scheduler: {name} is not supported ({value!r:.60}): expected {usual!r}, as in SD3"
        )
    return shift


def open_model(settings: Settings, wanted: list[str]) -> Checkpoint:
    """The model of the settings, fetched where it is one of the hub, with the separate files in their places."""
    given = {part: (name, getattr(settings, name)) for part, name in SEPARATE.items()}
    separate = {part: user_path(name, text) for part, (name, text) in given.items() if text is not None}
    path = DEMO if settings.model is None else settings.model
    if isinstance(path, str) and hub.is_id(path):
        own = [folder for name, folder in TOKENIZERS.items() if name in wanted]
        tokenizers = () if settings.tokenizers is not None else tuple(own)
        path = hub.fetch(path, [name for name in wanted if name not in separate], tokenizers)
    return open_checkpoint(path, separate)


def check_together(components: dict[str, Component], parts: dict[str, Any]) -> None:
    """Raise CheckpointError where parts, each whole by itself, are of different models."""
    config = {name: part.config for name, part in parts.items()}
    transformer, clips = config["transformer"], [config[name] for name in ("clip_l", "clip_g") if name in config]
    pooled = sum(clip.projection_dim or clip.hidden_size for clip in clips)
    context, vae = sum(clip.hidden_size for clip in clips), config["vae"].latent_channels
    wanted = [(vae == transformer.in_channels, f"latents of {vae} channels, expected {transformer.in_channels}")]
    if clips:
        most = transformer.context_size
        wanted += [
            (pooled == transformer.pooled_size, f"pooled vectors of {pooled}, expected {transformer.pooled_size}"),
            (context <= most, f"CLIP contexts of {context}, at most {most} fit"),
        ]
    if "t5" in config:
        width = config["t5"].d_model
        wanted.append((width == transformer.context_size, f"T5 of {width}, expected {transformer.context_size}"))
    wrong = [what for fits, what in wanted if not fits]
    if wrong:
        files = ", ".join(dict.fromkeys(str(components[name].path) for name in config))
        raise CheckpointError(f"parts of different models: {'; '.join(wrong)}: {files}")


TOKENIZERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}
_TOKENIZERS: dict[str, Any] = {"clip_l": CLIPTokenizer, "clip_g": CLIPTokenizer, "t5": T5Tokenizer}


def wanted_by(settings: Settings, variant: Variant) -> list[str]:
    """The networks that a picture needs."""
    encoders = [name for name in variant.encoders if name != "t5" or settings.t5 == "on"]
    return [name for name in MODULES if name in encoders or name not in TOKENIZERS]


def tokenizer_folders(settings: Settings, checkpoint: Checkpoint, wanted: Sequence[str]) -> dict[str, Path]:
    """Those of --tokenizers, else of the model's folder, else of a Stable Diffusion 3 in the hub's cache."""
    names = {name: folder for name, folder in TOKENIZERS.items() if name in wanted}
    given = None if settings.tokenizers is None else user_path("tokenizers", settings.tokenizers)
    folder = given or checkpoint.tokenizers or hub.cached_tokenizers(tuple(names.values()))
    if names and folder is None:
        raise TokenizerError(
            f"{checkpoint.path}: has no tokenizers: --tokenizers FOLDER names a folder with tokenizer/, "
            "tokenizer_2/ and tokenizer_3/, as every diffusers folder of Stable Diffusion 3 has them"
        )
    return {name: Path(folder) / own for name, own in names.items()} if folder else {}


def text_by(variant: Variant, modules: dict[str, Any], tokenizers: dict[str, Any], t5: str) -> EncodesText:
    """Who reads prompts: the model's encoders, or the variant's own; CheckpointError where that one does not fit."""
    config = modules["transformer"].config
    if variant.text is not None:
        text = variant.text(config)
        if text.width != config.context_size:
            raise CheckpointError(
                f"the variant {variant.name}: texts of width {text.width}, expected {config.context_size}"
            )
        return text
    return TextEncoder(
        tokenizers.get("clip_l"),
        tokenizers.get("clip_g"),
        tokenizers.get("t5"),
        *map(modules.get, TOKENIZERS),
        t5_mode=t5 if "t5" in variant.encoders else "omit",
        width=config.context_size,
    )


def embeddings_of(settings: Settings) -> dict[str, Path]:
    """The files of textual inversions by their words; SettingsError for two of one word."""
    found: dict[str, Path] = {}
    for text in settings.embedding:
        path = user_path("embedding", text)
        for word, other in found.items():
            if word.casefold() == path.stem.casefold():
                raise SettingsError(f"embedding: {other} and {path} have the same word, {path.stem}: rename one")
        found[path.stem] = path
    return found


def give_words(text: EncodesText, embeddings: dict[str, Path]) -> None:
    """Have a text encoder know textual inversions; SettingsError where it can know none, CheckpointError for a file."""
    if not embeddings:
        return
    if not isinstance(text, TextEncoder):
        raise SettingsError("embedding: the model's variant reads texts in a way of its own")
    widths = {name: clip.config.hidden_size for name, (_, clip) in text.clips.items()}
    most = min(tokenizer.room(clip.config.max_length) for tokenizer, clip in text.clips.values())
    vectors = {word: read_embedding(path, widths, most) for word, path in embeddings.items()}
    for name in widths:
        own = {word: given[name] for word, given in vectors.items() if name in given}
        text.words |= {name: Words(own)} if own else {}


def device_of(settings: Settings) -> torch.device:
    """The device asked for; SettingsError where it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name, there in available.items() if there) if settings.device == "auto" else settings.device
    if not available[name]:
        there = ", ".join(name for name, there in available.items() if there)
        raise SettingsError(f"device {name} is not available here: there is {there}")
    return indexed(torch.device(name))


def check_there(settings: Settings, device: torch.device, dtype: torch.dtype) -> None:
    """Raise SettingsError where the attention or the compiler that the settings ask for is not there."""
    reason = missing(settings.attention, device, dtype)
    if reason is not None:
        raise SettingsError(f"attention {settings.attention} cannot be used: {reason}")
    reason = lacking(device) if settings.compile else None
    if reason is not None:
        raise SettingsError(f"compile cannot be used: {reason}")
    if settings.quantise == "fp8" and device.type == "mps":
        raise SettingsError("quantise fp8 cannot be used: mps has no such numbers; int8 does")


def dtype_of(settings: Settings) -> torch.dtype:
    """The dtype asked for; auto is bfloat16 where the device multiplies it fast, else float32 (CPU) or float16."""
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    device = device_of(settings).type
    if device == "cpu":
        return torch.bfloat16 if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else torch.float32
    if device == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def part_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """T5 overflows in float16 and computes in bfloat16 instead; an autoencoder may, and computes in float32."""
    return {"t5": torch.bfloat16, "vae": torch.float32}.get(name, dtype) if dtype == torch.float16 else dtype
