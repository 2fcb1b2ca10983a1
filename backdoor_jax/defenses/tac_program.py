r"""The quadratic programs of TAC reconstruction, for all classes at once, solved in their dual form.

For class k, with head columns :math:`w_j`, biases :math:`\beta_j` and clean latents :math:`\phi(x_i)`, the smallest
latent change that sends *every* clean sample to k is

.. math::
    s_k = \arg\min_s \tfrac12 \|s\|^2 \quad\text{s.t.}\quad
    (w_k - w_j)^\top s \ge b_{kj} := \max_i\, (w_j - w_k)^\top \phi(x_i) + (\beta_j - \beta_k) + m
    \quad \forall j \ne k .

Of the n(C-1) constraints only that of the tightest sample for each j can bind, so C-1 are enough. With :math:`V_k`
the matrix of rows :math:`(w_k - w_j)^\top` and :math:`G_k = V_k V_k^\top`, computed from :math:`K = W^\top W`, the
dual has C-1 variables whatever the size of the latents:

.. math::
    \max_{u \ge 0}\; b_k^\top u - \tfrac12 u^\top G_k u, \qquad s_k = V_k^\top u, \qquad
    (G_k)_{ij} = K_{kk} - K_{ki} - K_{kj} + K_{ij} .

It is solved by jaxopt's coordinate descent, ``BoxCDQP``, started from the result of a few rounds of block pivoting:
guess which u are positive, solve their equations, correct the guess. That saves three quarters of the time at C = 200.

A program may have no solution; it is reported as infeasible only with a certificate. For every :math:`u \ge 0` weak
duality gives :math:`\|s\| \ge b_k^\top u / \|V_k^\top u\|`, so a u that makes the right side arbitrarily large proves
infeasibility. Theorem 1 of the paper (C - 1 < D and full row rank imply feasibility) is sufficient, not necessary, and
is not used.

The primal is the paper's (Iwahana et al., arXiv 2511.08944, section 4 as quoted in a public review); bias and margin
are written out here, and the compression, the dual, the pivoting and the certificate are ours.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from backdoor_jax.compiling import full_precision

with warnings.catch_warnings():  # jaxopt warns that it is no longer maintained; what is used here works.
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt import BoxCDQP

MAX_SWEEPS = 5000
TOLERANCE = 1e-6
CONVERGED = 1e-3
PIVOTS = 8
"""Rounds of block pivoting before coordinate descent."""
RIDGE = 1e-6
"""Added to the diagonal of a round's equations; relative to rows of unit length."""
INFEASIBLE_ABOVE = 1e4
"""A lower bound on the norm of this many times the largest right-hand side (rows of unit length) means infeasible."""
SAMPLE_INFEASIBLE_ABOVE = 1e3
"""The same for the program of a single sample, whose norms come from Gram matrices and are less precise."""


class Perturbations(NamedTuple):
    """The solution for every class.

    Attributes:
        vectors: ``(C, D)``, s_k; rows of infeasible classes are NaN.
        norms: ``(C,)``, their Euclidean norms; infinite where infeasible.
        multipliers: ``(C, C)``, u_k in row k, with a zero in column k.
        feasible: ``(C,)``, False only with a certificate.
        converged: ``(C,)``, whether `residual` is below `CONVERGED`.
        residual: ``(C,)``, the largest violation of the optimality conditions: of the constraints, relative to the
            largest right-hand side, and of complementarity, relative to the squared norm.
        sweeps: ``(C,)``, sweeps of coordinate descent.
    """

    vectors: jax.Array
    norms: jax.Array
    multipliers: jax.Array
    feasible: jax.Array
    converged: jax.Array
    residual: jax.Array
    sweeps: jax.Array


@full_precision
def class_perturbations(
    latent: jax.Array, kernel: jax.Array, bias: jax.Array, margin: jax.Array | float = 0.0
) -> Perturbations:
    """The smallest latent change that sends all clean samples to a class, for every class.

    Args:
        latent: clean latents, ``(n, D)``.
        kernel: the head's kernel, ``(D, C)``.
        bias: the head's bias, ``(C,)``.
        margin: logits by which the class has to lead; the paper has none.

    Example:
        >>> latent = jnp.array([[1.0, 0.0], [2.0, 0.0]])
        >>> solution = class_perturbations(latent, jnp.eye(2), jnp.zeros(2))
        >>> solution.vectors.round(3).tolist()
        [[0.0, 0.0], [-1.0, 1.0]]
    """
    logits = latent @ kernel + bias
    return solve_programs(kernel, constraint_bounds(logits) + margin)


