"""Arguments as text: `f32[64,512]`, `{"w": f32[512,512], "b": f32[512]}`, `9*f32[8]`.

    argument = [NAME "="] value            a name makes it a keyword argument
    value    = array | key | repeat | list | tuple | dict | constant
    array    = DTYPE "[" [INT {"," INT}] "]"        f32[64,512], bf16[8], bool[]
    key      = "key" ["[" ... "]"]                  PRNG keys: key, key[8]
    repeat   = INT "*" value                        so many entries of the list or tuple
                                                    that it is in, else a list of them
    list     = "[" [value {"," value}] "]"
    tuple    = "(" [value {"," value}] ")"          (x,) has one entry
    dict     = "{" [KEY ":" value {"," KEY ":" value}] "}"
    constant = number | string | True | False | None

A DTYPE is written as JAX prints it (f32, i8, u32, bf16, c64, bool) or in full
(float32). A KEY is a string, an integer or a bare name. It is read by hand: nothing
is evaluated.

Limits: dictionaries, lists and tuples are all the containers there are; named tuples
and modules come from a function (`--inputs`).
"""

from __future__ import annotations

import ast
import re
from typing import Any, NamedTuple, NoReturn

from mwc.errors import MoonwalkValueError

MOST_REPEATS = 100_000

_TOKEN = re.compile(
    r"""(?P<number>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<string>"([^"\\]|\\.)*"|'([^'\\]|\\.)*')
      | (?P<mark>[][(){},:*=])
      | (?P<bad>\S)""",
    re.VERBOSE | re.ASCII,
)
_WHOLE = re.compile(r"[0-9]+")
_SHORT = re.compile(r"(bf|f|i|u|c)(\d\w*)")
_LONG = {"bf": "bfloat", "f": "float", "i": "int", "u": "uint", "c": "complex"}
_CONSTANTS = {"True": True, "False": False, "None": None}


class _Token(NamedTuple):
    kind: str
    text: str
    column: int


def read(text: str) -> tuple[str | None, Any]:
    """Reads an argument.

    Args:
      text: as above.

    Returns:
      Its name, None of a positional argument, and its value: a tree whose arrays are
      `jax.ShapeDtypeStruct`s.

    Raises:
      MoonwalkValueError: the text is not in the grammar, with the column, or a dtype
        is unknown or needs JAX_ENABLE_X64.
    """
    try:
        return _Reader(text).argument()
    except RecursionError:
        raise MoonwalkValueError(
            "an argument has more brackets in brackets than can be read",
            remedy="make it in a function, and name that with --inputs",
        ) from None


