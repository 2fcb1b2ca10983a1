"""Analyses: what an experiment can measure besides rates, the figures by which the four papers argue.

An experiment names analyses, and a row holds what they find under ``analyses``, as plain values:

- ``verdict``, of victims and clean models: what the default detector says of them;
- ``answers``, of victims and repairs: the classes that they give to a few test images, clean and triggered;
- ``landscape``, of repairs (D3): losses and rates on the line from the victim to the repaired model and beyond, and how
  far the head has moved;
- ``latents``, of victims and repairs (D3): latents of test images, clean and triggered, in 2-D;
- ``neurons``, of victims (TAC): the true change of each latent neuron under the trigger, TAC's perturbation, and the
  scores of CLP and ANP;
- ``membership``, of all models (super-fine-tuning): three attacks that tell whether an image was trained on;
- ``reinjection`` (super-fine-tuning): a backdoor injected again into repaired models, a clean model and an untrained
  one;
- ``reactivation``, of repairs: attack success after retuning on 5 poisoned of 1,000 images, and under a perturbed
  trigger, beside that of a clean model.

Each is an object that computes and draws; which images it looks at, and how many, is our choice.
"""

from backdoor_jax.analyses.answers import Answers
from backdoor_jax.analyses.base import Analysis, AnalysisContext, Subject
from backdoor_jax.analyses.landscape import Landscape
from backdoor_jax.analyses.latents import Latents
from backdoor_jax.analyses.membership import MembershipInference
from backdoor_jax.analyses.neurons import Neurons
from backdoor_jax.analyses.reactivation import Reactivation
from backdoor_jax.analyses.reinjection import Reinjection
from backdoor_jax.analyses.verdict import DetectorVerdict

ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis
    for analysis in (
        DetectorVerdict(),
        Answers(),
        Landscape(),
        Latents(),
        Neurons(),
        MembershipInference(),
        Reinjection(),
        Reactivation(),
    )
}
"""The analyses by the names that configurations use, in the order in which a page shows them."""

__all__ = [
    "ANALYSES",
    "Analysis",
    "AnalysisContext",
    "Answers",
    "DetectorVerdict",
    "Landscape",
    "Latents",
    "MembershipInference",
    "Neurons",
    "Reactivation",
    "Reinjection",
    "Subject",
]