def solve_programs(kernel: jax.Array, bounds: jax.Array) -> Perturbations:
    """Solves the programs for given right-hand sides.

    Args:
        kernel: the head's kernel, ``(D, C)``.
        bounds: ``(C, C)``, b_kj; the diagonal is not used.
    """
    solution = _solve(kernel, bounds)
    if bool(solution.converged.all()):
        return solution
    infeasible = ~solution.converged & _certified_infeasible(kernel, bounds)
    return solution._replace(
        vectors=jnp.where(infeasible[:, None], jnp.nan, solution.vectors),
        norms=jnp.where(infeasible, jnp.inf, solution.norms),
        feasible=~infeasible,
    )


@jax.jit
def constraint_bounds(logits: jax.Array) -> jax.Array:
    """``b[k, j]``, the largest lead of class j over class k in any sample: ``(n, C) -> (C, C)``."""
    return jax.lax.map(lambda own: jnp.max(logits - own[:, None], axis=0), logits.T)


@jax.jit
@full_precision
def _solve(kernel: jax.Array, bounds: jax.Array) -> Perturbations:
    gram, rows = _scaled_grams(kernel)
    b, size = _scaled_bounds(bounds, rows)
    u, state = _nonnegative_qps(gram, -b)

    multipliers = u * size[:, None] / rows
    vectors = _combine(kernel, multipliers)
    gap = (jnp.einsum("dk,kd->k", kernel, vectors)[:, None] - vectors @ kernel) / rows / size[:, None] - b
    gap = jnp.where(jnp.eye(b.shape[0], dtype=bool), 0.0, gap)
    square = jnp.maximum(jnp.sum(u * b, axis=1), 1e-12)
    residual = jnp.maximum(jnp.max(-gap, axis=1), jnp.max(jnp.abs(u * gap), axis=1) / jnp.maximum(square, 1.0))
    return Perturbations(
        vectors=vectors,
        norms=jnp.linalg.norm(vectors, axis=1),
        multipliers=multipliers,
        feasible=jnp.ones(b.shape[0], bool),
        converged=residual < CONVERGED,
        residual=residual,
        sweeps=state.iter_num,
    )


@jax.jit
@full_precision
def _certified_infeasible(kernel: jax.Array, bounds: jax.Array) -> jax.Array:
    """Whether some ``u >= 0`` certifies that a class's program has no solution, ``(C,)``.

    If such a u exists, the minimizer of ``|V^T u|^2 + (b^T u - 1)^2`` over ``u >= 0`` is one (Farkas).
    """
    gram, rows = _scaled_grams(kernel)
    b, _ = _scaled_bounds(bounds, rows)
    u, _ = _nonnegative_qps(gram + b[:, :, None] * b[:, None, :], -b)
    reach = jnp.sum(b * u, axis=1)
    length = jnp.linalg.norm(_combine(kernel, u / rows), axis=1)
    return (reach > 0) & (reach > INFEASIBLE_ABOVE * length)


