"""`policy=`: forced saves, as a user of `jax.checkpoint` expects them."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

import mwc

saves = jax.checkpoint_policies


def loss(params, x):
    for w in params:
        x = checkpoint_name(jnp.sin(x @ w), "sine") * 0.5
    return jnp.sum(x**2)


def operands(depth=12):
    keys = jax.random.split(jax.random.key(0), depth)
    return [jax.random.normal(k, (6, 6)) for k in keys], jnp.ones((4, 6))


def sines(fun, *args):
    """Sines in the differentiated program, after the compiler had its way."""
    compiled = jax.jit(jax.grad(fun)).lower(*args).compile()
    return compiled.as_text().count(" sine(")


@pytest.mark.parametrize(
    "policy",
    [
        saves.save_only_these_names("sine"),
        saves.everything_saveable,
        saves.nothing_saveable,
        saves.dots_saveable,
        saves.dots_with_no_batch_dims_saveable,
        saves.save_any_names_but_these("other"),
    ],
)
def test_gradients(policy):
    params, x = operands()
    ours = mwc.moonwalk_compile(loss, policy=policy, extra_forwards=2)
    found, wanted = jax.grad(ours)(params, x), jax.grad(loss)(params, x)
    for a, b in zip(found, wanted, strict=True):
        assert jnp.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_named_values_are_kept_and_not_run_again():
    params, x = operands()
    free = mwc.moonwalk_compile(loss, extra_forwards=2)
    kept = mwc.moonwalk_compile(
        loss, extra_forwards=2, policy=saves.save_only_these_names("sine")
    )
    sines_kept, sines_free = (sines(f, params, x) for f in (kept, free))
    assert sines_kept < sines_free
    more = kept.plan(params, x).residual_bytes - free.plan(params, x).residual_bytes
    assert more >= 12 * 4 * 6 * 4 - free.plan(params, x).residual_bytes


def test_offload_is_an_error():
    params, x = operands(2)
    policy = saves.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["sine"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    ours = mwc.moonwalk_compile(loss, policy=policy)
    with pytest.raises(mwc.MoonwalkError, match=r"offload(.|\n)*test_policy.py"):
        jax.grad(ours)(params, x)
