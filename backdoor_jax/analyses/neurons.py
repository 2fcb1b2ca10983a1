"""Which latent neurons a trigger changes, and which scores find them, after TAC reconstruction; see
`backdoor_jax.metrics.latent`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

from backdoor_jax.analyses.base import Analysis, AnalysisContext, Finding, Row, Subject, mean_over_seeds
from backdoor_jax.config import Count
from backdoor_jax.defenses import ANP, fit_masks, scan
from backdoor_jax.defenses.base import replace_params
from backdoor_jax.defenses.clp import channel_bounds
from backdoor_jax.drawing import COLORS, legend_beside
from backdoor_jax.metrics import agreement, triggered_change
from backdoor_jax.models import Classifier, Variables


@dataclasses.dataclass(frozen=True)
class Neurons(Analysis):
    """The true change of each latent neuron under the trigger, against TAC's perturbation and CLP's and ANP's scores.

    Attributes:
        images: test images outside the target class on which the change is measured; the number is ours.
        mask_steps: steps of ANP's masks; the number is ours.
    """

    name: ClassVar[str] = "neurons"
    title: ClassVar[str] = "Neurons that the trigger changes"
    note: ClassVar[str] = (
        "Left: the change of each latent neuron under the trigger, against the perturbation that TAC computes without "
        "the trigger. Right: how well scores find the neurons that change most."
    )

    images: Count = 1000
    mask_steps: Count = 500

    def compute(self, context: AnalysisContext, subject: Subject) -> Finding | None:
        """Compares the scores of a victim's neurons with their change; None for other models.

        It is None as well without one target class, and where no latent change sends every image to that class.
        """
        if subject.original is not None or subject.trigger is None:
            return None
        if subject.label_map is None or subject.label_map.kind != "all_to_one":
            return None
        classifier, variables = context.classifier, subject.variables
        target, test = subject.label_map.target, context.test
        others = np.flatnonzero(np.asarray(test.labels) != target)[: self.images]
        change = triggered_change(classifier, variables, test.images[others], subject.trigger)
        perturbations = scan(classifier, variables, context.clean.images).perturbations
        if not bool(perturbations.feasible[target]):
            return None
        vector = np.asarray(perturbations.vectors[target])
        k = max(1, len(vector) // 20)
        scores = {"tac": np.abs(vector), **self._channel_scores(context, variables)}
        return {
            "target": target,
            "k": k,
            "mean": np.round(change.mean, 5),
            "size": np.round(change.size, 5),
            "vector": np.round(vector, 5),
            "signed": agreement(vector, change.mean, k)._asdict(),
            "agreement": {name: agreement(values, change.size, k)._asdict() for name, values in scores.items()},
        }

    def _channel_scores(self, context: AnalysisContext, variables: Variables) -> dict[str, np.ndarray]:
        """The scores of CLP and ANP for the channels of the batch norm that writes the latents, where there is one."""
        classifier, images = context.classifier, context.test.images[:2]
        norm = latent_norm(classifier, variables, images)
        if norm is None:
            return {}
        scores = {}
        params, statistics = flatten_dict(variables["params"]), flatten_dict(variables["batch_stats"])
        convolution = classifier.conv_feeding_norm(variables, images[:1]).get(norm)
        if convolution is not None:
            kernel, variance = params[*convolution, "kernel"], statistics[*norm, "var"]
            scores["clp"] = np.asarray(channel_bounds(kernel, params[*norm, "scale"], variance))
        config = ANP(steps=self.mask_steps, flip=context.task.flip)
        masks, _ = fit_masks(context.key_for("neurons"), classifier, variables, context.clean, config)
        scores["anp"] = 1 - np.asarray(flatten_dict(masks)[norm])
        return scores

    def draw(self, rows: list[Row]) -> Figure | None:
        """A pair of panels for each attack: perturbation against change, and the agreement of each score."""
        found = {attack: of["none"] for attack, of in self.findings(rows).items() if "none" in of}
        if not found:
            return None
        figure = Figure(figsize=(9.5, 3.0 * len(found)))
        grid = figure.subplots(len(found), 2, squeeze=False)
        for (left, right), (attack, seeds) in zip(grid, found.items(), strict=True):
            left.scatter(seeds[0]["mean"], seeds[0]["vector"], s=8, color=COLORS[0])
            cosine, spearman = (mean_over_seeds(seeds, "signed", name) for name in ("cosine", "spearman"))
            left.set_title(f"{attack}: cosine {cosine:.2f}, rank correlation {spearman:.2f}", fontsize=8)
            left.set_xlabel("true change under the trigger", fontsize=8)
            left.set_ylabel("TAC's perturbation", fontsize=8)
            names, measures = list(seeds[0]["agreement"]), ("cosine", "spearman", "precision")
            for number, (measure, color) in enumerate(zip(measures, COLORS[:3], strict=True)):
                heights = [float(mean_over_seeds(seeds, "agreement", name, measure)) for name in names]
                right.bar(np.arange(len(names)) + 0.27 * (number - 1), heights, 0.25, color=color, label=measure)
            right.set_xticks(range(len(names)), names)
            right.set_title(
                f"{attack}: agreement with the size of the change\nprecision: among the {seeds[0]['k']} largest",
                fontsize=8,
            )
            right.axhline(0, color="black", linewidth=0.6)
        legend_beside(grid[0, 1], fontsize=8)
        figure.tight_layout()
        return figure


def latent_norm(classifier: Classifier, variables: Variables, images: jax.Array) -> tuple[str, ...] | None:
    """The batch norm whose channel d changes latent neuron d and no other; None where there is none.

    It is found by trial: channel 0 gets another value, and neuron 0 alone has to change.
    """
    params = flatten_dict(variables["params"])
    before = classifier.features(variables, images)[0]
    for norm in reversed(classifier.conv_feeding_norm(variables, images)):
        scale, bias = params.get((*norm, "scale")), params.get((*norm, "bias"))
        if scale is None or bias is None or len(scale) != before.shape[1]:
            continue
        other = replace_params(variables, {(*norm, "scale"): scale.at[0].set(0), (*norm, "bias"): bias.at[0].set(10)})
        differs = jnp.any(classifier.features(other, images)[0] != before, axis=0)
        if bool(differs[0] & ~differs[1:].any()):
            return norm
    return None