class _Reader:
    """One text, read from left to right."""

    def __init__(self, text: str):
        self.text = text
        self.tokens = [
            _Token(m.lastgroup or "", m[0], m.start() + 1)
            for m in _TOKEN.finditer(text)
        ]
        self.at = 0

    @property
    def now(self) -> _Token:
        if self.at < len(self.tokens):
            return self.tokens[self.at]
        return _Token("end", "the end", len(self.text) + 1)

    def next(self) -> _Token:
        token, self.at = self.now, self.at + 1
        return token

    def takes(self, mark: str) -> bool:
        """Whether a mark is next, which is then read."""
        found = self.now.kind == "mark" and self.now.text == mark
        self.at += found
        return found

    def needs(self, mark: str) -> None:
        if not self.takes(mark):
            self.refuse(f"{mark!r}")

    def refuse(self, expected: str, token: _Token | None = None) -> NoReturn:
        token = token or self.now
        found = token.text if token.kind == "end" else repr(token.text)
        raise MoonwalkValueError(
            f"the argument {_shown(self.text)} has {found} at column {token.column}",
            expected=expected,
        )

    def argument(self) -> tuple[str | None, Any]:
        name = None
        if [t.text for t in self.tokens[1:2]] == ["="] and self.now.kind == "name":
            name, self.at = self.now.text, 2
        value = self.value()
        if self.now.kind != "end":
            self.refuse("nothing more; repeats are written 64*f32[8,8]")
        return name, value

    def value(self) -> Any:
        """A value by itself, where a repeat is a list."""
        count, value = self.entry()
        return value if count is None else [value] * count

    def entry(self) -> tuple[int | None, Any]:
        """A value, and how often it is repeated."""
        token = self.next()
        if token.kind == "number":
            if self.takes("*"):
                return self.count(token), self.value()
            return None, _number(token.text)
        if token.kind == "string":
            return None, self.string(token)
        if token.kind == "name":
            return None, self.named(token)
        if token.text == "[":
            return None, self.items("]")[0]
        if token.text == "(":
            return None, self.tuple()
        if token.text == "{":
            return None, self.dict()
        self.refuse("an array such as f32[64,512], a list, a dict or a number", token)

    def count(self, token: _Token) -> int:
        if not _WHOLE.fullmatch(token.text) or int(token.text) > MOST_REPEATS:
            self.refuse(f"a whole number up to {MOST_REPEATS} before '*'", token)
        return int(token.text)

    def string(self, token: _Token) -> str:
        try:
            return ast.literal_eval(token.text)
        except (SyntaxError, ValueError):
            self.refuse("a string as Python writes it", token)

    def named(self, token: _Token) -> Any:
        if token.text in _CONSTANTS:
            return _CONSTANTS[token.text]
        if token.text == "key":
            return _keys(self.shape() if self.takes("[") else ())
        if not self.takes("["):
            self.refuse("a shape after the dtype: f32[64,512], or f32[] of a scalar")
        return self.array(token, self.shape())

    def shape(self) -> tuple[int, ...]:
        sizes: list[int] = []
        while not self.takes("]"):
            if sizes:
                self.needs(",")
            token = self.next()
            if not _WHOLE.fullmatch(token.text):
                self.refuse("a dimension, a whole number", token)
            sizes.append(int(token.text))
        return tuple(sizes)

    def array(self, token: _Token, shape: tuple[int, ...]) -> Any:
        import jax
        import jax.numpy as jnp

        found = _SHORT.fullmatch(token.text)
        name = _LONG[found[1]] + found[2] if found else token.text
        try:
            dtype = jnp.dtype(name)
        except TypeError:
            dtype = None
        if dtype is None or not _is_array_type(dtype):
            self.refuse("a dtype: f32, bf16, f16, i32, u8, bool, c64, ...", token)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise MoonwalkValueError(
                f"the argument {_shown(self.text)} asks for {token.text}",
                expected="32 bits, which is what JAX computes with by default",
                remedy="set JAX_ENABLE_X64=1 for 64 bits",
            )
        return jax.ShapeDtypeStruct(shape, dtype)

    def items(self, end: str) -> tuple[list[Any], bool]:
        """What is in a list or tuple, and whether a comma is last."""
        found: list[Any] = []
        comma = True
        while not self.takes(end):
            if not comma:
                self.refuse(f"',' or {end!r}")
            count, value = self.entry()
            found += [value] * (1 if count is None else count)
            comma = self.takes(",")
        return found, comma

    def tuple(self) -> Any:
        start = self.at
        found, comma = self.items(")")
        alone = len(found) == 1 and not comma and self.tokens[start + 1].text != "*"
        return found[0] if alone else tuple(found)

    def dict(self) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        while not self.takes("}"):
            if found:
                self.needs(",")
                if self.takes("}"):
                    break
            key = self.key()
            self.needs(":")
            found[key] = self.value()
        return found

    def key(self) -> Any:
        token = self.next()
        if token.kind == "string":
            return self.string(token)
        if token.kind == "name":
            return token.text
        if not re.fullmatch(r"-?\d+", token.text):
            self.refuse("a key: a string, a name or an integer", token)
        return int(token.text)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _is_array_type(dtype: Any) -> bool:
    import jax.numpy as jnp

    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_))


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _keys(shape: tuple[int, ...]) -> Any:
    import jax

    dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    return jax.ShapeDtypeStruct(shape, dtype)
