"""What computations take: the most bytes that their tensors take at a time, weights left out.

Encoding and denoising are measured by running the networks as they are, without memory (`mmdit.memory.meter`). The
bounds are arithmetic, as decoding is (`vae.memory`); they hold for the transformer as published.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmdit.attention import attention_by
from mmdit.control.network import ControlConfig, ControlNet
from mmdit.maps import Look
from mmdit.memory.devices import locked_bytes
from mmdit.memory.empty import emptied, on_meta
from mmdit.memory.meter import held_bytes, peak_bytes
from mmdit.memory.plan import Job
from mmdit.memory.residency import Network, Role, of_role
from mmdit.prepared import Prepared, Row, look, predict
from text_encoders import CLIPConfig
from vae import cpu_rows, decode_peak, encode_peak, locked_places, rows_for

_UNITS = 20  # tensors as large as all tokens together that a step never needs more of at a time
_TABLES = 2  # of scores, and
_EXACT = 8  # tensors as large as all tokens, in float32, that attention by the formula needs beside them
_FLOAT32 = 4  # bytes
_KEPT = 60  # tensors as large as all tokens that a block never keeps more of for its gradients
_LOOKED_AT = 8  # tokens of the text whose maps a picture with gradients is taken to need


class Activations:
    """Of one model's networks, for any job; each is measured once."""

    def __init__(self, networks: Mapping[str, Network], device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of the latents, as the networks that denoise are given them."""
        self._networks, self._device, self._dtype = networks, device, dtype
        self._measured: dict[tuple[object, ...], int] = {}
        self._copies: dict[str, Any] = {}

    # ---- encoding --------------------------------------------------------------------------------

    def encoding(self, name: str, job: Job) -> int:
        """Bytes for the texts of one picture, all at once."""
        network, (rows, length) = self._networks[name], self._read(name, job)

        def encode() -> int:
            if network.editable:
                module = self._empty(name)
            else:  # what a layer leaves behind takes no more after twenty of these encoders' layers than after two
                module = on_meta(type(network.module), replace(network.module.config, num_layers=2), _dtype(network))
            return peak_bytes(module, torch.zeros(rows, length, dtype=torch.long, device="meta"))

        return self._once((name, rows, length), encode)

    def encoding_bound(self, name: str, job: Job) -> int:
        """Bytes that `encoding` does not exceed."""
        config, (rows, length) = self._networks[name].module.config, self._read(name, job)
        wide = config.intermediate_size if isinstance(config, CLIPConfig) else config.d_ff
        numbers = rows * length * (8 * wide + 4 * config.num_heads * length)
        return _dtype(self._networks[name]).itemsize * numbers

    def _read(self, name: str, job: Job) -> tuple[int, int]:
        """The rows of tokens that a text encoder is given for one picture, and how many each has."""
        config = self._networks[name].module.config
        if isinstance(config, CLIPConfig):
            return job.texts * job.chunks + job.blank, config.max_length
        return job.texts + job.blank, job.t5_length

    # ---- denoising -------------------------------------------------------------------------------

    def table(self, name: str, job: Job, batch: int) -> int:
        """Bytes of what every block is told, kept for all steps of `batch` pictures."""
        texts = job.texts * (batch if job.apart else 1)
        return self._once((name, "table", job.steps, texts), lambda: self._told(name, job.steps * texts))

    def _told(self, name: str, rows: int) -> int:
        """Bytes of what every block is told for so many noise levels and texts."""
        model = self._empty(name)
        sigma = torch.empty(rows, device="meta")
        pooled = torch.empty(rows, model.config.pooled_size, dtype=self._dtype, device="meta")
        return held_bytes(model.modulations, sigma, pooled)

    def table_bound(self, name: str, job: Job, batch: int) -> int:
        """Bytes of `table` for the transformer as published, and once more of one step's for each picture."""
        shapes = self._networks[name].shapes
        each = sum(shape[0] for name, shape in shapes.items() if name.endswith("adaLN_modulation.1.weight"))
        texts = job.texts * (batch if job.apart else 1)
        return (job.steps * texts + job.texts * batch) * each * self._dtype.itemsize

    def denoising(self, name: str, job: Job, batch: int) -> int:
        """Bytes for one step of `batch` pictures, without the table."""
        key = (name, job.rows, job.columns, job.texts, job.changed, batch, job.apart, self._context(job), job.attention)

        def measure(step: Callable[..., object]) -> int:
            model = self._empty(name)
            attention_by(model, job.attention)
            return peak_bytes(step, model, job, batch) - self._told(name, job.texts * (batch if job.apart else 1))

        found = self._once(key, lambda: measure(self._step))
        if not job.steep or isinstance(self._networks[name].module, ControlNet):
            return found
        return max(found, self._once((*key, "steep"), lambda: measure(self._steep_step)))

    def _steep_step(self, model: Any, job: Job, batch: int) -> object:
        """The velocity for one text of each picture with the gradient of a cost, on "meta"."""
        wanted = Look(tuple(range(_LOOKED_AT)), lambda maps: maps.square().sum())
        latents, rows = self._rows(model, job, batch, [i * job.texts if job.apart else 0 for i in range(batch)])
        return look(latents, [row._replace(look=wanted) for row in rows])

    def _step(self, model: Any, job: Job, batch: int) -> object:
        """The velocity of a batch in a first step, on "meta"."""
        each = 1 if job.apart else batch
        texts = [text for text in range(job.texts * batch // each) for _ in range(each)] + [0] * (job.changed * batch)
        latents, rows = self._rows(model, job, batch, texts)
        if isinstance(model, ControlNet):
            return predict(latents, rows, more=model.beside(latents))
        return predict(latents, rows).float()

    def _rows(self, model: Any, job: Job, batch: int, rows: Sequence[int]) -> tuple[Tensor, list[Row]]:
        """Latents of a batch on "meta", and what is asked of each. rows: their texts."""
        config, texts = model.config, job.texts * (batch if job.apart else 1)
        context = torch.empty(texts, self._context(job), config.context_size, dtype=self._dtype, device="meta")
        pooled = torch.empty(texts, config.pooled_size, dtype=self._dtype, device="meta")
        latents = torch.empty(batch, config.in_channels, job.rows, job.columns, device="meta")
        prepared = Prepared(model, context, pooled, (1.0,))
        latents = torch.cat([latents] * (len(rows) // batch)).to(self._dtype)
        return latents, [Row(prepared, 1.0, row) for row in rows]

    def denoising_bound(self, name: str, job: Job, batch: int) -> int:
        """Bytes that `denoising` does not exceed."""
        config, length = self._networks[name].module.config, self._context(job)
        rows = (job.texts + job.changed) * batch
        each = job.rows * job.columns // config.patch_size**2 + length  # tokens of a row
        numbers = rows * each * _UNITS * config.hidden_size + rows * length * config.context_size
        if isinstance(config, ControlConfig):  # what each block adds
            numbers += rows * each * config.depth * config.hidden_size
        if job.steep:  # what goes into each block, and what one of them keeps on the way back
            numbers += batch * each * (config.depth + _KEPT) * config.hidden_size
        found = self._dtype.itemsize * numbers
        source, shapes = self._networks[name].source, self._networks[name].shapes
        if any(f"{tensor}_scale" in source.shapes for tensor in shapes):  # a matrix in 8 bits is turned back to be used
            found += max(math.prod(shape) for shape in shapes.values()) * (_FLOAT32 + 2 * self._dtype.itemsize)
        if job.attention == "math":
            scores = _TABLES * config.num_heads * each
            found += max(_FLOAT32, self._dtype.itemsize) * rows * each * (scores + _EXACT * config.hidden_size)
        return found

    def _context(self, job: Job) -> int:
        """Tokens of a picture's text: CLIP's, which the two of them share, and T5's; or as many as the job says."""
        if job.context is not None:
            return job.context
        configs = [self._networks[name].module.config for name in of_role(Role.ENCODES_TEXT, self._networks)]
        clip = max(config.max_length for config in configs if isinstance(config, CLIPConfig))
        return job.chunks * clip + job.t5_length

    # ---- decoding, and encoding pictures ---------------------------------------------------------

    def decoding(self, name: str, job: Job, budget: int) -> tuple[int | None, int]:
        """The height of the highest strips for which the budget suffices, None for the whole, and the bytes they take.

        Where it suffices for none, the lowest. For one picture: those of a batch are decoded one by one.
        """
        return self._in_strips(decode_peak, name, job, budget)

    def encoding_picture(self, name: str, job: Job, budget: int) -> tuple[int | None, int]:
        """The same for the encode of a picture."""
        return self._in_strips(encode_peak, name, job, budget)

    def _in_strips(
        self, peak_of: Callable[..., int], name: str, job: Job, budget: int
    ) -> tuple[int | None, int]:  # fmt: skip
        network, apart = self._networks[name], self._device.type != "cpu"
        config, dtype = network.module.config, _dtype(network)
        rows = rows_for(config, job.rows, job.columns, dtype, budget, apart, peak_of) or 1
        if not apart and dtype.itemsize == 2:  # strips are faster there; float32 keeps to the plain path's bits
            rows = min(rows, cpu_rows(job.rows, job.columns))
        rows = -(-job.rows // -(-job.rows // rows))  # as many strips of equal height
        strip = None if rows >= job.rows else rows
        return strip, peak_of(config, job.rows, job.columns, strip, dtype, apart)

    def locked(self, name: str, job: Job) -> int:
        """Bytes of the host's memory that are page-locked where strips of one picture lie there."""
        network = self._networks[name]
        places, numbers = locked_places(network.module.config, job.rows, job.columns)
        return places * locked_bytes(numbers * _dtype(network).itemsize)

    def _empty(self, name: str) -> Any:
        """A network as it is now, to be run without memory."""
        network = self._networks[name]
        if network.editable:
            return emptied(network.module)
        if name not in self._copies:
            self._copies[name] = emptied(network.module)
        return self._copies[name]

    def _once(self, key: tuple[object, ...], measure: Callable[[], int]) -> int:
        if key not in self._measured or any(network.editable for network in self._networks.values()):
            self._measured[key] = measure()
        return self._measured[key]


def _dtype(network: Network) -> torch.dtype:
    """What it computes in."""
    return network.source.dtype(next(iter(network.shapes)))
