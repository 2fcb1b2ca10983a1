"""Checkpoints, and models from and to other frameworks."""

from backdoor_jax.interop.pytorch import load_torch, save_torch, torch_state
from backdoor_jax.interop.torch_bounds import apply_bounds

__all__ = ["apply_bounds", "load_torch", "save_torch", "torch_state"]
