"""Seed the global CPU generators for each sample, at almost no cost for the generators from which a sample does not draw.

Torch's generator is seeded for every sample, which takes 1 us. Seeding those of NumPy and Python takes longer, so it is postponed
until they are used:

- NumPy's global generator calls C functions through a structure that a bit generator provides. While no number has been drawn,
  these functions seed the real bit generator and install it.
- Python's global generator is an object whose methods the module ``random`` exports. While samples are loaded, the methods that
  read or change the state are replaced by functions that seed first, in all modules that contain them. If anything else
  refers to a method, such as a default argument, this generator is seeded for every sample.

A generator that was used is seeded at once for the remaining samples of the batch. The numbers that a dataset draws are the
same as if all generators were seeded for every sample.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from sys import getrefcount
from typing import Any, Final, final

import numpy as np
import torch
from numpy.random import MT19937
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch import Tensor
from torch.utils.data import get_worker_info

__all__ = ["Generators", "begin_seeding", "isolate_cpu_rng", "seed_generators"]

# The seeds of the generators of Python, NumPy and torch.
Seeds = tuple[int, int, int]

# The methods of Python's generator that read or change its state. All other methods call them.
_METHODS = ("random", "getrandbits", "seed", "getstate", "setstate")
# How often to search all objects for references to these methods. A search may take a second in a large program.
_MOST_SEARCHES = 100
_UINT64 = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)
_UINT32 = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p)
_DOUBLE = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_void_p)


def seed_generators(seeds: Seeds) -> None:
    """Seed the global CPU generators of Python, NumPy and torch."""
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    # torch.manual_seed also seeds accelerators, which takes a hundred times as long.
    torch.default_generator.manual_seed(seeds[2])


# Replaces NumPy's global bit generator while a dataset loads samples in the main process.
_numpy_bit_generator = np.random.MT19937(0)


@contextmanager
def isolate_cpu_rng(bit_generator: np.random.MT19937 = _numpy_bit_generator) -> Iterator[None]:
    """Restore the state of the global CPU generators on exit, except in a data worker, where nothing else uses them.

    Within the block, NumPy draws from ``bit_generator``.
    """
    if get_worker_info() is not None:
        yield
        return
    python, generator = random.getstate(), torch.default_generator.get_state()
    # Replacing NumPy's bit generator takes 0.2 us, whereas saving and restoring its state takes 160 us. The replacement
    # discards only the spare normal number that np.random.randn may have cached.
    numpy = get_bit_generator()
    set_bit_generator(bit_generator)
    try:
        yield
    finally:
        random.setstate(python)
        set_bit_generator(numpy)
        torch.default_generator.set_state(generator)


class Generators:
    """The global CPU generators of Python, NumPy and torch while a dataset loads the samples of a batch.

    Attributes:
        seeds: the seeds of the three generators for the current sample.
        is_active: whether :meth:`seed_active` must be called for each sample, because it seeds a generator.
    """

    def __init__(self) -> None:
        self.seeds: Seeds = (0, 0, 0)
        self.is_active = True

    def seed_all(self, seeds: Seeds) -> None:
        """Seed the generators for a sample."""
        self.seeds = seeds
        torch.default_generator.manual_seed(seeds[2])
        if self.is_active:
            self.seed_active()

    def seed_active(self) -> None:
        """Seed the generators of NumPy and Python for the current sample."""
        random.seed(self.seeds[0])
        np.random.seed(self.seeds[1])

    def end(self) -> None:
        """Restore the state of the generators."""


@final
class _EagerGenerators(Generators):
    """Seeds all generators for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self._isolation = isolate_cpu_rng(MT19937(0))
        self._isolation.__enter__()

    def end(self) -> None:
        self._isolation.__exit__(None, None, None)


@final
class _LazyGenerators(Generators):
    """Seeds the generators of NumPy and Python when they are used."""

    def __init__(self) -> None:
        super().__init__()
        self._is_loading = False
        self._python = _PythonGenerator(self)
        self._numpy = _NumPyGenerator(self)
        self._torch_state: Tensor | None = None
        self._kept: BaseException | None = None

    def keep(self, error: BaseException) -> None:
        """Keep an exception that cannot be raised now; :meth:`end` raises it."""
        self._kept = error

    def begin(self) -> bool:
        """Save the state of the generators; return False, without effect, if a batch is already being loaded."""
        if self._is_loading:
            return False
        self._is_loading = True
        self.is_active = False
        self._torch_state = torch.default_generator.get_state()
        self._numpy.begin()
        self._python.begin()
        return True

    def seed_active(self) -> None:
        """Seed the generators that were used before in this batch; the others are seeded when they are used."""
        self._numpy.seed_if_used()
        self._python.seed_if_used()

    def end(self) -> None:
        self._python.end()
        self._numpy.end()
        if self._torch_state is not None:
            torch.default_generator.set_state(self._torch_state)
        self._is_loading = False
        if self._kept is not None:
            error, self._kept = self._kept, None
            raise error


