"""What the compiler knows of primitives: one name, one line of one table.

Derivatives come from JAX, so a rule here says only what a primitive costs to run
again in a backward pass: CHEAP ones may follow a kept value, DEAR ones are kept or
rerun as a whole stage. Products, convolutions and factorisations are dear because
`passes.flops` counts them. To add a rule, add the name; a primitive that is in no
table is treated as dear and named in the plan, and `strict=True` makes it an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ELEMENTWISE = frozenset(
    {"abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2"}
    | {"atanh", "bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil"}
    | {"clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p"}
    | {"cos", "cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp"}
    | {"exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac", "imag"}
    | {"integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p", "log2"}
    | {"logistic", "lt", "lt_to", "max", "min", "mul", "ne", "neg", "nextafter", "not"}
    | {"one_minus_square", "or", "polygamma", "pow", "polynomial", "population_count"}
    | {"real", "rem", "round", "rsqrt", "select_n", "shift_left", "sign", "sin"}
    | {"shift_right_arithmetic", "shift_right_logical", "sinh", "sqrt", "square"}
    | {"stop_gradient", "sub", "tan", "tanh", "xor", "zeta", "real_to_complex"}
    | {"custom_jvp_call", "name", "random_gamma_grad", "igamma_grad_a"}
    | {"mwc_declared"}
)

STRUCTURAL = frozenset(
    {"broadcast_in_dim", "concatenate", "device_put", "dynamic_slice", "empty"}
    | {"dynamic_update_slice", "empty2", "expand_dims", "iota", "pad", "pbroadcast"}
    | {"pvary", "reshape", "rev", "sharding_constraint", "slice", "split", "squeeze"}
    | {"transpose", "unstack", "stack", "tile", "axis_index", "pcast", "reshard"}
    | {"layout_constraint", "mesh_cast"}
)

REDUCTION = frozenset(
    {"argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or"}
    | {"reduce_prod", "reduce_sum", "reduce_xor"}
)

RANDOM = frozenset(
    {"random_bits", "random_fold_in", "random_seed", "random_split", "random_unwrap"}
    | {"random_wrap", "random_clone", "threefry2x32", "rng_bit_generator"}
)

CHEAP = ELEMENTWISE | STRUCTURAL | REDUCTION | RANDOM

DEAR = frozenset(
    {"approx_top_k", "cond", "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"}
    | {"custom_linear_solve", "custom_vjp_call", "eig", "eigh", "fft", "gather"}
    | {"optimization_barrier", "reduce", "reduce_precision", "reduce_window"}
    | {"reduce_window_max", "reduce_window_min", "reduce_window_sum", "remat2"}
    | {"remat", "checkpoint", "rng_uniform", "scan", "scatter", "scatter-add"}
    | {"scatter-max", "scatter-min", "scatter-mul", "scatter-sub", "scatter_add"}
    | {"select_and_gather_add", "select_and_scatter", "select_and_scatter_add"}
    | {"schur", "shard_map", "sort", "top_k", "tridiagonal", "tridiagonal_solve"}
    | {"while", "all_gather", "all_to_all", "pmax", "pmin", "ppermute", "psum"}
    | {"psum2", "psum_invariant", "reduce_scatter", "all_gather_invariant", "pgather"}
    | {"debug_callback", "random_gamma", "lu_pivots_to_permutation", "jit", "pjit"}
    | {"hessenberg", "householder_product", "regularized_incomplete_beta", "custom_lin"}
    | {"moonwalk_call", "moonwalk_forward", "moonwalk_linear", "ragged_all_to_all"}
    | {"moonwalk_backward", "debug_print", "eval_jaxpr"}
)


def is_dear(eqn: Any, cost: Callable[[Any], float]) -> bool:
    """Whether an equation must not run again inside a backward pass."""
    return eqn.primitive.name not in CHEAP or cost(eqn) > 0


def is_unknown(eqn: Any, cost: Callable[[Any], float]) -> bool:
    """Whether no table has the equation's primitive."""
    name = eqn.primitive.name
    return name not in CHEAP and name not in DEAR and cost(eqn) == 0
