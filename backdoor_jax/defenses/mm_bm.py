r"""MM-BM (Wang, Xiang, Miller, Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor
Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024, arXiv 2205.06900): clip activations, and nothing else.

A backdoor raises activations beyond what clean images need, so every channel of a few early layers gets an upper bound
as low as clean images allow. The problem, its optimizer and their constants are in `bounds`; this file adds the places
and the choice of images: only those that the victim classifies correctly, as in the released code. Weights stay as they
are. The paper's detector, which needs no images, is `backdoor_jax.metrics.mm_bd`.

Sources. Three places and lambda 0.5 are the released code's. Its network is a ResNet-18, clipped after the stem's
rectifier and after the first two stages; `MMBM_PLACES` are the closest equivalents in PreAct-ResNet18. For another
network places must be named (in a ResNet-18 ``relu``, ``layer1_1/relu2`` and ``layer2_1/relu2``; None is all
rectifiers). The released code uses fifty images of each class; this uses all images that it is given.

    >>> import jax
    >>> from backdoor_jax import build_classifier, digits
    >>> clean = digits().train.take(slice(70))
    >>> classifier = build_classifier("preact_resnet18", 10, width=2)
    >>> victim = classifier.init(jax.random.key(0), clean.images)
    >>> repair = MMBM(bound_epochs=1).repair(jax.random.key(1), classifier, victim, clean)
    >>> repair.info["bounded_rectifiers"], repair.info["right"] < 70
    (3, True)
"""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import MinLen

from backdoor_jax.config import NonNegative
from backdoor_jax.data import Dataset
from backdoor_jax.defenses.base import Defense, Repair
from backdoor_jax.defenses.bounds import MMBM_PLACES, BoundConfig, bound_activations
from backdoor_jax.errors import UserError
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import latents


@dataclasses.dataclass(frozen=True)
class MMBM(BoundConfig, Defense):
    """MM-BM; its other settings are `BoundConfig`'s.

    Attributes:
        places: which rectifiers are clipped, by path; MM-BM's three by default, None for all.
        bound_weight: initial lambda; 0.5, the released code's for its three places.
    """

    name: ClassVar[str] = "mm_bm"
    summary: ClassVar[str] = "clip activations as low as clean images allow"

    places: Annotated[tuple[str, ...], MinLen(1)] | None = MMBM_PLACES
    bound_weight: NonNegative = 0.5

    def repair(self, key: jax.Array, classifier: Classifier, variables: Variables, data: Dataset) -> Repair:
        """Clips the activations.

        Args:
            key: a `jax.random` key.
            classifier: the network.
            variables: the victim's; left as they are.
            data: clean images.

        Returns:
            The victim's variables with ``bounds``; ``info["right"]`` is the number of images that were used.

        Raises:
            UserError: where the network has no rectifier that can be bounded, a named place does not exist, or the
                victim classifies no image correctly.
        """
        logits = classifier.head(variables, latents(classifier, variables, data.images))
        right = np.flatnonzero(np.asarray(jnp.argmax(logits, -1) == data.labels))
        if not len(right):
            raise UserError(
                "mm_bm: the model classifies none of the images correctly, so there are none to fit bounds on; "
                "check the data"
            )
        repaired, info = bound_activations(key, classifier, variables, data.take(right), self)
        return Repair(repaired, info={"steps": 0, "right": len(right), **info})
