"""Probe: is a linear map diagonal, or a multiple of an isometry? Run it once and see.

A pairwise (max, min) written with slices, where and concatenate moves numbers, and so
does sorting; a Cayley map of a parameter is orthogonal; a leaky ReLU multiplies by one
of two slopes. None of this is seen from the equations one by one, but all of it shows
when the map is run on random values: for random residuals and random h,

    coisometric:  J(P(h)) = c h        diagonal:  P(h) = P(1) h

hold to rounding, or fail by far (these are polynomial identities in h, so a random h
that satisfies one by chance has probability zero). Residuals come from running the
stage's own forward on random inputs, which meets every branch of a kink many times:
where only branches matter, large and small numbers are drawn, for a threshold may be
anywhere (and near ones besides, where large ones overflow); single numbers, counts and
keys differ from draw to draw. All zeros, as in rows that pad a batch, are looked at
besides: a kink may be flat there.
What is found is *steady* if it rests on nothing but constants and on which branch was
taken, so that it holds for every parameter and every input; slopes that depend on
values do not. Where every operation is elementwise, a few thousand independent elements
stand for the whole array. Source: Schwartz-Zippel, as in Freivalds' check of matrix
products.
Limits: branches that random inputs never take are not seen; whoever rebuilds with what
was found checks the result. Kernels that the CPU does not have are not run, nor what
talks to other devices: a map is run on one device, whatever mesh it is for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes import _jax
from passes.apart import apart
from passes.flops import eqn_flops
from passes.graph import Graph, Var, astype, evaluate, is_var, nbytes, read, size
from passes.linearise import Linear
from passes.sizes import is_symbolic
from passes.table import ELEMENTWISE

_MOST_BYTES = 2**28  # of the values that a probe makes
_MOST_FLOPS = 2e10
_POINTS = 4096
_LEAST = 64  # numbers that are looked at
_COUNTS = 4  # integers are drawn from 0 to 3
_CHEAP_BYTES = 2**24
_LEVELS = 0.0, 0.5
_WIDE = 8  # draws that are enough where each looks at many numbers


@dataclasses.dataclass(frozen=True)
class Probed:
    """What was seen.

    Attributes:
      scale: c where P^T P = c I, else None.
      diagonal: whether P is diagonal.
      zeros: whether some of the diagonal is zero.
      amplification: root mean square of the diagonal times that of its inverse.
      steady: whether the map depends on constants and branches alone.
      ties: whether it is no isometry where all of the state is one number.
    """

    scale: float | None
    diagonal: bool
    zeros: bool
    amplification: float
    steady: bool
    ties: bool = False


def probe(
    linear: Linear, eqns: Sequence[Any], source: Var, target: Var
) -> Probed | None:
    """Runs a stretch of a backward on random values.

    Args:
      linear: the derivative of a stage.
      eqns: equations of `linear.bwd`.
      source: the cotangent that they read.
      target: the cotangent that they make of it.

    Returns:
      What was seen; None where it is too large or cannot be run by itself.
    """
    fwd, bwd = linear.fwd, linear.bwd
    if not size(source):
        # On no numbers every map is an isometry.
        return Probed(1.0, True, False, 1.0, True)
    read = bwd.inputs_of([target], [source]) - {source}
    pairs = zip(linear.residuals, linear.residual_inputs, strict=True)
    need = [(r, v) for r, v in pairs if v in read]
    atoms = [r for r, _ in need]
    todo = [*(fwd.eqns[i] for i in fwd.needed(atoms)), *eqns]
    inputs = [v for v in fwd.inputs_of(atoms) if v not in linear.consts]
    points = all(map(_is_pointwise, todo)) and _keeps_shape(eqns, source)
    # An array that is always the same has no independent elements.
    met = {v for v in (*atoms, *(v for e in todo for v in e.invars)) if is_var(v)}
    points = points and not any(_rank(v) for v in met & {*linear.consts})
    fixed = met & {*linear.consts} & {*fwd.invars}
    bytes_ = sum(nbytes(v) for e in todo for v in e.outvars) + sum(map(nbytes, inputs))
    work = sum(eqn_flops(e).total for e in todo)
    large = not points and (bytes_ > _MOST_BYTES or work > _MOST_FLOPS)
    if large or any(e.effects for e in todo):
        return None
    ends = [*inputs, *(v for e in todo for v in e.outvars)]
    symbols = any(is_symbolic(n) for v in ends for n in v.aval.shape)
    symbols = symbols or any(e.primitive.name == "dim_as_value" for e in todo)
    if symbols:
        return None
    run_graph = _at_points if points else evaluate

    rng = np.random.default_rng(zlib.crc32(b"probe"))
    steady = _steady(linear, atoms)
    # A single number is a multiple of an isometry whatever its slope, and so is an
    # array with one gain for all of it: draw again, of another size. A map that rests
    # on no input is one map.
    # What a number is spread to meets every branch in one draw, and is dear to draw:
    # two such sums over random branches agree to rounding less than once in ten.
    most = _WIDE if size(target) >= _POINTS else _LEAST
    draws = max(1 if steady else 2, min(most, -(-_LEAST // size(source))))
    if any(size(v) < _LEAST for v in inputs):
        # A count, a key, one threshold for all: each draw sees one value of it.
        draws = max(draws, _WIDE if points or bytes_ < _CHEAP_BYTES else 2)
    draws = draws if inputs else 1

    def look_at_all() -> tuple[list[list[float]], list[list[float]]]:
        there = _off_mesh(fwd, fwd.needed(atoms))
        back = _off_mesh(bwd, bwd.needed([target], [source]))

        def run(made: list[Any], h: Any) -> tuple[Any, ...]:
            env = {**linear.consts, **dict(zip(inputs, made, strict=True))}
            values = run_graph(there, env, atoms)
            fine = _is_finite(env.values())
            pairs = zip(need, values, strict=True)
            known = linear.consts | {v: astype(x, v) for (_, v), x in pairs}

            def pull(h: Any) -> Any:
                return run_graph(back, {**known, source: h}, [target])[0]

            return *_images(pull, h), fine

        # At points each operation is compiled once for all programs, and with arrays
        # that are fixed once for all of these; no need for jit.
        look = _Look(run if points or fixed else jax.jit(run))
        rows = []
        for draw in range(draws):
            drawn = _Draw(rng, draw, points, steady)
            made = [drawn(v.aval) for v in inputs]
            h = _Draw(rng, 0, points, False)(source.aval)
            row, fine = look(made, h)
            rows.append(row)
            if steady and not fine:
                # Where large numbers overflow, all elements may take one branch.
                near = _Draw(rng, draw, points, False)
                rows.append(look([near(v.aval) for v in inputs], h)[0])
        return rows, [look([_level(x, at) for x in made], h)[0] for at in _LEVELS]

    try:
        rows, level = apart(look_at_all)
    except (NotImplementedError, RuntimeError, ValueError):
        return None  # a kernel of another platform
    except NameError:
        return None  # a collective, whose axis is not there
    with np.errstate(all="ignore"):
        return _judged(np.array(rows, np.float64), level, source, steady)


def _judged(
    rows: np.ndarray, level: list[list[float]], source: Var, steady: bool
) -> Probed:
    """What was seen of a map on several draws, and where all numbers are one."""
    scales, lost, crossed, square, inverse, least = rows.T
    scale = float(scales[0])
    eps = float(jnp.finfo(source.aval.dtype).eps)
    close = max((64 if eps < 1e-4 else 8) * eps, 1e-12)
    same = np.max(np.abs(scales - scale)) <= close * scale
    known = bool(same and np.max(lost) <= close and scale > 0)
    diagonal = bool(np.max(crossed) <= close)
    # Where all is zero, as in rows that pad a batch, a kink may be flat.
    flat = diagonal and steady and level[0][-1] == 0
    known = known and not flat
    zeros = bool(np.min(least) == 0) or flat
    growth = math.inf if zeros else math.sqrt(np.mean(square) * np.mean(inverse))
    return Probed(
        scale=rounded(scale, sharp(eps) if steady else eps) if known else None,
        diagonal=diagonal,
        zeros=zeros,
        amplification=growth,
        steady=steady,
        ties=bool(known and not max(lost for _, lost, *_ in level) <= close),
    )


def _off_mesh(graph: Graph, at: Sequence[int]) -> Graph:
    """Some of the equations of a graph, off the mesh that they are placed on."""
    eqns = tuple(_jax.off_mesh(graph.eqns[i]) for i in at)
    return Graph(graph.invars, graph.outvars, eqns)


class _Look:
    """Looks at a map: scale, what J P h misses of it, and the rest of `_seen`."""

    def __init__(self, run: Callable[..., Any]):
        self._run = run

    def __call__(self, made: list[Any], h: Any) -> tuple[list[float], bool]:
        # By NumPy, to which these are no programs to compile, and in double precision:
        # a scale is used again in every stage of a run.
        *arrays, fine = [np.asarray(x) for x in (h, *self._run(made, h))]
        wide = np.complex128 if any(map(np.iscomplexobj, arrays)) else np.float64
        with np.errstate(all="ignore"):
            return _seen(*(x.astype(wide) for x in arrays)), bool(fine)


def _is_finite(values: Iterable[Any]) -> Any:
    """Whether no number among some values has overflowed."""
    fine = [jnp.isfinite(x).all() for x in values if _is_inexact(x)]
    return functools.reduce(jnp.logical_and, fine, jnp.array(True))


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, np.inexact)


def _level(x: Any, at: float) -> Any:
    """An array in which everything ties."""
    if not _is_inexact(x):
        return x
    return jnp.asarray(np.full(x.shape, at, x.dtype))


def _images(pull: Callable[[Any], Any], h: Any) -> tuple[Any, Any, Any]:
    """P h, J P h and P(1)."""
    out, push = jax.vjp(pull, h)
    # The adjoint: JAX's transpose of a complex map does not conjugate.
    return out, jnp.conj(push(jnp.conj(out))[0]), pull(jnp.ones_like(h))


def _seen(h: Any, out: Any, again: Any, ones: Any) -> list[float]:
    """c, what J P h misses of c h, what P h misses of P(1) h, moments of P(1)."""
    scale = float(np.vdot(h, again).real / np.vdot(h, h).real)
    lost = float(np.max(np.abs(again - scale * h)) / np.max(np.abs(h)))
    if ones.shape != h.shape:
        return [scale, lost, math.inf, 0.0, 0.0, 0.0]
    largest = max(float(np.max(np.abs(out))), float(np.finfo(np.float32).tiny))
    apart = float(np.max(np.abs(out - ones * h))) / largest
    square = np.abs(ones) ** 2
    moments = square.mean(), (1 / square).mean(), square.min()
    return [scale, lost, apart, *map(float, moments)]


def sharp(eps: float) -> float:
    """`eps` of `rounded` for what rests on constants: they are as they are.

    A number that was rounded may be near a ratio, and each stage would be off by what
    is between them.
    """
    return max(eps / 16, 1e-13)


def rounded(scale: float, eps: float) -> float:
    """A ratio of small integers that a sum of random products came close to."""
    for bottom in (1, 2, 3, 4, 6, 8, 9, 12, 16):
        top = round(scale * bottom)
        if top and abs(scale * bottom / top - 1) < 8 * eps:
            return top / bottom
    return scale


def _steady(linear: Linear, atoms: Sequence[Any]) -> bool:
    """Whether values depend on inputs through bools and integers alone."""
    fwd = linear.fwd
    branches = [
        v
        for eqn in fwd.eqns
        for v in eqn.outvars
        if not jnp.issubdtype(v.aval.dtype, jnp.inexact)
    ]
    left = fwd.inputs_of([a for a in atoms if is_var(a)], branches) - {*branches}
    return not left & ({*fwd.invars} - {*linear.consts})


def _is_pointwise(eqn: Any) -> bool:
    """Whether an equation does the same at every element, or spreads a value."""
    name = eqn.primitive.name
    if name == "broadcast_in_dim" or name in _jax.PLACING:
        return True
    same = all(_rank(v) in (0, len(eqn.outvars[0].aval.shape)) for v in eqn.invars)
    return name in ELEMENTWISE - {"custom_jvp_call", "bitcast_convert_type"} and same


def _keeps_shape(eqns: Sequence[Any], source: Var) -> bool:
    """Whether a stretch takes its cotangent from element to element."""
    path = {source}
    for eqn in eqns:
        if any(is_var(v) and v in path for v in eqn.invars):
            path.update(eqn.outvars)
    return all(v.aval.shape == source.aval.shape for v in path)


def _rank(atom: Any) -> int:
    return len(atom.aval.shape)


def _at_points(graph: Graph, env: dict[Var, Any], outputs: Sequence[Any]) -> list[Any]:
    """`evaluate` with every array replaced by a vector of independent elements."""
    env.update({v: _spread(x) for v, x in env.items() if _rank(v)})
    for i in graph.needed(outputs, env):
        eqn = graph.eqns[i]
        values = [read(env, v) for v in eqn.invars]
        if eqn.primitive.name == "broadcast_in_dim":
            outs = [_spread(values[0])]
        else:
            values = [
                _spread(x) if _rank(v) else x
                for v, x in zip(eqn.invars, values, strict=True)
            ]
            outs = _jax.bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(env, v) for v in outputs]


def _spread(x: Any) -> Any:
    return x if jnp.ndim(x) == 1 else jnp.broadcast_to(jnp.ravel(x)[:1], (_POINTS,))


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Random arrays of one draw.

    Attributes:
      rng: where they come from.
      draw: the number of the draw; single numbers differ from one to the next.
      points: whether arrays are vectors of independent elements.
      wide: whether some numbers are large and some small: thresholds may be
        anywhere, but what is smooth, or solves, wants numbers near one.
    """

    rng: np.random.Generator
    draw: int
    points: bool
    wide: bool

    def __call__(self, aval: Any) -> Any:
        """An array of a type."""
        rng, dtype = self.rng, aval.dtype
        shape = (_POINTS,) if self.points and aval.shape else aval.shape
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            keys = jax.random.split(jax.random.key(self.draw), max(1, math.prod(shape)))
            return keys.reshape(shape)
        if jnp.issubdtype(dtype, jnp.inexact):
            found = rng.standard_normal(shape, np.float32)
            if jnp.issubdtype(dtype, jnp.complexfloating):
                found = found + 1j * rng.standard_normal(shape, np.float32)
            return jnp.asarray(found * self._sizes(shape), dtype)
        most = 2 if dtype == jnp.bool_ else _COUNTS
        if math.prod(shape) == 1:
            return jnp.full(shape, self.draw % most, dtype)
        return jnp.asarray(rng.integers(0, most, shape), dtype)

    def _sizes(self, shape: tuple[int, ...]) -> Any:
        sizes = np.full(shape, 1 + 0.7 * (self.draw % 2))
        if not self.wide:
            return sizes
        if math.prod(shape) == 1:
            return sizes * (1, 1e3, 1e-3)[self.draw % 3]
        far = 10.0 ** self.rng.uniform(-3, 3, shape)
        return np.where(self.rng.integers(0, 2, shape), far, sizes)
