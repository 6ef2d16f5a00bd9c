"""The cache of one decorated function: a call in, a bound primitive out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mwc import _trace
from mwc._explicit import NotOnAutoAxes, mesh_of, on_auto_axes
from mwc._options import Options
from mwc._primitives import call_p
from mwc._site import Site
from mwc._spec import Spec
from mwc._trace import Signature, is_array, is_number, unwrap, wrap
from mwc.errors import MoonwalkUnsupportedError
from passes import _jax

# More shapes than this for one function, and the programs are made again.
_MOST_SPECS = 256


class Entry(NamedTuple):
    """What is kept for one trace.

    Attributes:
      site: the place of the primitive, with the spec; None if the function has to be
        left as it is.
      out_tree: the structure of the results.
      has_static: whether some results are not arrays.
    """

    site: Site | None
    out_tree: Any
    has_static: bool

    @property
    def spec(self) -> Spec:
        """The function as traced."""
        assert self.site is not None
        return self.site.spec


class Shared:
    """What a decorated function and its bound methods have in common."""

    def __init__(
        self,
        fun: Callable[..., Any],
        signature: Signature,
        options: Options,
        argnums: int | tuple[int, ...],
        has_aux: bool,
    ):
        self.fun = fun
        self.signature = signature
        self.options = options
        self.argnums = argnums
        self.has_aux = has_aux
        self.entries: dict[Any, Entry] = {}
        self._explicit: set[Site] = set()  # those that cannot be on Auto axes
        self.jitted = self.jit(lambda *a, **k: wrap(fun(*unwrap(a), **unwrap(k))))
        self.gradients: dict[tuple[int, bool], Any] = {}

    def jit(self, fun: Callable[..., Any]) -> Any:
        return jax.jit(
            functools.wraps(self.fun, updated=())(fun),
            static_argnums=self.signature.static_nums or None,
            static_argnames=self.signature.static_names or None,
        )

    def checkpointed(self, *args: Any, **kwargs: Any) -> Any:
        """The function under `jax.checkpoint`, which takes arrays only."""
        nums = {n % len(args) for n in self.signature.static_nums}
        names = self.signature.static_names
        fixed = {i: x for i, x in enumerate(args) if i in nums}
        named = {k: x for k, x in kwargs.items() if k in names}

        def run(moving: list[Any], rest: dict[str, Any]) -> Any:
            given = iter(unwrap(moving))
            full = [fixed[i] if i in fixed else next(given) for i in range(len(args))]
            return wrap(self.fun(*full, **unwrap(rest), **named))

        moving = [x for i, x in enumerate(args) if i not in fixed]
        rest = {k: x for k, x in kwargs.items() if k not in named}
        return unwrap(jax.checkpoint(run)(wrap(moving), wrap(rest)))

    def prepared(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """Arguments fit for jit, and the leaves that it traces."""
        signature = self.signature
        dynamic = args, kwargs
        if signature.static_nums or signature.static_names:
            signature.check_static(args, kwargs)
            dynamic = signature.dynamic(args, kwargs)
        leaves = jax.tree.leaves(dynamic)
        if not any(is_number(leaf) or not is_array(leaf) for leaf in leaves):
            return args, kwargs, leaves
        for leaf in leaves:
            if not is_array(leaf):
                signature.check_hashable("a leaf of the arguments", leaf)
        nums = {n % len(args) for n in signature.static_nums if n < len(args)}
        args = tuple(a if i in nums else wrap(a) for i, a in enumerate(args))
        names = signature.static_names
        kwargs = {k: v if k in names else wrap(v) for k, v in kwargs.items()}
        return args, kwargs, jax.tree.leaves(wrap(dynamic))

    def entry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bound: int
    ) -> tuple[Entry, list[Any]]:
        """What is kept for a call, and the values that the function captured."""
        with _trace.explained(self.signature):
            traced = self.jitted.trace(*args, **kwargs)
        captured = _jax.captured(traced)
        # Jit gives the same jaxpr, the key here, for the same shapes and settings.
        found = self.entries.get(traced.jaxpr)
        if found is not None:
            return found, captured
        if len(self.entries) >= _MOST_SPECS:
            self.entries.clear()
            self._explicit.clear()
        foreign = _jax.outlives(traced)
        if foreign:
            self._refuse_if_strict(foreign)
            left = Entry(None, traced.out_tree, False)
            self.entries[traced.jaxpr] = left
            return left, captured
        indices = _trace.positions(self.argnums, args, self.signature, bound)
        jaxpr = _jax.hoisted(traced)
        roles = ["data"] * len(captured)
        roles += self.roles(args, kwargs, {*range(bound), *indices})
        same = _jax.constants(traced)
        build = functools.partial(_build, jaxpr, tuple(roles), self.options, same)
        name, source = self.signature.name, self.signature.source
        site = Site(Spec(jaxpr, build, name=name, source=source))
        made = Entry(site, traced.out_tree, _trace.has_static(traced.out_tree))
        self.entries[traced.jaxpr] = made
        return made, captured

    def _refuse_if_strict(self, foreign: str) -> None:
        if self.options.strict:
            raise MoonwalkUnsupportedError(
                f"{self.signature.name} uses {foreign}, which no plan can rebuild",
                remedy="pass values in and out, or leave strict out: the function is "
                "then differentiated as if undecorated",
                source=self.signature.source,
            )

    def spec(self, args: tuple[Any, ...], kwargs: dict[str, Any], bound: int) -> Spec:
        """The spec of a call, for whoever wants its plan."""
        full, named, leaves = self.prepared(args, kwargs)
        entry, _ = self.entry(full, named, bound)
        if entry.site is None:
            raise MoonwalkUnsupportedError(
                f"{self.signature.name} has no plan: it uses values that outlive it, "
                "and is differentiated as if undecorated",
                remedy="pass values in and out instead of mutating them",
                source=self.signature.source,
            )
        if mesh_of(entry.spec.in_avals) is not None:
            return self._spec_where_used(full, named, leaves, bound)
        return entry.spec

    def _spec_where_used(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: Sequence[Any],
        bound: int,
    ) -> Spec:
        """The spec of a call, on the mesh axes on which it is differentiated."""
        seen: list[Spec] = []

        def see(entry: Entry, flat: Sequence[Any]) -> list[Any]:
            seen.append(entry.spec)
            return self._bind(entry, flat)

        def call(leaves: Sequence[Any]) -> None:
            self.used(*self._refilled(args, kwargs, leaves), leaves, bound, see)

        jax.jit(call).trace(leaves)
        return seen[-1]

    def roles(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], indices: set[int]
    ) -> list[str]:
        """The role of each traced leaf; those of `indices` are parameters."""
        static = {n % len(args) for n in self.signature.static_nums if n < len(args)}
        roles = []
        for index, arg in enumerate(args):
            if index not in static:
                role = "parameter" if index in indices else "data"
                roles += [role] * len(jax.tree.leaves(arg))
        _, dynamic = self.signature.dynamic(args, kwargs)
        return roles + ["data"] * len(jax.tree.leaves(dynamic))

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bound: int
    ) -> Any:
        if _jax.jit_disabled():
            # As jit does then: plain Python, in which values can be looked at.
            return self.fun(*args, **kwargs)
        full, named, leaves = self.prepared(args, kwargs)
        entry, outs = self.used(full, named, leaves, bound, self._bind)
        if entry.site is None:
            return self.fun(*args, **kwargs)
        out = jax.tree.unflatten(entry.out_tree, outs)
        return unwrap(out) if entry.has_static else out

    def _bind(self, entry: Entry, flat: Sequence[Any]) -> list[Any]:
        with _trace.unescaped(self.signature):
            return call_p.bind(*flat, site=entry.site, jaxpr=entry.spec.jaxpr)

    def used(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: Sequence[Any],
        bound: int,
        use: Callable[[Entry, Sequence[Any]], list[Any]],
        more: Callable[[Spec], Sequence[Any]] = lambda spec: (),
    ) -> tuple[Entry, list[Any]]:
        """What is kept for a call, and what `use` makes of it and of its flat arrays.

        Where arrays are split over Explicit mesh axes, `use` is called on Auto ones if
        the function can be.

        Args:
          args: the positional arguments, prepared.
          kwargs: the keyword arguments, prepared.
          leaves: the leaves that are traced.
          bound: the number of bound arguments.
          use: gives the function's results, and more; not called without a plan.
          more: types of what else `use` gives.
        """
        entry, captured = self.entry(args, kwargs, bound)
        if entry.site is None:
            return entry, []
        leaves = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]
        spec = entry.spec
        mesh = mesh_of(spec.in_avals)
        if mesh is not None and entry.site not in self._explicit:

            def inside(leaves: Sequence[Any]) -> list[Any]:
                again = self._refilled(args, kwargs, leaves)
                try:
                    inner, captured = self.entry(*again, bound)
                except Exception as error:
                    # Of whatever kind: on the explicit mesh it was traced.
                    raise NotOnAutoAxes from error
                return use(inner, [*captured, *leaves])

            try:
                like = [*spec.out_avals, *more(spec)]
                return entry, on_auto_axes(mesh, inside, leaves, like)
            except NotOnAutoAxes:
                self._explicit.add(entry.site)
        return entry, use(entry, [*captured, *leaves])

    def _refilled(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: Sequence[Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Prepared arguments with other leaves that are traced."""
        tree = jax.tree.structure(self.signature.dynamic(args, kwargs))
        kept, named = jax.tree.unflatten(tree, leaves)
        nums = {n % len(args) for n in self.signature.static_nums if n < len(args)}
        rest = iter(kept)
        full = (x if i in nums else next(rest) for i, x in enumerate(args))
        return tuple(full), kwargs | named


def _build(
    jaxpr: Any, roles: tuple[str, ...], options: Options, captured: Sequence[Any]
) -> Any:
    # The engine imports much that a function never differentiated does not need.
    from mwc import _engine

    return _engine.build(jaxpr, roles, options, captured)
