r"""DBD, training by decoupling (Huang et al., ICLR 2022, arXiv 2202.03423): a defense that trains from scratch.

A backdoor is learned where encoder and classifier are trained together on trigger and label. DBD separates the two, in
three stages on the poisoned training set:

1. the encoder is trained by SimCLR, which uses no labels (`backdoor_jax.training.pretrain`);
2. a head on the frozen encoder is trained with the symmetric cross-entropy

   .. math:: \alpha\,\mathrm{CE} + \beta\,\mathrm{RCE}, \qquad \log 0 := A ;

3. the share :math:`\varepsilon` of all images with the smallest symmetric cross-entropy keep their labels, the others
   lose them, and the complete network is trained by MixMatch; after every round these images are chosen again.

MixMatch, with :math:`u', u''` two views of B unlabeled images and :math:`x, y` as many labeled ones: the guess is
:math:`q \propto (\tfrac12 p(u') + \tfrac12 p(u''))^{1/T}`; images and targets :math:`(x, y), (u', q), (u'', q)` are
mixed with a permutation of themselves in the proportion :math:`\max(\lambda, 1-\lambda)` to the rest,
:math:`\lambda \sim \mathrm{Beta}(a, a)`; and the loss is

.. math:: \mathrm{CE}\bigl(p(x), y\bigr) + \lambda_u\, \frac{1}{2BC} \sum \bigl\|p(u) - q\bigr\|^2 .

Sources. Paper and authors' code for CIFAR-10: SimCLR for 1,000 epochs in batches of 512, SGD .4 with momentum .9,
weight decay 1e-4 and a cosine, crops from a fifth of the area; Adam .002 for the rest, 10 epochs of the head in batches
of 128, 190 rounds of 1,024 steps in batches of 64; alpha .1, beta 1, A = log 1e-4; epsilon .5, T .5, a .75, lambda_u up
to 15, increasing linearly over the 190 rounds. The code's files continue from the encoder of epoch 100 of 1,000; the
benchmark trains it for 100, where the cosine here ends, and does 100 rounds after the head's 10 epochs, while lambda_u
still increases over 190 (preset ``benchmark``). For CIFAR-100 it reads the file for ImageNet, with lambda_u up to 6
over 80 rounds (preset ``benchmark_cifar100``).

Deviations. Crops pad zeros, where the code reflects. A round is as many complete passes over the labeled images as come
closest to 1,024 steps, and unlabeled images are drawn with replacement. Normalization sees all 3B mixed images at
once, where the code interleaves three batches, and the guesses leave its running statistics alone. lambda_u increases
from round to round, not within one. The two views of an unlabeled image are drawn anew in every step, and the labeled
image has one, as in MixMatch. Adam starts from scratch for the third stage. Views are not blurred, as in SimCLR's
paper for images of this size. The code keeps the epoch with the best accuracy on the test set; here it is the last.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> poisoned = digits().train.take(slice(64))
    >>> classifier = build_classifier("small_cnn", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), poisoned.images)
    >>> defense = DBD(pretrain_epochs=1, warmup_epochs=1, rounds=1, round_steps=1, pretrain_batch_size=32)
    >>> len(defense.repair(jax.random.key(1), classifier, victim, poisoned).kept)
    32
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Lt
from jax.tree_util import Partial

from backdoor_jax.config import Count, Decay, LearningRate, Momentum, NonNegative, Positive, Whole
from backdoor_jax.data import Augment, Dataset
from backdoor_jax.data.views import Views
from backdoor_jax.defenses.base import Defense, Needs, Repair
from backdoor_jax.defenses.pad_ft import score
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import (
    SGD,
    Adam,
    Cosine,
    GradientStep,
    LossResult,
    Optimizer,
    SimCLRConfig,
    batch_shape,
    cross_entropy,
    fit,
    pretrain,
)


@dataclasses.dataclass(frozen=True)
class DBD(Defense):
    """DBD; the defaults are the authors'.

    Attributes:
        pretrain_epochs: of SimCLR; published 1,000, the benchmark's 100.
        pretrain_batch_size: published 512.
        warmup_epochs: of the head alone; published 10.
        warmup_batch_size: published 128.
        alpha: weight of the cross-entropy; published .1.
        beta: weight of the reverse cross-entropy; published 1.
        log_zero: A; published log 1e-4.
        credible: share of the images that keep their labels; published .5.
        rounds: of MixMatch; published 190, the benchmark's 100.
        round_steps: gradient steps of each; published 1,024.
        batch_size: labeled images in a step, and as many unlabeled ones; published 64.
        learning_rate: of Adam; published .002.
        sharpening: T; published .5.
        mixing: a; published .75.
        unlabeled_weight: lambda_u at the end; published 15.
        ramp: rounds over which lambda_u increases, the head's epochs included; published 190.
        crop: zeros padded before a random crop; published 4.
        flip: mirror half of the images; off by default, and in an experiment set as its data allow. SimCLR's views are
            always mirrored.
    """

    name: ClassVar[str] = "dbd"
    summary: ClassVar[str] = "train from scratch: the encoder without labels, then on half of them"
    needs: ClassVar[Needs] = "training_set"
    mirrors: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "benchmark": {"pretrain_epochs": 100, "rounds": 100},
        "benchmark_cifar100": {"pretrain_epochs": 100, "rounds": 100, "unlabeled_weight": 6.0, "ramp": 80},
    }

    pretrain_epochs: Count = 1000
    pretrain_batch_size: Annotated[int, Ge(2)] = 512
    warmup_epochs: Count = 10
    warmup_batch_size: Count = 128
    alpha: NonNegative = 0.1
    beta: NonNegative = 1.0
    log_zero: Annotated[float, Lt(0)] = float(np.log(1e-4))
    credible: Annotated[float, Gt(0), Lt(1)] = 0.5
    rounds: Count = 190
    round_steps: Count = 1024
    batch_size: Count = 64
    learning_rate: LearningRate = 0.002
    sharpening: Positive = 0.5
    mixing: Positive = 0.75
    unlabeled_weight: NonNegative = 15.0
    ramp: Count = 190
    crop: Whole = 4
    flip: bool | None = None

    @property
    def augment(self) -> Augment:
        """The augmentation of images in the second and third stages."""
        return Augment(crop=self.crop, flip=bool(self.flip))

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Trains a new network so that it does not learn the poisoned labels.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; not used.
            data: the poisoned training set.

        Returns:
            A new network. ``kept`` are the images that kept their labels in the last round.

        Raises:
            UserError: where there are too few images to split.
            NonFiniteError: where a stage diverges, naming the step.
        """
        del variables
        kept = round(self.credible * len(data))
        if not 0 < kept < len(data):
            raise UserError(
                f"dbd: {self.credible} of {len(data)} images are {kept}, so that either all or none would keep their "
                "labels; give the complete training set"
            )
        pretrain_key, warmup_key, fit_key = jax.random.split(key, 3)
        network, _ = pretrain(
            pretrain_key,
            classifier,
            data,
            DecoupledSimCLR(epochs=self.pretrain_epochs, batch_size=self.pretrain_batch_size),
            views=Views(smallest=0.2),
            name="dbd, encoder",
        )

        loss, optimizer = Partial(warm_up_loss, classifier, self), Adam(self.learning_rate)
        step = GradientStep(loss, optimizer, trainable=(classifier.head_path,))
        network = fit(
            warmup_key,
            step,
            step.init(network),
            data,
            epochs=self.warmup_epochs,
            batch_size=self.warmup_batch_size,
            augment=self.augment,
            name="dbd, head",
        ).variables

        state = GradientStep(loss, optimizer).init(network)  # Adam's state for all weights; it does not use the loss.
        epoch_steps, _ = batch_shape(kept, self.batch_size)
        passes = max(1, round(self.round_steps / epoch_steps))
        for number in range(self.rounds):
            chosen = credible_indices(classifier, state.variables, data, self.credible)
            others = np.setdiff1d(np.arange(len(data)), chosen)
            rise = min(1.0, (self.warmup_epochs + number) / self.ramp)
            fitted = fit(
                fit_key,
                GradientStep(Partial(mixmatch_loss, classifier, self, data.images[others], rise), optimizer),
                state,
                data.take(chosen),
                epochs=(number + 1) * passes,
                batch_size=self.batch_size,
                augment=self.augment,
                name=f"dbd, round {number + 1} of {self.rounds}",
            )
            state = fitted.state
        return Repair(fitted.variables, kept=chosen, info=fitted.info)


