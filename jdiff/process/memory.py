"""Denoisers that carry something from step to step, and those whose x_0 and eps are of two minds."""

from typing import Any, Protocol, runtime_checkable

import jax

from jdiff.core.arrays import Array
from jdiff.core.pytrees import noun, per_sample, static
from jdiff.process.prediction import Denoise, Prediction


@runtime_checkable
class Remembers(Denoise, Protocol):
    """A denoiser that may have a memory. `predict` is what it says before its first step."""

    def memory(self, x: Array) -> Any:
        """The memory before the first step, a pytree whose arrays are like x or numbers; without arrays it has none."""
        ...

    def predict_with(self, x: Array, t, memory: Any) -> tuple[Prediction, Any]:
        """The prediction, and the memory after it."""
        ...


@runtime_checkable
class OwnNoise(Denoise, Protocol):
    """A denoiser that may say an eps of its own, which is not the noise that its x_0 implies, as CFG++ does."""

    @property
    def own_noise(self) -> bool:
        """Whether it does: x_t is then not alpha x_0 + sigma eps."""
        ...


def memory_of(denoise: Denoise, x: Array) -> Any:
    """The memory of a denoiser before the first step; () for one without."""
    return denoise.memory(x) if isinstance(denoise, Remembers) else ()


def predict_with(denoise: Denoise, x: Array, t, memory: Any) -> tuple[Prediction, Any]:
    """The prediction of any denoiser with its memory, and the memory after it."""
    return denoise.predict_with(x, t, memory) if isinstance(denoise, Remembers) else (denoise.predict(x, t), memory)


def has_memory(denoise: Denoise, x: Array) -> bool:
    """Whether a denoiser carries anything from step to step."""
    return bool(jax.tree.leaves(jax.eval_shape(lambda: memory_of(denoise, x))))


def has_own_noise(denoise: Denoise) -> bool:
    """Whether a denoiser's eps is not the noise that its x_0 implies."""
    return isinstance(denoise, OwnNoise) and denoise.own_noise


def with_memory(denoise: Denoise, memory: Any) -> "tuple[Denoise, Heard]":
    """The denoiser of one step, and where its memory after the step will be found.

    All evaluations of a step are made with the memory that it begins with. The memory after the step is that after its
    first evaluation, which a solver makes outside of any loop, as it returns it.
    """
    heard = Heard(memory)
    return (_WithMemory(denoise, memory, heard) if jax.tree.leaves(memory) else denoise), heard


class Heard:
    """The memory that the first evaluation of a step left behind."""

    def __init__(self, memory):
        self.memory, self.is_new = memory, False


@noun
class _WithMemory(Denoise):
    """A denoiser within one step. It is a pytree, so that what is inside it can be found."""

    denoise: Denoise
    memory: Any = per_sample()
    heard: Heard = static()

    @property
    def schedule(self):
        return self.denoise.schedule

    @property
    def own_noise(self):
        return has_own_noise(self.denoise)

    def predict(self, x, t):
        prediction, memory = predict_with(self.denoise, x, t, self.memory)
        if not self.heard.is_new:
            self.heard.memory, self.heard.is_new = memory, True
        return prediction
