"""Activation bounds in a PyTorch network.

A bound clips a module's output, by a forward hook, so that it also works in networks that call their rectifiers as
functions (``F.relu``), as the published benchmark's does. There it clips the normalization before the rectifier, and
for every bound :math:`z \\ge 0`

.. math:: \\mathrm{relu}(\\min(x, z)) = \\min(\\mathrm{relu}(x), z) .

Nothing else in the package runs in PyTorch, and PyTorch is imported only here and to read or write its files.
"""

from collections.abc import Mapping
from typing import Any

from backdoor_jax.errors import UserError
from backdoor_jax.models.torch_module import unwrapped

BUFFER = "activation_bound"


def apply_bounds(module: Any, bounds: Mapping[str, Any]) -> Any:
    """Clips the outputs of a network's modules from now on.

    The bounds become buffers that move with the network (``to``, ``deepcopy``) and are not in its state dict. Bounds
    given again replace the older ones.

    Args:
        module: a ``torch.nn.Module`` with the names that `save_torch` uses; ``DataParallel`` or ``torch.compile`` may
            be around it.
        bounds: upper bounds by the name of the module whose output they clip: ``(C,)`` for an output ``(B, C, ...)``,
            ``(1, C)`` for one with channels last.

    Returns:
        The module itself.

    Raises:
        UserError: for a name that the network does not have; the network is then unchanged.

    Example:
        >>> import torch  # doctest: +SKIP
        >>> saved = torch.load("repaired.pt", weights_only=True)  # doctest: +SKIP
        >>> network.load_state_dict(saved["model"])  # doctest: +SKIP
        >>> apply_bounds(network, saved["bounds"])  # doctest: +SKIP
    """
    import torch

    inner, _ = unwrapped(module)
    known = dict(inner.named_modules())
    unknown = sorted(set(bounds) - set(known))
    if unknown:
        raise UserError(
            f"the network has no module {unknown[0]!r}, whose output a bound clips; give the architecture that was "
            "saved"
        )
    for name, upper in bounds.items():
        clipped = known[name]
        reference = next(inner.parameters())
        tensor = torch.as_tensor(upper, dtype=reference.dtype, device=reference.device)
        clipped.register_buffer(BUFFER, tensor.detach().clone(), persistent=False)
        if _clip not in clipped._forward_hooks.values():
            clipped.register_forward_hook(_clip)
    return module


def _clip(module: Any, inputs: Any, output: Any) -> Any:
    """A forward hook; importable, so that a network that has it can be pickled."""
    del inputs
    upper = getattr(module, BUFFER)
    return output.minimum(upper.view(1, -1, *(1,) * (output.ndim - 2)) if upper.ndim == 1 else upper)