@dataclasses.dataclass(frozen=True)
class DecoupledSimCLR(SimCLRConfig):
    """SimCLR with the settings of DBD's authors.

    Attributes:
        batch_size: published 512.
        learning_rate: of SGD, annealed by a cosine once an epoch; published .4.
        weight_decay: published 1e-4.
        momentum: of SGD; published .9.
    """

    batch_size: Annotated[int, Ge(2)] = 512
    learning_rate: LearningRate = 0.4
    weight_decay: Decay = 1e-4
    momentum: Momentum = 0.9

    def optimizer(self, images: int) -> Optimizer:
        """SGD under a cosine over all steps on so many images."""
        steps, _ = batch_shape(images, self.batch_size)
        return SGD(self.learning_rate, Cosine(steps * self.epochs, self.epochs), self.momentum, self.weight_decay)


def warm_up_loss(
    classifier: Classifier, config: DBD, variables: Variables, batch: Dataset, key: jax.Array
) -> LossResult:
    """The symmetric cross-entropy of the second stage; the encoder normalizes by its batch, as in the code.

    Args:
        classifier: the network.
        config: gives ``alpha``, ``beta`` and ``log_zero``.
        variables: the model's.
        batch: augmented images and labels.
        key: not used.
    """
    del key
    logits, variables = classifier.logits(variables, batch.images, train=True)
    forward = cross_entropy(logits, batch.labels)
    reverse = config.log_zero * jnp.expm1(-forward)
    return jnp.mean(config.alpha * forward + config.beta * reverse), (variables, {})


