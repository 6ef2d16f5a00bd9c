"""Small models of public libraries, for the tests that decorate them unchanged.

Each builder returns a `Case`: `loss(model, x, rest)` with its arguments. Build them in
float64 mode.
"""

import functools

import equinox as eqx
import flax.linen as nn

from tests.models import linen, modules, plain

CASES = {
    "linen-mlp-dropout": linen.linen_mlp_dropout,
    "linen-cnn-batch-norm": linen.linen_cnn_batch_norm,
    "linen-lstm": functools.partial(linen.linen_rnn, nn.LSTMCell),
    "linen-gru": functools.partial(linen.linen_rnn, nn.GRUCell),
    "linen-transformer": linen.linen_transformer,
    "linen-transformer-remat": functools.partial(
        linen.linen_transformer, nn.remat(linen.Block)
    ),
    "linen-tied-weights": linen.linen_tied_weights,
    "linen-scan": linen.linen_scan,
    "scanned-transformer": linen.scanned_transformer,
    "nnx-batch-norm": modules.nnx_batch_norm,
    "eqx-mlp": modules.eqx_mlp,
    "eqx-cnn": modules.eqx_cnn,
    "eqx-unet": modules.eqx_unet,
    "eqx-lstm": functools.partial(modules.eqx_scan, eqx.nn.LSTMCell),
    "eqx-gru": functools.partial(modules.eqx_scan, eqx.nn.GRUCell),
    "mixed-precision": plain.mixed_precision,
    "weight-maps": plain.weight_maps,
    "nested-jit": plain.nested_jit,
    "cond": plain.with_cond,
    "custom-vjp": plain.with_custom_vjp,
    "gated-residual": plain.gated_residual,
}
