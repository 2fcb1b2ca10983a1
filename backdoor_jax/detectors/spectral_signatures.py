r"""Spectral signatures (Tran, Li, Madry, NeurIPS 2018, arXiv 1811.00636): poison along the main direction of a class.

The latents of a class that holds both clean and poisoned images differ most along the line from one to the other. With
the class's latents centered, :math:`v` their first right singular vector, an image's score is

.. math:: \bigl(v^\top (\phi(x_i) - \bar\phi)\bigr)^2 .

The paper removes the images of the largest scores, one and a half times as many as it assumes to be poisoned.
"""

import numpy as np

from backdoor_jax.arguments import typed


@typed
def spectral_signatures(latent: np.ndarray) -> np.ndarray:
    """The score of each image of one class, the larger the more suspicious.

    Args:
        latent: the class's latents, ``(n, D)``.

    Returns:
        ``(n,)``.

    Example:
        >>> spectral_signatures(np.array([[0.0, 0.0], [0.0, 0.1], [0.1, 0.0], [9.0, 9.0]])).argmax()
        np.int64(3)
    """
    centered = np.asarray(latent, np.float64) - np.mean(latent, axis=0, dtype=np.float64)
    direction = np.linalg.svd(centered, full_matrices=False)[2][0]
    return (centered @ direction) ** 2