def sharpened(probabilities: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Probabilities ``(..., C)`` to the power 1 / T, summing to 1 again.

    Example:
        >>> [round(p, 3) for p in sharpened(jnp.array([0.75, 0.25]), 0.5).tolist()]
        [0.9, 0.1]
    """
    raised = probabilities ** (1 / temperature)
    return raised / jnp.sum(raised, -1, keepdims=True)


def mixmatch_loss(
    classifier: Classifier,
    config: DBD,
    pool: jax.Array,
    rise: jax.Array | float,
    variables: Variables,
    batch: Dataset,
    key: jax.Array,
) -> LossResult:
    """The third stage's loss; logs its two terms, ``labeled`` and ``unlabeled``.

    Args:
        classifier: the network.
        config: gives ``sharpening``, ``mixing``, ``unlabeled_weight`` and the augmentation.
        pool: uint8 images without labels, ``(M, H, W, channels)``, from which as many are drawn as the batch has.
        rise: the share of ``unlabeled_weight`` that this round uses.
        variables: the model's.
        batch: augmented images and labels.
        key: of the draw, the views and the mixture.
    """
    draw_key, view_key, share_key, order_key = jax.random.split(key, 4)
    count = len(batch.images)
    drawn = pool[jax.random.randint(draw_key, (count,), 0, len(pool))]
    views = [config.augment(one, drawn) for one in jax.random.split(view_key)]
    seen = [jax.nn.softmax(classifier.logits(variables, view, train=True)[0]) for view in views]
    guess = jax.lax.stop_gradient(sharpened((seen[0] + seen[1]) / 2, config.sharpening))

    images = jnp.concatenate([batch.images, *views]).astype(jnp.float32)
    targets = jnp.concatenate([jax.nn.one_hot(batch.labels, guess.shape[-1]), guess, guess])
    share = jax.random.beta(share_key, config.mixing, config.mixing)
    share = jnp.maximum(share, 1 - share)
    order = jax.random.permutation(order_key, 3 * count)
    images = share * images + (1 - share) * images[order]
    targets = share * targets + (1 - share) * targets[order]

    logits, variables = classifier.logits(variables, images, train=True)
    labeled = -jnp.mean(jnp.sum(jax.nn.log_softmax(logits[:count]) * targets[:count], -1))
    unlabeled = jnp.mean((jax.nn.softmax(logits[count:]) - targets[count:]) ** 2)
    info = {"labeled": labeled, "unlabeled": unlabeled}
    return labeled + rise * config.unlabeled_weight * unlabeled, (variables, info)


def credible_indices(classifier: Classifier, variables: Variables, data: Dataset, share: float) -> np.ndarray:
    """Indices, sorted, of the share of images with the smallest symmetric cross-entropy, whatever its constants."""
    order = np.argsort(np.asarray(score(classifier, variables, data)), kind="stable")
    return np.sort(order[: round(share * len(data))])
