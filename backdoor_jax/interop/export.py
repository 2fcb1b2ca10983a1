"""A model as one program made by `jax.export`, weights included, that runs without this package.

Example::

    import jax
    program = jax.export.deserialize(bytearray(open("model.jaxexport", "rb").read()))
    logits = program.call(images)  # uint8 (B, H, W, channels), any B, on CPU, CUDA or TPU
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from backdoor_jax.errors import UserError, first_line
from backdoor_jax.files import atomic_write
from backdoor_jax.models import Classifier, Variables
from backdoor_jax.validation import checked

SUFFIX = ".jaxexport"
PLATFORMS = ("cpu", "cuda", "tpu")


@checked
def export_model(
    path: Path | str, classifier: Classifier, variables: Variables, image_shape: tuple[int, int, int]
) -> None:
    """Writes a model as a serialized program from uint8 images to float32 logits.

    Normalization and activation bounds are part of it. The number of images is free, their shape is fixed. According to
    `jax.export`, StableHLO programs run for at least six months with later versions of JAX; keep the model itself too.

    Args:
        path: the file; written completely or not at all.
        classifier: the network.
        variables: its variables.
        image_shape: height, width and channels of an image.

    Raises:
        UserError: where the model cannot take such images, its variables cannot be used, or the file cannot be
            written.
        NonFiniteError: for weights or statistics that are not finite.

    Example:
        >>> import tempfile
        >>> from backdoor_jax.models import build_classifier
        >>> classifier = build_classifier("small_cnn", 10, width=2)
        >>> variables = classifier.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3), jnp.uint8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_model(Path(folder) / "model.jaxexport", classifier, variables, (16, 16, 3))
        ...     program = jax.export.deserialize(bytearray((Path(folder) / "model.jaxexport").read_bytes()))
        >>> program.call(jnp.zeros((5, 16, 16, 3), jnp.uint8)).shape
        (5, 10)
    """
    path = Path(path)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
    exported = jax.export.export(jax.jit(lambda images: classifier.logits(variables, images)[0]), platforms=PLATFORMS)
    try:
        program = exported(images).serialize()
    except ImportError as error:
        raise UserError(f"{path}: jax.export needs the package flatbuffers; pip install flatbuffers") from error
    except UserError:
        raise
    except Exception as error:  # Flax and JAX raise many kinds for images that do not fit.
        shape = "x".join(map(str, image_shape))
        raise UserError(
            f"{path}: the model cannot be exported for images of {shape} ({first_line(error)}); check their shape"
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_bytes(program)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another path") from error
