"""What an experiment can look into besides rates: the figures by which the four papers argue.

An experiment names analyses, and a row gets what they find under ``analyses``, as plain values:

- ``landscape``, of repairs (D3): losses and rates on the line from the victim to the repaired model and beyond, and how
  far the head has moved;
- ``latents``, of all models (D3): latents of test images and of the same triggered, in the plane;
- ``neurons``, of victims (TAC): the true change of each latent neuron under the trigger, beside TAC's perturbation and
  the scores of CLP and ANP;
- ``membership``, of all models (super-fine-tuning): three attacks that tell whether an image was trained on;
- ``reinjection`` (super-fine-tuning): a backdoor injected anew into repaired models, the unpoisoned twin and fresh
  weights.

How many images each looks at and which, is ours.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from backdoor_jax.data import Dataset, Task
from backdoor_jax.defenses.anp import AnpConfig, learn_masks
from backdoor_jax.defenses.base import replaced
from backdoor_jax.defenses.clp import channel_bounds
from backdoor_jax.defenses.tac import scan
from backdoor_jax.experiment.settings import Experiment
from backdoor_jax.experiment.victims import Victim, clean_subset, prepare_victim, streams
from backdoor_jax.metrics import (
    ReinjectConfig,
    agreement,
    along,
    confidence_signal,
    embedding,
    loss_signal,
    membership,
    moved,
    reinject,
    shadow_model,
    shadow_signal,
    triggered_change,
)
from backdoor_jax.metrics.sequela import Shadow
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.training import latents

LINE_IMAGES, PLANE_IMAGES, CHANGE_IMAGES, MASK_STEPS = 500, 300, 1000, 500
REINJECTION = ReinjectConfig(rates=(0.01, 0.1), epochs=(1, 2, 5, 10), batch_size=32)


class Laboratory:
    """What the models of one seed are looked into with; what takes a training is made when first asked for.

    Args:
        experiment: names the analyses.
        seed: its models'.
        classifier: the network.
        task: the data.
        out: the experiment's folder, for the unpoisoned twin.
    """

    def __init__(self, experiment: Experiment, seed: int, classifier: Classifier, task: Task, out: Path) -> None:
        self.experiment, self.seed, self.out = experiment, seed, out
        self.classifier, self.task = classifier, task

    def key(self, purpose: str) -> jax.Array:
        """A stream of randomness for each purpose."""
        return streams(self.seed, purpose)["analysis"]

    @cached_property
    def clean(self) -> Dataset:
        """The defender's images."""
        return self.task.train.take(clean_subset(self.experiment, self.task, self.seed))

    @cached_property
    def test(self) -> Dataset:
        """The test set in an order drawn once, so that any part of it holds all classes."""
        order = jax.random.permutation(self.key("test"), len(self.task.test))
        return self.task.test.take(np.asarray(order))

    @cached_property
    def twin(self) -> Variables:
        """The unpoisoned twin's variables."""
        return prepare_victim(self.experiment, self.task, self.classifier, None, self.seed, self.out).variables

    @cached_property
    def shadow(self) -> Shadow:
        """A model that a membership attacker trains on half of the test set's first half."""
        known = self.test.take(slice(0, len(self.test) // 2))
        training = self.experiment.training(None)
        return shadow_model(self.key("shadow"), self.classifier, known, training, flip=self.task.flip)

    def look(self, victim: Victim, repaired: Variables | None = None) -> dict[str, Any]:
        """What the experiment's analyses find in a victim or in its repair."""
        subject = Subject(victim, victim.variables if repaired is None else repaired, repaired is not None)
        found = {name: ANALYSES[name](self, subject) for name in self.experiment.analyses}
        return {name: finding for name, finding in found.items() if finding is not None}


class Subject(NamedTuple):
    """A model that was judged.

    Attributes:
        victim: it, or what it was before its repair.
        variables: its own.
        repaired: whether a defence made it.
    """

    victim: Victim
    variables: Variables
    repaired: bool


Finding = dict[str, Any] | None
"""Plain values, or None where there is nothing to look into."""


def landscape(laboratory: Laboratory, subject: Subject) -> Finding:
    """Losses and rates along the line from the victim to its repair."""
    victim, classifier = subject.victim, laboratory.classifier
    if not subject.repaired or victim.trigger is None or victim.label_map is None:
        return None
    if jax.tree.map(jnp.shape, victim.variables) != jax.tree.map(jnp.shape, subject.variables):
        return None
    test = laboratory.test.take(slice(0, LINE_IMAGES))
    line = along(classifier, victim.variables, subject.variables, test, victim.trigger, victim.label_map)
    head = moved(victim.variables, subject.variables, (*classifier.head_path, "kernel"))

    def plain(values: np.ndarray) -> list[float | None]:
        return [round(float(value), 5) if np.isfinite(value) else None for value in values]

    return {
        **{name: plain(np.asarray(values)) for name, values in line._asdict().items()},
        "head": {"distance": head.distance, "cosine": head.cosine},
    }


def plane(laboratory: Laboratory, subject: Subject) -> Finding:
    """Latents of test images, and of the same triggered, on their two principal components."""
    trigger = subject.victim.trigger
    if trigger is None:
        return None
    images = laboratory.test.take(slice(0, PLANE_IMAGES))
    both = [latents(laboratory.classifier, subject.variables, seen) for seen in (images.images, trigger(images.images))]
    clean, triggered = (np.round(points, 3) for points in embedding(*both))
    return {"labels": images.labels, "clean": clean, "triggered": triggered}


def neurons(laboratory: Laboratory, subject: Subject) -> Finding:
    """How well TAC's perturbation and the scores of CLP and ANP agree with what the trigger does to the latents."""
    victim, classifier = subject.victim, laboratory.classifier
    if subject.repaired or victim.trigger is None:
        return None
    if victim.label_map is None or victim.label_map.kind != "all_to_one":
        return None
    target, test = victim.label_map.target, laboratory.test
    others = np.flatnonzero(np.asarray(test.labels) != target)[:CHANGE_IMAGES]
    change = triggered_change(classifier, victim.variables, test.images[others], victim.trigger)
    found = scan(classifier, victim.variables, laboratory.clean.images).perturbations
    if not bool(found.feasible[target]):
        return None
    vector = np.asarray(found.vectors[target])
    k = max(1, len(vector) // 20)
    scores = {"tac": np.abs(vector)}
    writer = latent_normalization(classifier, victim.variables, test.images[:2])
    if writer is not None:
        params, statistics = flatten_dict(victim.variables["params"]), flatten_dict(victim.variables["batch_stats"])
        source = classifier.normalized(victim.variables, test.images[:1]).get(writer)
        if source is not None:
            kernel, variance = params[*source, "kernel"], statistics[*writer, "var"]
            scores["clp"] = np.asarray(channel_bounds(kernel, params[*writer, "scale"], variance))
        key, config = laboratory.key("neurons"), AnpConfig(steps=MASK_STEPS, flip=laboratory.task.flip)
        masks, _ = learn_masks(key, classifier, victim.variables, laboratory.clean, config)
        scores["anp"] = 1 - np.asarray(flatten_dict(masks)[writer])
    return {
        "target": target,
        "k": k,
        "mean": np.round(change.mean, 5),
        "size": np.round(change.size, 5),
        "vector": np.round(vector, 5),
        "signed": agreement(vector, change.mean, k)._asdict(),
        "agreement": {name: agreement(values, change.size, k)._asdict() for name, values in scores.items()},
    }


def latent_normalization(classifier: Classifier, variables: Variables, images: jax.Array) -> tuple[str, ...] | None:
    """The batch normalisation whose channel d moves latent neuron d and no other; None where there is none.

    It is found by trial: channel 0 is given another value, and neuron 0 alone has to change.
    """
    params = flatten_dict(variables["params"])
    before = classifier.features(variables, images)[0]
    for norm in reversed(classifier.normalized(variables, images)):
        scale, bias = params.get((*norm, "scale")), params.get((*norm, "bias"))
        if scale is None or bias is None or len(scale) != before.shape[1]:
            continue
        other = replaced(variables, {(*norm, "scale"): scale.at[0].set(0), (*norm, "bias"): bias.at[0].set(10)})
        differs = jnp.any(classifier.features(other, images)[0] != before, axis=0)
        if bool(differs[0] & ~differs[1:].any()):
            return norm
    return None


def members(laboratory: Laboratory, subject: Subject) -> Finding:
    """Three membership attacks: unpoisoned training images against the test set's second half.

    A test set from elsewhere can be told by that alone. So where training images were left out, the loss is also judged
    against those.
    """
    classifier, victim, test = laboratory.classifier, subject.victim, laboratory.test
    outside = test.take(slice(len(test) // 2, len(test)))
    clean = np.setdiff1d(np.arange(len(victim.training_set)), victim.poisoned)
    draw_key, *keys = jax.random.split(laboratory.key("membership"), 4)
    inside = victim.training_set.take(np.asarray(jax.random.permutation(draw_key, clean))[: len(outside)])

    def shadowed(classifier: Classifier, variables: Variables, data: Dataset) -> np.ndarray:
        return shadow_signal(classifier, laboratory.shadow, variables, data)

    signals = {"loss": loss_signal, "confidence": confidence_signal, "shadow": shadowed}
    pairs = {
        name: tuple(jnp.asarray(signal(classifier, subject.variables, part)) for part in (inside, outside))
        for name, signal in signals.items()
    }
    if (left_out := laboratory.task.left_out) is not None:
        pairs["loss, left-out images"] = pairs["loss"][0], loss_signal(classifier, subject.variables, left_out)
        keys.append(laboratory.key("left_out"))
    return {
        name: {measure: list(interval) for measure, interval in membership(key, *pair)._asdict().items()}
        for key, (name, pair) in zip(keys, pairs.items(), strict=True)
    }


def reinjection(laboratory: Laboratory, subject: Subject) -> Finding:
    """The defender's images, poisoned anew: how soon ASR is back, from the repair, or from twin and fresh weights."""
    victim, classifier = subject.victim, laboratory.classifier
    if victim.trigger is None or victim.label_map is None:
        return None
    rates = tuple(rate for rate in REINJECTION.rates if round(rate * len(laboratory.clean)))
    if not rates:
        return None
    if subject.repaired:
        starts = {"repaired": subject.variables}
    else:
        fresh = classifier.init(laboratory.key("fresh"), laboratory.clean.images[:1])
        starts = {"twin": laboratory.twin, "fresh": fresh}
    found = reinject(
        laboratory.key("reinjection"),
        classifier,
        starts,
        laboratory.clean,
        laboratory.task.test,
        victim.trigger,
        victim.label_map,
        dataclasses.replace(REINJECTION, rates=rates, flip=laboratory.task.flip),
    )
    return {
        "rows": [
            {"start": row.start, "rate": row.rate, "steps": row.steps, "poisoned": row.poisoned}
            | {"acc": row.scores.acc, "asr": row.scores.asr}
            for row in found
        ]
    }


ANALYSES: dict[str, Callable[[Laboratory, Subject], Finding]] = {
    "landscape": landscape,
    "latents": plane,
    "neurons": neurons,
    "membership": members,
    "reinjection": reinjection,
}
"""The analyses by the names that configurations use."""
