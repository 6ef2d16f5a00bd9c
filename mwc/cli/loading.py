"""From a name on the command line to a function: `net.py:loss`, `pkg.net:Model.loss`.

A file is a module of its own, or part of the package that its folder is; in either
case its folder, as for `python net.py`, or that of the package comes first on the path.
A module is found from the current folder too, as for `python -m`.

Limits: the module is imported, and with it all that it does at its top level; one
that asks for arguments of its own should do so under `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mwc.cli.running import place
from mwc.errors import MoonwalkError, MoonwalkTypeError, MoonwalkValueError

FORM = "FILE_OR_MODULE:FUNCTION, as in net.py:loss or package.net:Model.loss"


@dataclass(frozen=True)
class Named:
    """A function with the name it was asked for by.

    Attributes:
      module: where it was found.
      where: the file or module as the user wrote it.
      name: its name there, with dots between attributes.
      function: the function.
    """

    module: ModuleType
    where: str
    name: str
    function: Callable[..., Any]

    def beside(self, text: str) -> Named:
        """Another function: of the same module unless `text` names one."""
        where, colon, name = text.rpartition(":")
        if colon and where != self.where:
            return load(text)
        return Named(self.module, self.where, name, _attribute(self, name))

    def has(self, name: str) -> bool:
        """Whether the module itself has such a function."""
        return callable(getattr(self.module, name, None))


def load(text: str) -> Named:
    """Imports a module and finds a function in it.

    Args:
      text: `FILE_OR_MODULE:FUNCTION`; attributes of classes and objects after dots.

    Returns:
      The function.

    Raises:
      MoonwalkValueError: there is no such file, module or attribute, or the text has
        another form.
      MoonwalkTypeError: the attribute is not a function.
      MoonwalkError: the module raises when it is imported.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise MoonwalkValueError(f"{text!r} names no function", expected=FORM)
    is_file = where.endswith(".py") or os.sep in where
    module = (_file if is_file else _module)(where)
    found = Named(module, where, name, lambda: None)
    return Named(module, where, name, _attribute(found, name))


def _attribute(named: Named, name: str) -> Callable[..., Any]:
    found: Any = named.module
    for part in name.split("."):
        if not hasattr(found, part):
            raise MoonwalkValueError(
                f"{named.where} has no {name!r}", remedy=_remedy(found, part)
            )
        found = getattr(found, part)
    if not callable(found):
        raise MoonwalkTypeError(
            f"{name} of {named.where} is of type {type(found).__name__}",
            expected="a function",
        )
    return found


def _remedy(holder: Any, name: str) -> str | None:
    """Names that are near, else those that the user defined there."""
    names = [n for n in dir(holder) if not n.startswith("_")]
    own = [n for n in names if _is_own(holder, getattr(holder, n))]
    close = difflib.get_close_matches(name, names, 3) or own[:8]
    return f"it has {', '.join(close)}" if close else None


def _is_own(holder: Any, value: Any) -> bool:
    # A decorated function has the module of what it wraps.
    home = getattr(value, "__module__", None)
    known = not isinstance(holder, ModuleType) or home == holder.__name__
    return callable(value) and known and not inspect.isclass(value)


def _file(where: str) -> ModuleType:
    path = pathlib.Path(where)
    if not path.is_file():
        raise MoonwalkValueError(f"there is no file {where!r}", expected=FORM)
    path = path.resolve()
    folder, parts = path.parent, [path.stem]
    while (folder / "__init__.py").is_file():
        folder, parts = folder.parent, [folder.name, *parts]
    _put_first(str(folder))
    if len(parts) > 1:
        return _imported(where, lambda: importlib.import_module(".".join(parts)))
    return _imported(where, lambda: _alone(path))


def _alone(path: pathlib.Path) -> ModuleType:
    """Runs a file that is in no package."""
    # Its own name may be that of a module of Python, as `types.py` is.
    name = path.stem if path.stem not in sys.modules else f"_mwc_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise MoonwalkValueError(f"{path.name} is no Python file", expected=FORM)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module(where: str) -> ModuleType:
    _put_first(os.getcwd())
    return _imported(where, lambda: importlib.import_module(where))


def _put_first(folder: str) -> None:
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)


def _imported(where: str, importer: Callable[[], ModuleType]) -> ModuleType:
    try:
        # Standard output is for results.
        with contextlib.redirect_stdout(sys.stderr):
            return importer()
    except MoonwalkError:
        raise
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and (where == missing or where.startswith(f"{missing}.")):
            raise MoonwalkValueError(
                f"there is no module {missing!r}", expected=FORM
            ) from error
        first = (str(error).strip().splitlines() or [""])[0]
        raise MoonwalkError(
            f"importing {where} raised {type(error).__name__}: {first}",
            source=place(error),
        ) from error
