r"""The quadratic programs of TAC reconstruction, solved in their dual form and checked in float64.

For class k, with head columns :math:`w_j`, biases :math:`\beta_j` and clean latents :math:`\phi(x_i)`, the smallest
latent change that sends *every* clean sample to k is

.. math::
    s_k = \arg\min_s \tfrac12 \|s\|^2 \quad\text{s.t.}\quad
    (w_k - w_j)^\top s \ge b_{kj} := \max_i\, (w_j - w_k)^\top \phi(x_i) + (\beta_j - \beta_k) + m
    \quad \forall j \ne k .

Of the n(C-1) constraints only that of the tightest sample for each j can bind, so C-1 are enough. The program of a
single sample has the same left sides, and its own :math:`b_{kj}` without the maximum. With :math:`V_k` the matrix of
rows :math:`(w_k - w_j)^\top`, scaled to unit length together with :math:`b_{kj}`, and :math:`G_k = V_k V_k^\top`, the
dual has C-1 variables whatever the size of the latents:

.. math::
    \max_{u \ge 0}\; b^\top u - \tfrac12 u^\top G_k u, \qquad s = V_k^\top u .

**Numbers.** Logits, :math:`V_k` and :math:`G_k` are computed in float64 from differences of head columns, so that
nearly equal columns keep their digits. Coordinate descent in float32 then solves a program for its `WORKING_SET`
tightest constraints; violated constraints replace idle ones until none is violated. The class programs use jaxopt's
``BoxCDQP``, started by a few rounds of block pivoting; the samples' programs, of which there are many, our own descent
over many at once.

**Proof.** A solution counts as solved where weak duality bounds its error (`relative_gap`). What is left is solved in
float64 by SciPy's nonnegative least squares, in Lawson and Hanson's reduction of least-distance programs:

.. math::
    \min_{u \ge 0} \|V_k^\top u\|^2 + (b^\top u - 1)^2 , \qquad s = V_k^\top u / (1 - b^\top u) .

A program may have no solution; it is reported as infeasible only with a certificate. For every :math:`u \ge 0` weak
duality gives :math:`\|s\| \ge b^\top u / \|V_k^\top u\|`, so a u that makes the right side arbitrarily large proves
infeasibility (Farkas). Theorem 1 of the paper (C - 1 < D and full row rank imply feasibility) is sufficient, not
necessary, and is not used.

The primal is the paper's (Iwahana et al., arXiv 2511.08944, section 4 as quoted in a public review); bias and margin
are written out here, and the compression, the dual, the working sets, the proofs and the certificate are ours.
"""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backdoor_jax.compiling import full_precision
from backdoor_jax.progress import progress_bar

with warnings.catch_warnings():  # jaxopt warns that it is no longer maintained; what is used here works.
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt import BoxCDQP

CONVERGED = 1e-4
"""A program is solved where `relative_gap` is at most this; the norm is then right to half of it."""
TOLERANCE = 1e-5
"""Largest change of a multiplier in the last sweep of coordinate descent, where the largest right-hand side is 1."""
MAX_SWEEPS = 1000
"""Sweeps of coordinate descent on a class's program, over all of its working sets."""
SAMPLE_SWEEPS = 16
"""Sweeps on the samples' programs before what is solved is set aside."""
ROUNDS = 24
"""Working sets that are tried before a program is solved by nonnegative least squares."""
WORKING_SET = 64
FEW, TOGETHER = 32, 256
"""Samples whose programs are solved together; there is a compiled program for each of the two numbers."""
PIVOTS = 8
"""Rounds of block pivoting before coordinate descent."""
RIDGE = 1e-6
"""Added to the diagonal of a round's equations; relative to rows of unit length."""
INFEASIBLE_ABOVE = 1e6
"""A lower bound on the norm of this many times the largest right-hand side (rows of unit length) means infeasible."""

EQUAL = 1e-12
"""Columns of float32 that are closer than this, relative to the longest, are equal."""


class Constraints(NamedTuple):
    """The left sides of a class's constraints, in float64.

    Attributes:
        rows: ``(C, r)``, those of V_k at unit length, in coordinates of the span of the head; row k is zero, as is
            that of a column equal to column k.
        lengths: ``(C,)``, what the rows were divided by; 1 for zero rows.
        gram: ``(C, C)``, G_k.
    """

    rows: np.ndarray
    lengths: np.ndarray
    gram: np.ndarray


