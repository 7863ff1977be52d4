"""Calibration statistics: what every method reads, in memory or on disk, one layer at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from masa.errors import MasaError, unknown
from masa.runs.files import sha256_of, whole_file
from masa.runs.run import write_json

FORMAT = 1
INPUT_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "g": "gu", "u": "gu", "d": "d"}
"""Projection letter -> the input that it reads; q, k and v read the same, and so do the FFN's gate and up."""

MADE_OF = ("samples", "length", "seed", "gradient_samples", "inputs", "tokens_sha256", "text_sha256", "model_sha256")
MADE_OF += ("threads",)
LATER = ("seed", "text_sha256", "threads")
"""Of those, what statistics of an earlier version do not say."""


@dataclass
class Calibration:
    """Second moments of the projections' inputs and mean outputs of the blocks, over N x T tokens.

    Attributes:
        samples, length: N sequences of T tokens.
        num_layers: L.
        inputs: the inputs covered, values of :data:`INPUT_OF`.
        tokens_sha256, model_sha256: of the token ids and of all parameters.
        tokens_per_second: of the pass that made this.
        drift: (L - 1,) ``KL(p_l || p_l+1)`` between consecutive blocks' mean outputs read through the final norm and
            the head.
        gradient_samples: sequences with gradients (:mod:`masa.compression.calibration.gradients`), or 0.
        seed, text_sha256: of the choice of the tokens, and of the text that they are from, where that is known.
        threads: of the CPU, on which the last bits of sums depend.
        sha256: layer file -> checksum, as saved; each is verified when the file is first read.
        directory: where the layers' files are; None keeps them in memory.
    """

    samples: int
    length: int
    num_layers: int
    inputs: list[str]
    tokens_sha256: str
    model_sha256: str
    tokens_per_second: float = 0.0
    drift: list[float] = field(default_factory=list)
    gradient_samples: int = 0
    seed: int | None = None
    text_sha256: str | None = None
    threads: int | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None
    _verified: set[str] = field(default_factory=set, repr=False)
    _layers: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def gram(self, letter: str, layer: int) -> Tensor:
        """H = X^T X (in, in), float64, of the input of one projection in one layer.

        Raises:
            MasaError: a projection that was not calibrated, or a layer's file that is missing or truncated.
        """
        name = INPUT_OF[letter]
        if name not in self.inputs:
            raise unknown(f"In this calibration the input of projection {letter!r}:", name, self.inputs)
        return self._read(layer, name).to(torch.float64, copy=True)

    def gradient_gram(self, letter: str, layer: int) -> Tensor:
        """G = E[g g^T] (out, out), float64, of the loss's gradients at the output of one projection.

        Raises:
            MasaError: gradients were not collected.
        """
        if not self.gradient_samples:
            raise MasaError(
                "This calibration has no gradients, which this method needs: calibrate anew with `masa calibrate … "
                "--gradient-samples 12` (gradient_samples of the calibration)."
            )
        return self._read(layer, f"gradient.{letter}").to(torch.float64, copy=True)

    def mean_output(self, layer: int) -> Tensor:
        """Mean output (d,) of block ``layer`` over all tokens, float32."""
        return self._read(layer, "output")

    def add(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Store one layer's statistics: in the host's memory, or in the file of that layer if there is a directory."""
        if self.directory is None:  # of all layers they can take more than a GPU that holds the model has left
            self._layers[layer] = self._layers.get(layer, {}) | {name: t.cpu() for name, t in tensors.items()}
        else:
            _write(self.directory, layer, tensors)

    def save(self, directory: str | Path | None = None) -> Path:
        """Write ``calibration.json`` and one safetensors file a layer; a directory given at the start holds both.

        Returns:
            The directory.

        Raises:
            MasaError: the statistics are in memory and no directory is given.
        """
        target = Path(directory or self.directory or "")
        if directory is None and self.directory is None:
            raise MasaError("This calibration is in memory: save(directory) needs a directory.")
        if self.directory is not None and target.resolve() != self.directory.resolve():
            for file in self.directory.glob("*-[0-9][0-9][0-9].safetensors"):
                with whole_file(target / file.name) as path:
                    shutil.copyfile(file, path)
        for layer, tensors in self._layers.items():
            _write(target, layer, tensors)
        self.sha256 = {file.name: sha256_of(file) for file in sorted(target.glob("*-[0-9][0-9][0-9].safetensors"))}
        self._verified.clear()
        data = {k: v for k, v in asdict(self).items() if k not in ("directory", "_layers", "_verified")}
        write_json(target / "calibration.json", {"format": FORMAT, **data})
        return target

    @classmethod
    def load(cls, directory: str | Path) -> Calibration:
        """Open a saved calibration; layers are read when asked for.

        Raises:
            MasaError: not a calibration, another format, or a layer missing.
        """
        directory = Path(directory)
        path = directory / "calibration.json"
        if not path.is_file():
            raise MasaError(f"{path} is missing: {directory} is no finished calibration; `masa calibrate` makes one.")
        try:
            data = json.loads(path.read_text())
            found = data.pop("format", None)
            if found != FORMAT:
                raise MasaError(f"{path} has format {found!r}; this version of masa reads format {FORMAT}.")
            calibration = cls(**data, directory=directory)
            wrong = type(calibration.num_layers) is not int or not isinstance(calibration.sha256, dict)
        except (ValueError, TypeError, AttributeError) as error:
            raise MasaError(f"{path} is not a calibration: {error}; make it anew with `masa calibrate`.") from error
        if wrong:
            raise MasaError(f"{path} is not a calibration; make it anew with `masa calibrate`.")
        for layer in range(calibration.num_layers):
            if not (directory / _name(layer)).is_file():
                raise MasaError(f"{directory / _name(layer)} is missing; make it anew with `masa calibrate`.")
        return calibration

    def digest(self) -> str:
        """Hash of what decides the statistics: tokens, model, inputs, gradients, and the dtype through the drift."""
        told = [self.tokens_sha256, self.model_sha256, self.inputs, self.gradient_samples, self.drift]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def made_of(self) -> dict[str, Any]:
        """What a result that was made with these statistics says of them."""
        return {key: getattr(self, key) for key in MADE_OF}

    def expect(self, wanted: Mapping[str, Any], where: str = "") -> None:
        """Refuse statistics that are not what is asked for, as an earlier calibration may have left them.

        Args:
            wanted: keys of :meth:`made_of`, and ``projections``, with their values; others are left alone.
            where: what a key is named below in the message, e.g. "calibrations.attention.".

        Raises:
            MasaError: the first that differs, with both values and the mend.
        """
        found = self.made_of()
        for key, value in wanted.items():
            if key == "projections":
                have: Any = self.inputs
                differs = set(self.inputs) != {INPUT_OF.get(letter) for letter in value}
            else:
                have = found.get(key, value)
                differs = have != value and not (have is None and key in LATER)
            if differs:
                place = self.directory / "calibration.json" if self.directory else "the calibration"
                raise MasaError(
                    f"{place} is not of what is asked for: {where}{key} is {value}, these statistics are of {have}. An "
                    "earlier `masa calibrate` wrote them last. Delete that file and run the same command of the "
                    "workflow again, or call `masa calibrate` again."
                )

    def check(self, model: nn.Module, tokens: Tensor | None) -> None:
        """Refuse statistics of another model, or tokens other than those of the calibration.

        Raises:
            MasaError: which of the two differs.
        """
        if (found := model_sha256(model)) != self.model_sha256:
            raise MasaError(
                f"The calibration belongs to another model (sha256 {self.model_sha256[:12]}…, this one has "
                f"{found[:12]}…; a model converted to another dtype is another model). Calibrate this one."
            )
        if tokens is not None:
            self.check_tokens(tokens)

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse tokens other than those of the calibration.

        Raises:
            MasaError: they are.
        """
        if tokens_sha256(tokens) != self.tokens_sha256:
            where = f"{self.directory / 'tokens.safetensors'}: the" if self.directory else "The"
            raise MasaError(
                f"{where} tokens are not those of the calibration (sha256 differs). Pass the same ones, or make both "
                "anew with `masa calibrate`."
            )

    def _read(self, layer: int, name: str) -> Tensor:
        if self.directory is None:
            return self._layers[layer][name]
        path = (self.directory or Path()) / _name(layer, name.startswith("gradient."))
        expected = self.sha256.get(path.name) if path.name not in self._verified else None
        if expected and path.is_file() and sha256_of(path) != expected:
            raise MasaError(
                f"{path} is corrupt (its sha256 is not the one that it was written with); make it anew with "
                "`masa calibrate`."
            )
        self._verified.add(path.name)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise MasaError(
                f"{path} is corrupt or lacks {name!r} ({error}); make it anew with `masa calibrate`."
            ) from error


def _name(layer: int, gradients: bool = False) -> str:
    return f"{'gradients' if gradients else 'layer'}-{layer:03d}.safetensors"


def _write(directory: Path, layer: int, tensors: Mapping[str, Tensor]) -> None:
    """One layer's files, each whole or not there."""
    for name, part in _parts(layer, tensors).items():
        with whole_file(directory / name) as path:
            save_file(part, path)


def _parts(layer: int, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """File name -> tensors; gradients have a file of their own."""
    files: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        files.setdefault(_name(layer, key.startswith("gradient.")), {})[key] = value.contiguous().cpu()
    return files


def tokens_sha256(tokens: Tensor) -> str:
    """Hash of token ids (N, T) and their shape."""
    header = "x".join(map(str, tokens.shape)).encode()
    return hashlib.sha256(header + tokens.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()


def model_sha256(model: nn.Module) -> str:
    """Hash of every parameter's name, dtype and bits; tied parameters count once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