@jax.jit
@full_precision
def sample_norms(logits: jax.Array, kernel: jax.Array, margin: jax.Array | float = 0.0) -> jax.Array:
    """Norms of the smallest latent change that sends each single clean sample to each class.

    There is one program for each class and sample. The programs of one class share G_k and are solved together, samples
    along the fast axis, by our own coordinate descent: jaxopt's, batched, is 60 times slower here.

    Args:
        logits: the clean samples' logits, ``(n, C)``.
        kernel: the head's kernel, ``(D, C)``.
        margin: logits by which the class has to lead.

    Returns:
        ``(C, n)`` norms, infinite where the class cannot be reached.

    Example:
        >>> sample_norms(jnp.array([[1.0, 0.0], [2.0, 0.0]]), jnp.eye(2)).round(3).tolist()
        [[0.0, 0.0], [0.7070000171661377, 1.4140000343322754]]
    """
    grams, rows = _scaled_grams(kernel)
    classes = kernel.shape[1]

    def one_class(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        own, gram, row = inputs
        b = ((logits.T - logits[:, own] + margin) / row[:, None]).at[own].set(0.0)  # (C, n)
        size = jnp.maximum(jnp.max(b, axis=0), 1e-12)
        b = b / size
        u, unsettled = _sweep_samples(gram, b, 0.0)

        def certified() -> jax.Array:
            direction = _sweep_samples(gram, b, 1.0)[0]
            return jnp.sum(b * direction, axis=0) > SAMPLE_INFEASIBLE_ABOVE * _lengths(gram, direction)

        none = jnp.zeros(b.shape[1], bool)
        unreachable = unsettled & jax.lax.cond(jnp.any(unsettled), certified, lambda: none)
        return jnp.where(unreachable, jnp.inf, size * _lengths(gram, u))

    return jax.lax.map(one_class, (jnp.arange(classes), grams, rows))


def _sweep_samples(gram: jax.Array, b: jax.Array, weight: float) -> tuple[jax.Array, jax.Array]:
    """Coordinate descent on ``u^T G u / 2 - b^T u + weight (b^T u)^2 / 2``, ``u >= 0``, per column of b ``(C, n)``.

    Returns the columns u, and whether each was still changing in the last sweep. Weight 1 gives the certificate's
    program.
    """

    def coordinate(i: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        u, moved = carry
        slope = gram[i] @ u - b[i]
        if weight:
            slope += weight * b[i] * jnp.sum(b * u, axis=0)
        new = jnp.maximum(u[i] - slope / (1 + weight * b[i] ** 2), 0)
        return u.at[i].set(new), jnp.maximum(moved, jnp.abs(new - u[i]))

    def sweep(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        u, _, count = carry
        return *jax.lax.fori_loop(0, gram.shape[0], coordinate, (u, jnp.zeros(u.shape[1]))), count + 1

    u, moved, _ = jax.lax.while_loop(
        lambda carry: (jnp.max(carry[1]) > TOLERANCE) & (carry[2] < MAX_SWEEPS),
        sweep,
        (jnp.zeros_like(b), jnp.full(b.shape[1], jnp.inf), jnp.asarray(0)),
    )
    return u, moved > TOLERANCE


def _lengths(gram: jax.Array, u: jax.Array) -> jax.Array:
    """``|V^T u|`` for each column of u, from the Gram matrix."""
    return jnp.sqrt(jnp.maximum(jnp.sum(u * (gram @ u), axis=0), 0))


def _nonnegative_qp(quadratic: jax.Array, linear: jax.Array) -> tuple[jax.Array, Any]:
    solver = BoxCDQP(maxiter=MAX_SWEEPS, tol=TOLERANCE, implicit_diff=False, unroll=False)
    start, zeros = _pivoted(quadratic, linear), jnp.zeros_like(linear)
    step = solver.run(start, params_obj=(quadratic, linear), params_ineq=(zeros, jnp.full_like(linear, jnp.inf)))
    return step.params, step.state


def _pivoted(quadratic: jax.Array, linear: jax.Array) -> jax.Array:
    """A start near the solution, by block pivoting (Portugal, Judice and Vicente, 1994); zero where that fails.

    A guess of which variables are positive determines their values, from the equations, and the slopes of the others;
    variables with a negative value are removed from the guess, those with a negative slope are added.
    """
    eye = jnp.eye(len(linear), dtype=linear.dtype)

    def solve(positive: jax.Array) -> jax.Array:
        equations = jnp.where(positive[:, None] & positive, quadratic, eye) + RIDGE * eye
        return jax.scipy.linalg.solve(equations, jnp.where(positive, -linear, 0), assume_a="pos")

    def pivot(_: int, positive: jax.Array) -> jax.Array:
        u = solve(positive)
        return jnp.where(positive, u > 0, quadratic @ u + linear < -TOLERANCE)

    u = solve(jax.lax.fori_loop(0, PIVOTS, pivot, linear < 0))
    return jnp.where(jnp.all(jnp.isfinite(u)), jnp.maximum(u, 0), 0)


def _nonnegative_qps(quadratics: jax.Array, linears: jax.Array) -> tuple[jax.Array, Any]:
    """Solves the programs of all classes: on CPU one by one, elsewhere together.

    One by one each stops when it has converged, which is 80 times faster on CPU at C = 200.
    """
    return jax.lax.platform_dependent(
        quadratics,
        linears,
        cpu=lambda q, c: jax.lax.map(lambda pair: _nonnegative_qp(*pair), (q, c)),
        default=jax.vmap(_nonnegative_qp),
    )


def _scaled_grams(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``G_k`` for rows of V_k scaled to unit length ``(C, C, C)``, and the rows' lengths ``(C, C)``.

    Row and column k, which belong to no constraint, are set to those of the identity, so that u_k stays 0.
    """
    k = kernel.T @ kernel
    square = jnp.diag(k)
    gram = square[:, None, None] - k[:, :, None] - k[:, None, :] + k[None]
    lengths = jnp.sqrt(jnp.maximum(square[:, None] + square[None] - 2 * k, 0))
    eye = jnp.eye(k.shape[0], dtype=bool)
    lengths = jnp.where(eye | (lengths <= 1e-6 * jnp.max(lengths)), 1.0, lengths)
    gram = gram / (lengths[:, :, None] * lengths[:, None, :])
    own = eye[:, :, None] | eye[:, None, :]
    return jnp.where(own, jnp.eye(k.shape[0]), gram), lengths


def _scaled_bounds(bounds: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Right-hand sides for rows of unit length, scaled to largest entry 1, and that scale ``(C,)``."""
    b = jnp.where(jnp.eye(bounds.shape[0], dtype=bool), 0.0, bounds / lengths)
    size = jnp.max(b, axis=1)
    size = jnp.where(size > 0, size, 1.0)
    return b / size[:, None], size


def _combine(kernel: jax.Array, multipliers: jax.Array) -> jax.Array:
    """``V_k^T u_k`` for every class: ``(C, D)``."""
    return jnp.sum(multipliers, axis=1)[:, None] * kernel.T - multipliers @ kernel.T
