r"""DBD, training by decoupling (Huang et al., ICLR 2022, arXiv 2202.03423): a defence that trains anew.

A trigger meets its label where encoder and classifier are trained together. DBD takes them apart, in three stages on
the poisoned training set:

1. the encoder is trained by SimCLR, which looks at no labels (`backdoor_jax.training.pretrain`);
2. a head on the frozen encoder is trained with the symmetric cross-entropy

   .. math:: \alpha\,\mathrm{CE} + \beta\,\mathrm{RCE}, \qquad \log 0 := A ;

3. the share :math:`\varepsilon` of all images with the smallest symmetric cross-entropy keep their labels, the others
   lose them, and the whole network is trained by MixMatch; after every round they are chosen anew.

MixMatch, with :math:`u', u''` two views of B unlabelled images and :math:`x, y` as many labelled ones: the guess is
:math:`q \propto (\tfrac12 p(u') + \tfrac12 p(u''))^{1/T}`; images and targets :math:`(x, y), (u', q), (u'', q)` are
mixed with a permutation of themselves, :math:`\max(\lambda, 1-\lambda)` to the rest, :math:`\lambda \sim
\mathrm{Beta}(a, a)`; and the loss is

.. math:: \mathrm{CE}\bigl(p(x), y\bigr) + \lambda_u\, \frac{1}{2BC} \sum \bigl\|p(u) - q\bigr\|^2 .

Sources. Paper and authors' code for CIFAR-10: SimCLR for 1,000 epochs in batches of 512, SGD .4 with momentum .9,
weight decay 1e-4 and a cosine, crops from a fifth of the area; Adam .002 for the rest, 10 epochs of the head in batches
of 128, 190 rounds of 1,024 steps in batches of 64; alpha .1, beta 1, A = log 1e-4; epsilon .5, T .5, a .75, lambda_u up
to 15, risen linearly. The code's files go on from the encoder of epoch 100 of 1,000; the benchmark trains it for 100
(preset ``benchmark``), whose cosine here ends there.

Deviations. Crops pad zeros, where the code reflects. A round is as many whole passes over the labelled images as come
nearest to 1,024 steps, and unlabelled images are drawn with replacement. Normalisation sees all 3B mixed images at
once, where the code interleaves three batches, and the guesses leave its running statistics alone. lambda_u rises from
round to round, not within one. Adam starts anew for the third stage. Views are not blurred, as SimCLR's paper has it
for images of this size. The code keeps the epoch with the best accuracy on the test set; here it is the last.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> poisoned = digits().train.take(slice(64))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), poisoned.images)
    >>> settings = DbdConfig(pretrain_epochs=1, warmup_epochs=1, rounds=1, round_steps=1, pretrain_batch_size=32)
    >>> repair = dbd(jax.random.key(1), classifier, victim, poisoned, settings)
    >>> len(repair.info["purified_indices"])
    32
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.config import Config, from_preset, numbers
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.data.views import Views
from backdoor_jax.defenses.base import Defense, Repair, adam
from backdoor_jax.defenses.pad_ft import score
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import (
    Constants,
    CosineSGD,
    GradientStep,
    Info,
    SimCLRConfig,
    batch_shape,
    cross_entropy,
    descend,
    fit,
    last_epoch,
    pretrain,
)

PRESETS: dict[str, dict[str, Any]] = {"benchmark": {"pretrain_epochs": 100}}


@dataclasses.dataclass(frozen=True)
class DbdConfig(Config):
    """Settings of DBD; the defaults are the authors'.

    Attributes:
        pretrain_epochs: of SimCLR; published 1,000, the benchmark's 100.
        pretrain_batch_size: published 512.
        warmup_epochs: of the head alone; published 10.
        warmup_batch_size: published 128.
        alpha: weight of the cross-entropy; published .1.
        beta: weight of the reverse cross-entropy; published 1.
        log_zero: A; published log 1e-4.
        credible: share of the images that keep their labels; published .5.
        rounds: of MixMatch; published 190.
        round_steps: gradient steps of each; published 1,024.
        batch_size: labelled images in a step, and as many unlabelled ones; published 64.
        learning_rate: of Adam; published .002.
        sharpening: T; published .5.
        mixing: a; published .75.
        unlabelled_weight: lambda_u at the end; published 15.
        crop: zeros padded before a random crop; published 4.
        flip: mirror half of the images; by default not, and in an experiment as its data ask for. SimCLR's views are
            always mirrored.
    """

    pretrain_epochs: int = 1000
    pretrain_batch_size: int = 512
    warmup_epochs: int = 10
    warmup_batch_size: int = 128
    alpha: float = 0.1
    beta: float = 1.0
    log_zero: float = float(np.log(1e-4))
    credible: float = 0.5
    rounds: int = 190
    round_steps: int = 1024
    batch_size: int = 64
    learning_rate: float = 0.002
    sharpening: float = 0.5
    mixing: float = 0.75
    unlabelled_weight: float = 15.0
    crop: int = 4
    flip: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("warmup_epochs", "warmup_batch_size", "rounds", "round_steps", "batch_size"):
            self.require(getattr(self, field) > 0, field, "at least 1")
        for field in ("learning_rate", "sharpening", "mixing"):
            self.require(getattr(self, field) > 0, field, "a positive number")
        for field in ("alpha", "beta", "unlabelled_weight"):
            self.require(getattr(self, field) >= 0, field, "0 or more")
        self.require(self.log_zero < 0, "log_zero", "a negative number")
        self.require(0 < self.credible < 1, "credible", "a share between 0 and 1")
        self.require(self.crop >= 0, "crop", "0 or more pixels")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DbdConfig":
        """``benchmark``: a tenth of the pre-training.

        Example:
            >>> DbdConfig.preset("benchmark").pretrain_epochs
            100
        """
        return from_preset(cls, "dbd", PRESETS, name, changes)


@dataclasses.dataclass(frozen=True)
class DecoupledSimCLR(SimCLRConfig):
    """SimCLR as DBD's authors run it; see there.

    Attributes:
        momentum: of SGD.
    """

    batch_size: int = 512
    learning_rate: float = 0.4
    weight_decay: float = 1e-4
    momentum: float = 0.9


@dataclasses.dataclass(frozen=True)
class WarmUpLoss:
    """The symmetric cross-entropy of the second stage; the encoder normalises by its batch, as in the code."""

    classifier: Classifier

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        del key
        logits, variables = self.classifier.logits(variables, batch.images, train=True)
        forward = cross_entropy(logits, batch.labels)
        reverse = constants["log_zero"] * jnp.expm1(-forward)
        return jnp.mean(constants["alpha"] * forward + constants["beta"] * reverse), (variables, {})


def sharpened(probabilities: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Probabilities ``(..., C)`` to the power 1 / T, summing to 1 again.

    Example:
        >>> [round(p, 3) for p in sharpened(jnp.array([0.75, 0.25]), 0.5).tolist()]
        [0.9, 0.1]
    """
    raised = probabilities ** (1 / temperature)
    return raised / jnp.sum(raised, -1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class MixMatchLoss:
    """The third stage's loss; reads ``constants["unlabelled"]``, uint8 images, and ``["rise"]``, of lambda_u."""

    classifier: Classifier
    augment: Augment

    def __call__(
        self, variables: Variables, batch: Dataset, key: jax.Array, constants: Constants
    ) -> tuple[jax.Array, tuple[Variables, Info]]:
        """See `backdoor_jax.training.Loss`."""
        draw_key, view_key, share_key, order_key = jax.random.split(key, 4)
        count, pool = len(batch.images), constants["unlabelled"]
        unlabelled = pool[jax.random.randint(draw_key, (count,), 0, len(pool))]
        views = [self.augment(one, unlabelled) for one in jax.random.split(view_key)]
        seen = [jax.nn.softmax(self.classifier.logits(variables, view, train=True)[0]) for view in views]
        guess = jax.lax.stop_gradient(sharpened((seen[0] + seen[1]) / 2, constants["sharpening"]))

        images = jnp.concatenate([batch.images, *views]).astype(jnp.float32)
        targets = jnp.concatenate([jax.nn.one_hot(batch.labels, guess.shape[-1]), guess, guess])
        share = jax.random.beta(share_key, constants["mixing"], constants["mixing"])
        share = jnp.maximum(share, 1 - share)
        order = jax.random.permutation(order_key, 3 * count)
        images = share * images + (1 - share) * images[order]
        targets = share * targets + (1 - share) * targets[order]

        logits, variables = self.classifier.logits(variables, images, train=True)
        labelled = -jnp.mean(jnp.sum(jax.nn.log_softmax(logits[:count]) * targets[:count], -1))
        apart = jnp.mean((jax.nn.softmax(logits[count:]) - targets[count:]) ** 2)
        info = {"labelled": labelled, "unlabelled": apart}
        return labelled + constants["rise"] * constants["unlabelled_weight"] * apart, (variables, info)


def credible(classifier: Classifier, variables: Variables, data: Dataset, share: float) -> np.ndarray:
    """Indices, sorted, of the share of images with the smallest symmetric cross-entropy; no constant of it matters."""
    order = np.argsort(np.asarray(score(classifier, variables, data)), kind="stable")
    return np.sort(order[: round(share * len(data))])


def dbd(
    key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset, config: DbdConfig = DbdConfig()
) -> Repair:
    """Trains a network anew that the poisoned labels do not reach.

    Args:
        key: a `jax.random` key.
        classifier: the network.
        variables: the victim's; not looked at.
        data: the poisoned training set.
        config: settings.

    Returns:
        A new network. ``info["purified_indices"]`` are the images that kept their labels in the last round.

    Raises:
        UserError: where there are too few images to part.
    """
    del variables
    kept = round(config.credible * len(data))
    if not 0 < kept < len(data):
        raise UserError(
            f"dbd: {config.credible} of {len(data)} images are {kept}, which leaves none on one side; "
            "give the whole training set"
        )
    pretrain_key, warmup_key, fit_key = jax.random.split(key, 3)
    settings = DecoupledSimCLR(epochs=config.pretrain_epochs, batch_size=config.pretrain_batch_size)
    steps, _ = batch_shape(len(data), settings.batch_size)
    network, _ = pretrain(
        pretrain_key,
        classifier,
        data,
        settings,
        optimizer=CosineSGD(steps * settings.epochs, settings.epochs),
        views=Views(smallest=0.2),
        name="dbd, encoder",
    )

    augment = Augment(crop=config.crop, flip=bool(config.flip))
    constants = numbers(config)
    network, _ = descend(
        warmup_key,
        GradientStep(WarmUpLoss(classifier), adam, (classifier.head_path,)),
        network,
        data,
        constants,
        epochs=config.warmup_epochs,
        batch_size=config.warmup_batch_size,
        augment=augment,
        name="dbd, head",
    )

    step = GradientStep(MixMatchLoss(classifier, augment), adam)
    state = step.init(network, constants)
    per_pass, _ = batch_shape(kept, config.batch_size)
    passes = max(1, round(config.round_steps / per_pass))
    for number in range(config.rounds):
        chosen = credible(classifier, state.variables, data, config.credible)
        others = np.setdiff1d(np.arange(len(data)), chosen)
        rise = min(1.0, (config.warmup_epochs + number) / config.rounds)
        state, history = fit(
            fit_key,
            step,
            state,
            data.take(chosen),
            {**constants, "unlabelled": data.images[others], "rise": jnp.asarray(rise)},
            epochs=(number + 1) * passes,
            batch_size=config.batch_size,
            augment=augment,
            name=f"dbd, round {number + 1} of {config.rounds}",
        )
    info = {"changed": True, "steps": int(state.step), "last_epoch": last_epoch(history, per_pass)}
    return Repair(state.variables, {**info, "purified_indices": chosen})


DEFENSE = Defense("train anew: encoder without labels, then half of them", "training_set", DbdConfig, dbd)
