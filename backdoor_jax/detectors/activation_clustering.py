"""Activation clustering (Chen et al., SafeAI 2019, arXiv 1811.03728): poison as the smaller of a class's two clusters.

The latents of a class are reduced to ten dimensions and split into two clusters by k-means. Poisoned images fall into
one of them, which the paper takes to be the smaller. An image's score is how much nearer it is to the smaller cluster's
center than to the other's.

The paper reduces by independent components; here it is by principal components, which leave distances as they are.
Clusters start from the two signs of the first component, so nothing is random.
"""

import numpy as np

from backdoor_jax.arguments import typed

DIMENSIONS = 10
"""Published."""
ROUNDS = 100


@typed
def activation_clustering(latent: np.ndarray) -> np.ndarray:
    """The score of each image of one class, above zero in the smaller cluster, the larger the more suspicious.

    Args:
        latent: the class's latents, ``(n, D)``.

    Returns:
        ``(n,)``.

    Example:
        >>> activation_clustering(np.array([[0.0, 0.0], [0.0, 0.1], [0.1, 0.0], [9.0, 9.0]])) > 0
        array([False, False, False,  True])
    """
    centered = np.asarray(latent, np.float64) - np.mean(latent, axis=0, dtype=np.float64)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    reduced = (left * values)[:, :DIMENSIONS]
    second = reduced[:, 0] > 0
    for _ in range(ROUNDS):
        if second.all() or not second.any():
            return np.zeros(len(latent))
        centers = np.stack([reduced[~second].mean(axis=0), reduced[second].mean(axis=0)])
        distances = np.linalg.norm(reduced[:, None] - centers, axis=2)
        before, second = second, distances[:, 1] < distances[:, 0]
        if (before == second).all():
            break
    lead = distances[:, 0] - distances[:, 1]
    return lead if second.sum() <= (~second).sum() else -lead