class Perturbations(NamedTuple):
    """The solution for every class.

    Attributes:
        vectors: ``(C, D)``, s_k; rows of infeasible classes are NaN.
        norms: ``(C,)``, their Euclidean norms; infinite where infeasible.
        multipliers: ``(C, C)``, u_k in row k, of the constraints before scaling, with a zero in column k.
        feasible: ``(C,)``, False only with a certificate.
        converged: ``(C,)``, whether `residual` is at most `CONVERGED`.
        residual: ``(C,)``, the bound on the relative error of the squared norm; see `relative_gap`.
        sweeps: ``(C,)``, sweeps of coordinate descent.
    """

    vectors: np.ndarray
    norms: np.ndarray
    multipliers: np.ndarray
    feasible: np.ndarray
    converged: np.ndarray
    residual: np.ndarray
    sweeps: np.ndarray


class SampleNorms(NamedTuple):
    """The norms of the single samples' programs.

    Attributes:
        norms: ``(C, n)``, infinite where the class cannot be reached; an upper bound where not solved, infinite where
            none is known.
        solved: ``(C, n)``, whether the norm is right to `CONVERGED`, or infinite with a certificate.
    """

    norms: np.ndarray
    solved: np.ndarray


def class_logits(latent: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Logits ``(n, C)`` in float64, in which the leads between nearly equal columns keep their digits."""
    return np.asarray(latent, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)


def span_coordinates(kernel: np.ndarray) -> np.ndarray:
    """The head's columns in an orthonormal basis of their span: ``(D, C) -> (r, C)``, float64, r at most C and D."""
    kernel = np.asarray(kernel, np.float64)
    return np.asarray(np.linalg.qr(kernel, mode="r")) if len(kernel) > kernel.shape[1] else kernel


def class_constraints(columns: np.ndarray, k: int) -> Constraints:
    """The constraints' left sides of class k, from columns ``(r, C)`` in float64.

    Example:
        >>> class_constraints(np.eye(3), 0).gram.round(2).tolist()
        [[0.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.5, 1.0]]
    """
    rows = (columns[:, [k]] - columns).T
    lengths = np.linalg.norm(rows, axis=1)
    equal = lengths <= EQUAL * np.max(np.linalg.norm(columns, axis=0))
    rows, lengths = np.where(equal[:, None], 0, rows), np.where(equal, 1, lengths)
    rows = rows / lengths[:, None]
    return Constraints(rows, lengths, rows @ rows.T)


def class_perturbations(latent: np.ndarray, kernel: np.ndarray, bias: np.ndarray, margin: float = 0.0) -> Perturbations:
    """The smallest latent change that sends all clean samples to a class, for every class.

    Args:
        latent: clean latents, ``(n, D)``.
        kernel: the head's kernel, ``(D, C)``.
        bias: the head's bias, ``(C,)``.
        margin: logits by which the class has to lead; the paper has none.

    Example:
        >>> latent = np.array([[1.0, 0.0], [2.0, 0.0]])
        >>> solution = class_perturbations(latent, np.eye(2), np.zeros(2))
        >>> solution.vectors.round(3).tolist()
        [[0.0, 0.0], [-1.0, 1.0]]
    """
    kernel = np.asarray(kernel, np.float64)
    logits, columns, classes = class_logits(latent, kernel, bias), span_coordinates(kernel), kernel.shape[1]
    found = []
    with progress_bar("class programs", classes, unit="classes") as advance:
        for k in range(classes):
            bounds = np.max(logits - logits[:, [k]], axis=0) + margin
            found.append(_solve_class(class_constraints(columns, k), bounds, k))
            advance(1)
    multipliers, residual, feasible, sweeps = (np.stack(part) for part in zip(*found, strict=True))
    vectors = multipliers.sum(axis=1, keepdims=True) * kernel.T - multipliers @ kernel.T
    vectors[~feasible] = np.nan
    norms = np.where(feasible, np.linalg.norm(vectors, axis=1), np.inf)
    converged = feasible & (residual <= CONVERGED)
    return Perturbations(vectors.astype(np.float32), norms, multipliers, feasible, converged, residual, sweeps)


def sample_norms(logits: np.ndarray, kernel: np.ndarray, margin: float = 0.0) -> SampleNorms:
    """Norms of the smallest latent change that sends each single clean sample to each class.

    Args:
        logits: the clean samples' logits, ``(n, C)``.
        kernel: the head's kernel, ``(D, C)``.
        margin: logits by which the class has to lead.

    Example:
        >>> sample_norms(np.array([[1.0, 0.0], [2.0, 0.0]]), np.eye(2)).norms.round(3).tolist()
        [[0.0, 0.0], [0.707, 1.414]]
    """
    logits, columns = np.asarray(logits, np.float64), span_coordinates(kernel)
    classes = columns.shape[1]
    norms, solved = np.zeros((classes, len(logits))), np.ones((classes, len(logits)), bool)
    with progress_bar("sample programs", classes, unit="classes") as advance:
        for k in range(classes):
            bounds = logits - logits[:, [k]] + margin
            norms[k], solved[k] = _solve_samples(class_constraints(columns, k), bounds, k)
            advance(1)
    return SampleNorms(norms, solved)


def relative_gap(gram: np.ndarray, u: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""A bound on the relative error of :math:`\|s\|^2` for multipliers u, and the constraints' violations.

    .. math:: \frac{|\,\|s\|^2 - b^\top u\,| + v \sum_j u_j}{\|s\|^2}, \qquad v = \max_j\, (b - V s)_j

    The first term is the duality gap; the second, the largest violation times the multipliers, is what repairing the
    violation adds to the optimum, to first order.

    Args:
        gram: ``(C, C)``.
        u: ``(P, C)``.
        b: ``(P, C)``.

    Returns:
        ``(P,)`` and ``(P, C)``.
    """
    reach = u @ gram
    square, violations = np.sum(u * reach, axis=1), b - reach
    gap = np.abs(square - np.sum(u * b, axis=1)) + np.maximum(violations.max(axis=1), 0) * u.sum(axis=1)
    return np.where(gap > 0, gap / np.maximum(square, 1e-300), 0), violations


def proves_infeasible(rows: np.ndarray, u: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether u ``(C,)`` certifies that the programs of right-hand sides b ``(P, C)`` have no solution."""
    return b @ u > INFEASIBLE_ABOVE * np.maximum(b.max(axis=1), 0) * np.linalg.norm(u @ rows)


def least_distance(rows: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """Nonnegative multipliers u ``(C,)`` of the shortest s with ``rows @ s >= b``, by nonnegative least squares.

    Where there is no such s, u is a certificate of that. None where the solver gives up.

    Example:
        >>> least_distance(np.eye(2), np.array([1.0, -1.0]))
        array([1., 0.])
    """
    from scipy.optimize import nnls

    matrix = np.vstack([rows.T, b])
    goal = np.zeros(len(matrix))
    goal[-1] = 1
    try:
        u, _ = nnls(matrix, goal, maxiter=30 * len(b))
    except RuntimeError:
        return None
    left = 1 - b @ u
    return u if left <= 1 / INFEASIBLE_ABOVE**2 else u / left


def _scaled_bounds(bounds: np.ndarray, lengths: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-hand sides ``(P, C)`` for rows of unit length, scaled to largest entry 1, and that scale ``(P, 1)``.

    A scale of 0 says that no constraint is violated without any change.
    """
    b = bounds / lengths
    b[:, k] = 0
    size = np.maximum(b.max(axis=1, keepdims=True), 0)
    return b / np.where(size > 0, size, 1), size


def _solve_class(constraints: Constraints, bounds: np.ndarray, k: int) -> tuple[np.ndarray, float, bool, int]:
    """Multipliers of the unscaled constraints, residual, feasibility and sweeps of a class's program."""
    rows, lengths, gram = constraints
    b, size = _scaled_bounds(bounds[None], lengths, k)
    u, sweeps = np.zeros_like(b), 0
    if not size[0]:
        return u[0], 0.0, True, 0
    count, violations, residual = WORKING_SET, b, np.full(1, np.inf)
    outside = np.ones(b.shape[1], bool)
    while residual > CONVERGED and violations[0, outside].max(initial=0) > TOLERANCE and sweeps < MAX_SWEEPS:
        index = _working_sets(u, violations, count)[0]
        part, more = _descend_class(gram[np.ix_(index, index)].astype(np.float32), b[0, index].astype(np.float32))
        u, sweeps = np.zeros_like(u), sweeps + int(more)
        u[0, index] = part
        residual, violations = relative_gap(gram, u, b)
        outside = ~np.isin(np.arange(len(outside)), index)
        count += WORKING_SET
    if residual > CONVERGED:
        exact = least_distance(rows, b[0])
        if exact is not None:
            if proves_infeasible(rows, exact, b)[0]:
                return np.zeros_like(u[0]), np.inf, False, sweeps
            better, _ = relative_gap(gram, exact[None], b)
            if better < residual:
                u, residual = exact[None], better
    return u[0] * size[0] / lengths, float(residual[0]), True, sweeps


def _solve_samples(constraints: Constraints, bounds: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Norms of the programs of right-hand sides ``(n, C)``, and whether they are solved."""
    rows, lengths, gram = constraints
    b, size = _scaled_bounds(bounds, lengths, k)
    norms, solved = np.zeros(len(b)), size[:, 0] <= 0
    narrow = gram.astype(np.float32)
    todo = np.flatnonzero(~solved)
    for start in range(0, len(todo), TOGETHER):
        chunk = todo[start : start + TOGETHER]
        left, u, violations = chunk, np.zeros((len(chunk), len(gram))), b[chunk]
        for _ in range(ROUNDS):
            if not len(left):
                break
            index = _working_sets(u, violations, WORKING_SET)
            part = np.take_along_axis(u, index, 1), np.take_along_axis(b[left], index, 1)
            found = _descend_samples(narrow, index, *part)
            u[:] = 0
            np.put_along_axis(u, index, found, 1)
            residual, violations = relative_gap(gram, u, b[left])
            done = residual <= CONVERGED
            norms[left[done]] = np.sqrt(np.sum(u[done] * (b[left[done]] - violations[done]), axis=1))
            solved[left[done]] = True
            left, u, violations = left[~done], u[~done], violations[~done]
    while len(left := np.flatnonzero(~solved & (norms == 0))):
        first, *_ = left
        exact = least_distance(rows, b[first])
        if exact is not None and (hopeless := proves_infeasible(rows, exact, b[left]))[0]:
            norms[left[hopeless]], solved[left[hopeless]] = np.inf, True
            continue
        norms[first], solved[first] = _upper_bound(constraints, exact, b[first])
    return norms * np.where(np.isinf(norms), 1, size[:, 0]), solved


def _upper_bound(constraints: Constraints, u: np.ndarray | None, b: np.ndarray) -> tuple[float, bool]:
    """The norm of a program's solution, or a bound that is not too small, and whether it is the solution's."""
    if u is None:
        return np.inf, False
    residual, violations = relative_gap(constraints.gram, u[None], b[None])
    reach = b - violations[0]
    norm = float(np.linalg.norm(u @ constraints.rows))
    if residual[0] <= CONVERGED:
        return norm, True
    needed, room = b > 0, b <= 0
    if (reach[needed] <= 0).any():
        return np.inf, False
    factor = max(1.0, float((b[needed] / reach[needed]).max()))
    return (factor * norm if (factor * reach[room] >= b[room] - TOLERANCE).all() else np.inf), False


def _working_sets(u: np.ndarray, violations: np.ndarray, count: int) -> np.ndarray:
    """The constraints to solve a program for ``(P, count)``: those in use, then the most violated."""
    if count >= u.shape[1]:
        return np.broadcast_to(np.arange(u.shape[1]), u.shape)
    order = np.where(u > 0, -np.inf, -violations)
    return np.argpartition(order, count - 1, axis=1)[:, :count]


def _descend_samples(gram: np.ndarray, index: np.ndarray, start: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`_descend` for any number of programs, which are padded with zeros to two sizes."""
    count = len(b)
    pad = ((0, (FEW if count <= FEW else TOGETHER) - count), (0, 0))
    padded = (np.pad(part, pad) for part in (index.astype(np.int32), start.astype(np.float32), b.astype(np.float32)))
    return np.asarray(_descend(gram, *padded), np.float64)[:count]


@jax.jit
@full_precision
def _descend(gram: jax.Array, index: jax.Array, start: jax.Array, b: jax.Array) -> jax.Array:
    """Coordinate descent on ``u^T G u / 2 - b^T u``, ``u >= 0``, for many programs on working sets of one class.

    Args:
        gram: ``(C, C)``.
        index: ``(P, m)``, each program's constraints.
        start: ``(P, m)``.
        b: ``(P, m)``.

    Returns:
        u, ``(P, m)``.
    """
    grams = jnp.moveaxis(gram[index[:, :, None], index[:, None, :]], 0, -1)  # (m, m, P): programs on the fast axis
    b = b.T

    def coordinate(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        u, moved = carry
        new = jnp.maximum(u[i] + b[i] - jnp.sum(grams[i] * u, axis=0), 0)
        return u.at[i].set(new), jnp.maximum(moved, jnp.abs(new - u[i]))

    def sweep(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        u, _, count = carry
        return *jax.lax.fori_loop(0, len(b), coordinate, (u, jnp.zeros(b.shape[1]))), count + 1

    u, *_ = jax.lax.while_loop(
        lambda carry: (jnp.max(carry[1]) > TOLERANCE) & (carry[2] < SAMPLE_SWEEPS),
        sweep,
        (start.T, jnp.full(b.shape[1], jnp.inf), jnp.asarray(0)),
    )
    return u.T


@jax.jit
@full_precision
def _descend_class(gram: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multipliers of one program, and the sweeps that they took."""
    solver = BoxCDQP(maxiter=MAX_SWEEPS, tol=TOLERANCE, implicit_diff=False, unroll=False)
    eye = jnp.eye(len(b), dtype=bool)
    gram = jnp.where(eye, 1.0, gram)  # Zero rows, of class k and columns equal to its own.
    limits = jnp.zeros_like(b), jnp.full_like(b, jnp.inf)
    step = solver.run(_pivoted(gram, -b), params_obj=(gram, -b), params_ineq=limits)
    return step.params, step.state.iter_num


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