def begin_seeding(*, lazy: bool = True) -> Generators:
    """Save the state of the global generators, until ``end`` of the result is called.

    With ``lazy``, the generators of NumPy and Python are seeded when they are used. All are seeded for every sample if a batch is
    already being loaded, that is, if a dataset reads from the data loader of another dataset.
    """
    generators = _lazy_generators() if lazy else None
    return generators if generators is not None and generators.begin() else _EagerGenerators()


@functools.cache
def _lazy_generators() -> _LazyGenerators | None:
    """Return the generators of this process, since Python and NumPy have one each; None if the platform does not support them."""
    try:
        return _LazyGenerators()
    except (AttributeError, MemoryError, OSError):
        # Other Python implementations have no C API, and some systems do not allow functions that are created at run time.
        return None


class _BitGenerator(ctypes.Structure):
    """The interface of NumPy's bit generators in C: ``bitgen_t`` in numpy/random/bitgen.h."""

    _fields_ = (
        ("state", ctypes.c_void_p),
        ("next_uint64", _UINT64),
        ("next_uint32", _UINT32),
        ("next_double", _DOUBLE),
        ("next_raw", _UINT64),
    )


@final
class _PendingBitGenerator(MT19937):
    """A bit generator that calls ``activate`` and then delegates to ``real``, whenever its numbers or its state are used."""

    def __init__(self, real: MT19937, activate: Callable[[], None], keep: Callable[[BaseException], None]) -> None:
        super().__init__(0)
        self._real = real
        self._activate = activate
        self._keep = keep
        functions = real.ctypes

        # The structure holds references to the functions, and the capsule refers to the memory of the structure.
        self._structure = _BitGenerator(
            None,
            _UINT64(self._seeding_first(functions.next_uint64, functions.state)),
            _UINT32(self._seeding_first(functions.next_uint32, functions.state)),
            _DOUBLE(self._seeding_first(functions.next_double, functions.state)),
            _UINT64(self._seeding_first(functions.next_uint64, functions.state)),
        )
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self._capsule = new_capsule(ctypes.addressof(self._structure), b"BitGenerator", None)

    def _seeding_first(self, draw: Callable[[Any], Any], state: Any) -> Callable[[Any], Any]:
        activate, keep = self._activate, self._keep

        def seed_and_draw(_: Any) -> Any:
            try:
                activate()
            except BaseException as error:  # noqa: BLE001 -- raised by a signal handler; NumPy would ignore it
                keep(error)
                activate()
            return draw(state)

        return seed_and_draw

    @property
    def capsule(self) -> Any:
        return self._capsule

    @property
    def state(self) -> Any:
        self._activate()
        return self._real.state

    @state.setter
    def state(self, value: Any) -> None:
        self._activate()
        self._real.state = value

    def _legacy_seeding(self, seed: Any) -> None:
        self._activate()
        self._real._legacy_seeding(seed)

    def random_raw(self, *args: Any, **kwargs: Any) -> Any:
        self._activate()
        return self._real.random_raw(*args, **kwargs)


@final
class _NumPyGenerator:
    """NumPy's global generator, which is seeded when it is first used for a sample."""

    def __init__(self, owner: _LazyGenerators) -> None:
        self._owner = owner
        self._real = MT19937(0)
        self._is_armed = False
        self._is_used = False
        self._saved: Any = None
        self._stand_in: Any = _PendingBitGenerator(self._real, self._activate, owner.keep)

    def begin(self) -> None:
        # As in isolate_cpu_rng(), replace the bit generator instead of saving its state.
        self._saved = get_bit_generator()
        self._is_used = False
        self._is_armed = True
        set_bit_generator(self._stand_in)

    def seed_if_used(self) -> None:
        """Seed the generator for the next sample if it was used for an earlier one of this batch."""
        if self._is_used:
            # The dataset may have installed another bit generator.
            set_bit_generator(self._real)
            self._real._legacy_seeding(self._owner.seeds[1])

    def end(self) -> None:
        self._is_armed = False
        set_bit_generator(self._saved)

    def _activate(self) -> None:
        if self._is_armed:
            self._real._legacy_seeding(self._owner.seeds[1])  # as np.random.seed does
            set_bit_generator(self._real)
            self._is_used = self._owner.is_active = True
            self._is_armed = False


