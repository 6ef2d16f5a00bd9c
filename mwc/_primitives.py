"""The four primitives through which a decorated function meets JAX.

    call       arguments                         ->  results
    forward    arguments                         ->  results, saved values
    linear     arguments, saved, tangents        ->  tangents of results
    backward   arguments, saved, cotangents      ->  cotangents of arguments

The JVP of `call` is `forward`, then `linear`; `linear` and `backward` are each
other's transpose. `linear` is lowered as JAX's ordinary JVP of the function, and
`backward` as the sweeps of its `Program`: reverse mode reaches the sweeps because
it transposes `linear`. Saved values are functions of the arguments, which are
inputs as well: their tangents are already accounted for and are dropped. The
derivative of `backward` is that of the mathematical gradient, never of the sweeps,
which round. The scheme is that of `jax.custom_derivatives.linear_call`, made
complete (batching, dead code, higher derivatives, forward mode).

Limits: differentiating `linear` in the arguments (grad of jvp) is JAX's own
derivative, checkpointed as a whole. A scan stacks the arguments as residuals; XLA
removes the stack where the sweeps ignore them.
"""

from __future__ import annotations

from mwc import _batching, _dead_code, _derivatives, _lanes
from mwc._site import backward_p, call_p, forward_p, linear_p
from passes import _jax

__all__ = ["backward_p", "call_p", "forward_p", "linear_p"]

_jax.register_rules(
    call_p,
    run=_lanes.runner(_lanes.call_lane),
    avals=_lanes.typed(_lanes.call_lane),
    emit=_lanes.evaluator(_lanes.call_lane),
    jvp=_derivatives.call_jvp,
    batch=_batching.batch_of(_batching.call_outputs),
)

_jax.register_rules(
    forward_p,
    run=_lanes.runner(_lanes.forward_lane),
    avals=_lanes.typed(_lanes.forward_lane),
    emit=_lanes.evaluator(_lanes.forward_lane),
    jvp=_derivatives.forward_jvp,
    batch=_batching.batch_of(_batching.forward_outputs),
    dce=_dead_code.forward_dce,
)

_jax.register_rules(
    linear_p,
    run=_lanes.runner(_lanes.linear_lane),
    avals=_lanes.linear_types,
    emit=_lanes.evaluator(_lanes.linear_lane),
    jvp=_derivatives.linear_jvp,
    batch=_batching.batch_of(_batching.linear_outputs),
    dce=_dead_code.linear_dce,
    transpose=_derivatives.transpose_of(linear=True),
)

_jax.register_rules(
    backward_p,
    run=_lanes.runner(_lanes.backward_lane),
    avals=_lanes.typed(_lanes.backward_lane),
    emit=_lanes.evaluator(_lanes.backward_lane),
    jvp=_derivatives.backward_jvp,
    batch=_batching.batch_of(_batching.backward_outputs),
    dce=_dead_code.backward_dce,
    transpose=_derivatives.transpose_of(linear=False),
)
