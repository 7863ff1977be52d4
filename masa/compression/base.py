"""The interface of a compression method, and what it is given.

A method is a class with its hyperparameters in ``__init__``, a method ``prepare(problem)`` for what does not depend on
the budget, and a method ``solve(problem, prepared)`` that returns weight sources; what it learned on the way is kept in
attributes with a trailing underscore, as in scikit-learn.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from masa.compression.calibration.calibrate import Progress
from masa.compression.calibration.statistics import Calibration, model_sha256
from masa.compression.names import METHODS
from masa.compression.report import peak_rss
from masa.errors import MasaError, unknown
from masa.sharing.projections import Family, family_of
from masa.sharing.spec import ModelShape
from masa.sharing.weight_sources import WeightSource

COMPRESSORS: dict[str, type[Compressor]] = {}


def register(name: str) -> Callable[[type[Compressor]], type[Compressor]]:
    """Class decorator: make a :class:`Compressor` available to :func:`masa.compression.compress` as ``name``."""

    def add(cls: type[Compressor]) -> type[Compressor]:
        cls.name = name
        COMPRESSORS[name] = cls
        return cls

    return add


@dataclass
class Problem:
    """One model to be compressed.

    Attributes:
        model: dense; a method whose ``changes_model`` is true may train it, no other may touch it.
        shape: its sizes.
        projections: letters that are compressed.
        budget: numbers that the sources may store, everything counted.
        calibration: statistics, or None for methods that read none.
        tokens: (N, T) ids of the calibration, or None; only for methods whose ``needs_tokens`` is true.
        batch_size: samples at once, where the model runs.
        progress: called with (what, done, of).
        regularisation: relative jitter by matrix, filled where one was needed.
        seconds_before, peak_before: what an earlier fit of the same compressor took for the part that is used again.
        family: where the model keeps its projections, found by itself. A layer is a block of the model, also where not
            all blocks have a projection.
    """

    model: nn.Module
    shape: ModelShape
    projections: str
    budget: int
    calibration: Calibration | None = None
    tokens: Tensor | None = None
    batch_size: int = 4
    progress: Progress = lambda what, done, of: None
    regularisation: dict[str, float] = field(default_factory=dict)
    seconds_before: float = 0.0
    peak_before: int = 0
    family: Family = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.family = self.family or family_of(self.model)

    def weight(self, letter: str, layer: int) -> Tensor:
        """W (out, in) of one projection as the model stores it."""
        return self.family.at(layer, letter).weight.detach()

    def gram(self, letter: str, layer: int) -> Tensor:
        """H = X^T X (in, in), float64, of the input of one projection."""
        assert self.calibration is not None
        return self.calibration.gram(letter, layer).to(self.weight(letter, layer).device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        letter = self.projections[0]
        return self.weight(letter, self.shape.layers_of(letter)[0]).dtype

    @property
    def layers(self) -> range:
        return range(self.shape.num_layers)

    def layers_of(self, letter: str) -> tuple[int, ...]:
        """The layers that have a projection."""
        return self.shape.layers_of(letter)

    def letters_of(self, layer: int) -> str:
        """The projections to be compressed that a layer has."""
        return "".join(letter for letter in self.projections if layer in self.layers_of(letter))

    def same_layers(self, letters: str, what: str) -> tuple[int, ...]:
        """The layers that have all of these projections.

        Raises:
            MasaError: some have only a part of them; ``what`` needs whole heads.
        """
        found = {self.layers_of(letter) for letter in letters}
        if len(found) > 1:
            counts = ", ".join(f"{letter}: {self.shape.count(letter)}" for letter in letters)
            raise MasaError(f"{what} needs the same layers for all projections, but {counts} layers have them.")
        return found.pop()

    @property
    def dense(self) -> int:
        """Numbers of the dense matrices."""
        return self.shape.numbers(self.projections)

    def numbers(self, letter: str) -> int:
        """out * in of one matrix."""
        out, inp = self.shape.shapes[letter]
        return out * inp


class Compressor:
    """Base of all methods; see :data:`COMPRESSORS`.

    An instance may be used for several reductions of one model: what :meth:`prepare` returned is kept and used again
    for a fresh load of the same weights, with the same statistics, projections and hyperparameters.
    """

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = False
    changes_model: ClassVar[bool] = False

    # (key, what prepare returned, its regularisation, seconds, peak memory) of the last fit
    _prepared: tuple[str, Any, dict[str, float], float, int] | None = None

    def fit(self, problem: Problem) -> list[WeightSource]:
        """:meth:`prepare` unless the last fit's is still right, then :meth:`solve`.

        Returns:
            One source a projection, on the device and of the dtype of the model's weights.

        Raises:
            MasaError: see there.
        """
        for name in self._learned():
            delattr(self, name)
        key = self._key(problem)
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = None  # the old one need not be held beside the new one
            started = time.perf_counter()
            prepared = self.prepare(problem)
            cost = time.perf_counter() - started, peak_rss()
            self._prepared = key, prepared, dict(problem.regularisation), *cost
        else:
            problem.seconds_before, problem.peak_before = self._prepared[3:]
        prepared, regularisation = self._prepared[1:3]
        problem.regularisation.update(regularisation)
        return self.solve(problem, prepared)

    def prepare(self, problem: Problem) -> Any:
        """What does not depend on ``problem.budget``; may hold neither the model nor views of its weights."""
        return None

    def solve(self, problem: Problem, prepared: Any) -> list[WeightSource]:
        """Solve for sources that store at most ``problem.budget`` numbers.

        Args:
            prepared: what :meth:`prepare` returned for this model, to be left unchanged.

        Raises:
            MasaError: the budget cannot be met; the message gives the reachable reduction.
        """
        raise NotImplementedError

    def get_params(self) -> dict[str, Any]:
        """The arguments of ``__init__`` with their values."""
        return {
            name: getattr(self, name) for name in inspect.signature(type(self).__init__).parameters if name != "self"
        }

    def learned(self) -> dict[str, Any]:
        """What :meth:`fit` found: every attribute that ends in an underscore."""
        return {name.rstrip("_"): getattr(self, name) for name in self._learned()}

    def _learned(self) -> list[str]:
        return [name for name in vars(self) if name.endswith("_") and not name.startswith("_")]

    def _key(self, problem: Problem) -> str:
        """Equal for problems that differ in nothing but the budget and what :meth:`solve` alone reads."""
        found = problem.calibration
        data = found.digest() if found else model_sha256(problem.model)
        letter = problem.projections[0]
        device = str(problem.weight(letter, problem.layers_of(letter)[0]).device)
        return json.dumps([data, device, problem.projections, self.get_params()], default=str)


def make_compressor(method: str, **options: Any) -> Compressor:
    """Build a method from its name and hyperparameters.

    Args:
        method: a key of :data:`masa.compression.COMPRESSORS`.
        **options: arguments of its class; what is not given has its default.

    Raises:
        MasaError: an unknown method or option.
    """
    if method not in COMPRESSORS and method in METHODS:
        import_module(f"masa.compression.methods.{METHODS[method]}")
    if method not in COMPRESSORS:
        raise unknown("Compression method", method, {*COMPRESSORS, *METHODS})
    cls = COMPRESSORS[method]
    parameters = {k: p for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self"}
    for key, value in options.items():
        if key not in parameters:
            raise unknown(f"Option of {method!r}:", key, parameters)
        _check_kind(method, key, value, str(parameters[key].annotation))
    return cls(**options)


def _check_kind(method: str, key: str, value: Any, annotation: str) -> None:
    """Raise :class:`MasaError` for a value of another kind than the option's, where that is a plain one."""
    wanted = {word.strip() for word in annotation.split("|")}
    plain = {"int": int, "float": int | float, "str": str, "bool": bool, "None": type(None)}
    if not wanted <= set(plain):
        return
    fits = [isinstance(value, plain[kind]) and (kind == "bool" or not isinstance(value, bool)) for kind in wanted]
    if not any(fits) or value != value:  # NaN is no number
        raise MasaError(f"Option {key!r} of {method!r} is {' or '.join(sorted(wanted))}, not {value!r}.")


def unreachable(problem: Problem, least: int, what: str) -> MasaError:
    """The error for a budget below the ``least`` numbers that a method stores."""
    most = max(0.0, 1 - least / problem.dense)
    return MasaError(
        f"A reduction of {1 - problem.budget / problem.dense:.2%} leaves {problem.budget} numbers, but {what} "
        f"{least}: reachable are 0 to {most:.2%}. Ask for less or change the options."
    )
