"""Arguments as text: what is written is read, and nothing else is."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mwc.cli import shapes
from mwc.cli.filling import filled
from mwc.errors import MoonwalkValueError

DTYPES = {
    "f32": jnp.float32,
    "bf16": jnp.bfloat16,
    "f16": jnp.float16,
    "f8_e4m3fn": jnp.float8_e4m3fn,
    "i8": jnp.int8,
    "u32": jnp.uint32,
    "c64": jnp.complex64,
    "bool": jnp.bool_,
    "float32": jnp.float32,
}


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@st.composite
def arrays(draw):
    name = draw(st.sampled_from(sorted(DTYPES)))
    sizes = draw(st.lists(st.integers(0, 10**6), max_size=3))
    gap = draw(st.sampled_from(["", " "]))
    text = f"{name}{gap}[{f',{gap}'.join(map(str, sizes))}]"
    return text, shape(*sizes, dtype=DTYPES[name])


def constants():
    numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    plain = st.none() | st.booleans() | numbers | st.text(max_size=5)
    return plain.map(lambda x: (repr(x), x))


def joined(pairs, marks, make):
    texts, values = [p[0] for p in pairs], [p[1] for p in pairs]
    comma = "," if len(pairs) == 1 and marks == "()" else ""
    return f"{marks[0]}{', '.join(texts)}{comma}{marks[1]}", make(values)


@st.composite
def dicts(draw, children):
    keys = st.text(max_size=4) | st.integers()
    found = draw(st.dictionaries(keys, children, max_size=3))
    text = ", ".join(f"{key!r}: {value[0]}" for key, value in found.items())
    return "{" + text + "}", {key: value[1] for key, value in found.items()}


def containers(children):
    many = st.lists(children, max_size=3)
    return (
        many.map(lambda pairs: joined(pairs, "[]", list))
        | many.map(lambda pairs: joined(pairs, "()", tuple))
        | dicts(children)
        | st.tuples(st.integers(0, 5), children).map(
            lambda pair: (f"{pair[0]}*{pair[1][0]}", [pair[1][1]] * pair[0])
        )
    )


def nested(pair):
    """A repeat in a list is entries of it: brackets make it one."""
    return (f"[{pair[0]}]", pair[1]) if re.match(r"\d+\*", pair[0]) else pair


@settings(deadline=None, max_examples=150)
@given(st.recursive(arrays() | constants(), lambda c: containers(c.map(nested))))
def test_what_is_written_is_read(pair):
    text, value = pair
    assert shapes.read(text) == (None, value)
    assert repr(shapes.read(text)[1]) == repr(value)  # 1, 1.0 and True are equal
    assert shapes.read(f"name = {text}") == ("name", value)


@settings(deadline=None, max_examples=300)
@given(st.text("f32i8key[](){}:,*= \"'\\-+.eTrueNone²٣x", max_size=12))
def test_anything_else_is_refused_in_words(text):
    try:
        shapes.read(text)
    except MoonwalkValueError as error:
        said = str(error)
    else:
        return
    assert "the argument" in said
    assert "expected: " in said


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3*f32[2]", [shape(2)] * 3),
        ("[f32[2], 2*f32[3], f32[]]", [shape(2), shape(3), shape(3), shape()]),
        ("(1*f32[2])", (shape(2),)),
        ("(f32[2])", shape(2)),
        ("(2*[f32[2]],)", ([shape(2)], [shape(2)])),
        ("2*3*1", [[1, 1, 1], [1, 1, 1]]),
        ('{"a": 2*f32[1], b: i32[], 3: ()}', None),
        ("[f32[2], ]", [shape(2)]),
        ("0*f32[2]", []),
        ("+3", 3),
    ],
)
def test_repeats_and_brackets(text, value):
    if value is None:
        value = {"a": [shape(1)] * 2, "b": shape(dtype=jnp.int32), 3: ()}
    assert shapes.read(text) == (None, value)


def test_keys_have_jax_s_own_dtype():
    key = jax.eval_shape(jax.random.key, 0)
    assert shapes.read("key") == (None, key)
    _, many = shapes.read("key[4]")
    assert (many.shape, many.dtype) == ((4,), key.dtype)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "the end at column 1"),
        ("f32", "f32[] of a scalar"),
        ("f33[2]", "'f33' at column 1"),
        ("str[2]", "a dtype"),
        ("f32[2", "the end at column 6"),
        ("f32[-1]", "a dimension"),
        ("f32[1.5]", "a dimension"),
        ("f32[2]*3", "64*f32[8,8]"),
        ("1.5*f32[2]", "a whole number"),
        ("100001*f32[2]", "100000"),
        ("[f32[1] f32[2]]", "','"),
        ("{1.5: 2}", "a key"),
        ("__import__('os')", "'(' at column 11"),
        ("f32[2], " * 100, "',' at column 7"),
        ("f64[2]", "JAX_ENABLE_X64"),
        ("'a' 'b'", "nothing more"),
        ("[" * 3000, "--inputs"),
    ],
)
def test_bad_texts_say_where_and_what(text, word):
    with pytest.raises(MoonwalkValueError, match=re.escape(word)) as caught:
        shapes.read(text)
    assert len(str(caught.value)) < 400


@pytest.mark.usefixtures("x64")
def test_64_bits_where_jax_has_them():
    assert shapes.read("f64[2]") == (None, shape(2, dtype=jnp.float64))


def test_shapes_are_filled_by_seed():
    tree = {
        "w": shape(64, 32),
        "label": shape(50, dtype=jnp.int32),
        "mask": shape(50, dtype=jnp.bool_),
        "z": shape(3, dtype=jnp.complex64),
        "small": shape(2, dtype=jnp.bfloat16),
        "key": shapes.read("key[3]")[1],
        "mode": "relu",
        "kept": jnp.ones(2),
    }
    one, two, other = filled(tree, 0), filled(tree, 0), filled(tree, 1)
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, tree)
    assert all(one[k].dtype == tree[k].dtype for k in tree if k != "mode")
    assert one["mode"] == "relu"
    assert one["kept"] is tree["kept"]
    assert set(one["label"].tolist()) == {0, 1}
    assert 0.5 / 8 < float(one["w"].std()) < 2 / 8
    for name in ("w", "label", "z"):
        assert jnp.array_equal(one[name], two[name])
        assert not jnp.array_equal(one[name], other[name])
    assert jax.random.key_data(one["key"]).tolist() != (
        jax.random.key_data(other["key"]).tolist()
    )
