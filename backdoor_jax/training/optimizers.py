"""The optimizers, as configurations: their rates are traced, and the Optax transformation is made inside a step.

An optimizer is a kind of update (`SGD`, `Adam`, `AMSGrad` and their variants) and a schedule (`Constant`, `Cosine`,
`Triangular`, `Tenths`), which turns the learning rate into a rate for every step.

    >>> import jax.numpy as jnp
    >>> optimizer = SGD(learning_rate=0.1, momentum=0.9, schedule=Cosine(steps=1000))
    >>> [round(float(optimizer.rate(step)), 4) for step in (0, 500, 999)]
    [0.1, 0.05, 0.0]
    >>> weight, gradient, transformation = jnp.array(0.0), jnp.array(2.0), optimizer.transformation()
    >>> update, _ = transformation.update(gradient, transformation.init(weight), weight)
    >>> round(float(update), 4)
    -0.2
"""

import dataclasses
from typing import Any

import jax
import optax

from backdoor_jax.config import Config, Count, Decay, Fraction, LearningRate, Momentum
from backdoor_jax.training.schedules import (
    Rate,
    cosine_in_stages,
    in_relative_steps,
    torch_amsgrad,
    torch_sgd,
    triangular_two_phase,
)


@dataclasses.dataclass(frozen=True)
class Schedule(Config):
    """Turns a learning rate into an Optax schedule, a function of the step."""

    def __call__(self, rate: Rate) -> optax.Schedule:
        """The schedule at this rate."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """The same rate at every step."""

    def __call__(self, rate: Rate) -> optax.Schedule:
        """The schedule at this rate."""
        return lambda step: rate


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Annealing to zero along a cosine, in stages; see `cosine_in_stages`.

    Attributes:
        steps: until zero.
        stages: at how many points the rate changes; the published protocols change it once an epoch of 100.
    """

    steps: Count = 1000
    stages: Count = 100

    def __call__(self, rate: Rate) -> optax.Schedule:
        """The schedule at this rate."""
        return cosine_in_stages(rate, self.steps, self.stages)


@dataclasses.dataclass(frozen=True)
class Triangular(Schedule):
    """Super-fine-tuning's triangles that start and end at the learning rate; see `triangular_two_phase`.

    Attributes:
        peak1: the rate at the peaks of the first phase.
        peak2: the rate at the peaks of the second phase.
        first_phase: share of the steps in the first phase.
        steps: steps of both phases together.
        up: steps from the learning rate to a peak.
        down: steps from a peak back to the learning rate.
    """

    peak1: LearningRate = 0.25
    peak2: LearningRate = 5e-3
    first_phase: Fraction = 0.4
    steps: Count = 1600
    up: Count = 10
    down: Count = 10

    def __call__(self, rate: Rate) -> optax.Schedule:
        """The schedule at this rate."""
        return triangular_two_phase(rate, self.peak1, self.peak2, self.steps, self.up, self.down, self.first_phase)


@dataclasses.dataclass(frozen=True)
class Tenths(Schedule):
    """A rate that falls to a tenth after two fifths of the steps, and again after four fifths."""

    steps: Count = 1000

    def __call__(self, rate: Rate) -> optax.Schedule:
        """The schedule at this rate."""
        return optax.piecewise_constant_schedule(rate, {self.steps * 2 // 5: 0.1, self.steps * 4 // 5: 0.1})


@dataclasses.dataclass(frozen=True)
class Optimizer(Config):
    """Base of the optimizers.

    Attributes:
        learning_rate: what the schedule starts from.
        schedule: the rate of each step.
    """

    learning_rate: LearningRate = 0.01
    schedule: Schedule = Constant()

    def rate(self, step: jax.typing.ArrayLike) -> Any:
        """The learning rate of a step, or of an array of steps."""
        return self.schedule(self.learning_rate)(step)

    def transformation(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """PyTorch's SGD; see `torch_sgd`.

    Attributes:
        momentum: of the velocity.
        weight_decay: added to the gradient, for every parameter.
    """

    momentum: Momentum = 0.0
    weight_decay: Decay = 0.0

    def transformation(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        return torch_sgd(self.schedule(self.learning_rate), self.momentum, self.weight_decay)


@dataclasses.dataclass(frozen=True)
class RelativeSGD(SGD):
    """`SGD` whose learning rate is the length of its first step, relative to the weights'; see `in_relative_steps`."""

    def transformation(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        return in_relative_steps(super().transformation())


@dataclasses.dataclass(frozen=True)
class Adam(Optimizer):
    """PyTorch's Adam, without weight decay.

    Attributes:
        betas: decay of the two moments.
    """

    betas: tuple[float, float] = (0.9, 0.999)

    def transformation(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        return optax.adam(self.schedule(self.learning_rate), *self.betas)


@dataclasses.dataclass(frozen=True)
class DecayedAdam(Adam):
    """PyTorch's Adam with weight decay.

    It is a class of its own because a traced weight decay of 0 changes the rounding of a compiled step.

    Attributes:
        weight_decay: added to the gradient, for every parameter.
    """

    weight_decay: Decay = 0.0

    def transformation(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        return optax.chain(optax.add_decayed_weights(self.weight_decay), super().transformation())


@dataclasses.dataclass(frozen=True)
class AMSGrad(Optimizer):
    """PyTorch's AMSGrad; see `torch_amsgrad`."""

    def transformation(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        return torch_amsgrad(self.schedule(self.learning_rate))


@dataclasses.dataclass(frozen=True)
class Separately(Optimizer):
    """Two optimizers, each on its own model of a tree made by `backdoor_jax.models.joint.join`.

    Attributes:
        classifier: of the parameters under ``classifier``.
        generator: of those under ``generator``.
    """

    classifier: Optimizer = SGD()
    generator: Optimizer = Adam()

    def transformation(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        parts = {"classifier": self.classifier.transformation(), "generator": self.generator.transformation()}
        return optax.partition(parts, {name: name for name in parts})
