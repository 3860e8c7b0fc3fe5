"""Random numbers of its own for a Python program in a clone.

A program that is warm when its VM is captured has the state of its random generators in memory, and all VMs that go on
from there would draw the same numbers. Imported before that, this module keeps them apart:

    import sys; sys.path.append("/run/burgeon/python"); import burgeon_random

From then on each number of the module `random`, and of `numpy.random` where that was imported before, is drawn again,
after a fresh seed from the kernel, if the VM has become another since the last seed. The agent writes who the VM is into
a page that this module has mapped, while the program stands still: no number of the old state is given out after that.
Names that were imported from `random` before this are covered, but for `random`, `getrandbits` and `gauss` themselves:
import those after it. Generators that a program makes for itself (`random.Random(7)`, `numpy.random.default_rng()`) stay as they are;
`renewed(function)` is called whenever the others are seeded anew, for whatever a program has of its own.
"""

import functools
import mmap
import os
import random
import sys

__all__ = ["reseed", "renewed"]

_LENGTH = 32

with open("/run/burgeon/generation", "rb") as _file:
    _page = mmap.mmap(_file.fileno(), _LENGTH, prot=mmap.PROT_READ)

_seeded_in = _page[:_LENGTH]
_functions = []
_numpy_seed = None


def renewed(function):
    """Has a function called after every reseed; gives it back, so that it can stand above its definition."""
    _functions.append(function)
    return function


def reseed():
    """Seeds the generators from the kernel's, which the VM has of its own."""
    global _seeded_in
    generation = _page[:_LENGTH]
    random._inst.seed(int.from_bytes(os.urandom(64), "little"))
    if _numpy_seed is not None:
        _numpy_seed([int.from_bytes(os.urandom(4), "little") for _ in range(16)])
    # Last: who is captured in between seeds once more.
    _seeded_in = generation
    for function in _functions:
        function()


def _fresh(draw):
    @functools.wraps(draw)
    def drawn(*arguments, **named):
        while True:
            value = draw(*arguments, **named)
            # After the draw: before it, the VM may be captured between the look and the draw.
            if _page[:_LENGTH] == _seeded_in:
                return value
            reseed()

    return drawn


_Random = random.Random


class _Fresh(_Random):
    random = _fresh(_Random.random)
    getrandbits = _fresh(_Random.getrandbits)
    # It keeps every other number for later.
    gauss = _fresh(_Random.gauss)


def _guard_random():
    # The one instance changes its class, so that functions which were imported from it by name change with it.
    random._inst.__class__ = _Fresh
    for name in random.__all__:
        if getattr(getattr(random, name), "__self__", None) is random._inst:
            setattr(random, name, getattr(random._inst, name))


def _guard_numpy(module):
    global _numpy_seed
    _numpy_seed = module.seed
    others = ("seed", "get_state", "set_state", "default_rng")
    for name in module.__all__:
        function = getattr(module, name)
        if callable(function) and not isinstance(function, type) and name not in others:
            setattr(module, name, _fresh(function))


_guard_random()
if "numpy.random" in sys.modules:
    _guard_numpy(sys.modules["numpy.random"])