@final
class _PythonGenerator:
    """The generator of the module ``random``, which is seeded when it is first used for a sample.

    Its methods are replaced in every module that contains them, and in the generator itself, whose other methods call them. Their
    reference counts show whether there are other references, through which the generator would be used without being seeded.
    """

    def __init__(self, owner: _LazyGenerators) -> None:
        self._owner = owner
        self._methods: dict[str, Any] = {name: random.__dict__[name] for name in _METHODS}
        self._attributes: dict[str, Any] = self._methods["random"].__self__.__dict__
        self._stand_ins = {name: self._seeding_first(method) for name, method in self._methods.items()}
        self._places: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._counts = self._find_places()
        self._unexplained = dict.fromkeys(_METHODS, 0)
        self._searches_left = _MOST_SEARCHES
        self._is_installed = False
        self._is_used = False
        self._state: Any = None
        self._spare_normal: float | None = None

    def _seeding_first(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def seed_and_call(*args: Any, **kwargs: Any) -> Any:
            if self._is_installed:
                self._activate()
            return method(*args, **kwargs)

        return seed_and_call

    def _find_places(self) -> dict[str, int]:
        """Find the modules that contain the methods; return the reference count of each method without any other references."""
        self._places = []
        names = {id(method): name for name, method in self._methods.items()}
        for holder in gc.get_referrers(*self._methods.values()):
            if isinstance(holder, dict) and _is_module(holder):
                for key, value in holder.items():
                    if (name := names.get(id(value))) is not None:
                        self._places.append((holder, key, value, self._stand_ins[name]))
        # Each place refers to the method twice: the module does, and the tuple.
        return {
            name: _REFERENCES + 2 * sum(place[2] is method for place in self._places)
            for name, method in self._methods.items()
        }

    def _can_be_replaced(self) -> bool:
        """Return whether nothing but the known modules refers to the methods; look for new modules if necessary."""
        if self._has_counts(self._counts):
            return True
        if not self._searches_left or self._has_counts(self._unexplained):
            return False
        self._searches_left -= 1
        self._counts = self._find_places()
        if self._has_counts(self._counts):
            return True
        self._unexplained = {name: getrefcount(method) for name, method in self._methods.items()}
        return False

    def _has_counts(self, counts: Mapping[str, int]) -> bool:
        for name, method in self._methods.items():  # noqa: SIM110 -- runs for every batch; a generator has more calls
            if getrefcount(method) != counts[name]:
                return False
        return True

    def begin(self) -> None:
        self._is_used = False
        if not self._can_be_replaced():
            self._state = self._methods["getstate"]()
            self._is_used = self._owner.is_active = True
            return
        # Python's gauss() generates two numbers at a time and keeps the second one. Seeding discards it.
        self._spare_normal = self._attributes["gauss_next"]
        self._attributes["gauss_next"] = None
        for module, key, _, stand_in in self._places:
            module[key] = stand_in
        self._attributes.update(self._stand_ins)
        self._is_installed = True

    def seed_if_used(self) -> None:
        """Seed the generator for the next sample if it was used for an earlier one of this batch."""
        if self._is_used:
            self._methods["seed"](self._owner.seeds[0])

    def end(self) -> None:
        if self._is_used:
            self._methods["setstate"](self._state)
        elif self._is_installed:
            self._remove()

    def _activate(self) -> None:
        self._remove()
        self._state = self._methods["getstate"]()
        self._methods["seed"](self._owner.seeds[0])
        self._is_used = self._owner.is_active = True

    def _remove(self) -> None:
        self._is_installed = False
        for module, key, method, stand_in in self._places:
            if key in module and module[key] is stand_in:
                module[key] = method
        for name in _METHODS:
            del self._attributes[name]
        self._attributes["gauss_next"] = self._spare_normal


def _is_module(attributes: dict[str, Any]) -> bool:
    """Return whether a dict contains the attributes of an imported module."""
    name = attributes.get("__name__")
    return isinstance(name, str) and getattr(sys.modules.get(name), "__dict__", None) is attributes


def _count_references() -> int:
    """Return the reference count of a method in ``_PythonGenerator`` that nothing else refers to."""
    methods: dict[str, Any] = {"method": object()}

    def stand_in(method: Any) -> Callable[[], Any]:
        return lambda: method

    kept = {name: stand_in(method) for name, method in methods.items()}
    counts = {name: getrefcount(method) for name, method in methods.items() if name in kept}
    return counts["method"]


_REFERENCES: Final = _count_references()
