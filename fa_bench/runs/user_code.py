"""Find the user's code on which the results of a run depend: the files of plugins, the files that these import, and classes in
notebooks."""

from __future__ import annotations

import ast
import functools
import importlib.util
import site
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
#: The types of values that have the same `repr` in every process.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
#: The types, other than functions, of decorated functions, and the attributes in which they keep the function.
_WRAPPERS = (functools.cached_property, functools.singledispatchmethod, type(functools.lru_cache(len)))
_WRAPPED = ("__wrapped__", "func")


def source_files(modules: Iterable[str]) -> list[Path]:
    """The source files of the given modules, and of all modules that these import, directly or indirectly.

    The imports are read from the source code, including imports within functions. Imported modules of fa_bench are excluded, as
    are those of the standard library and of installed distributions, except for the packages in `modules`.
    """
    modules = list(modules)
    own = {name.partition(".")[0] for name in modules}
    files: dict[Path, None] = {}
    pending = [(name, Path(file)) for name in modules if (file := getattr(sys.modules.get(name), "__file__", None))]
    while pending:
        name, file = pending.pop(0)
        if file in files:
            continue
        files[file] = None
        is_package = file.name == "__init__.py"
        for imported in _imports(file.read_bytes(), name if is_package else name.rpartition(".")[0]):
            found = _file_of(imported)
            if found is not None and (_is_own(found) or (imported.partition(".")[0] in own and _PACKAGE not in found.parents)):
                pending.append((imported, found))
    return list(files)


@functools.lru_cache(maxsize=256)
def _imports(source: bytes, package: str) -> tuple[str, ...]:
    """The names of the modules that source code may import, and of the packages that contain them."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # edited since it was imported
        return ()
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            except ImportError:  # beyond the top-level package
                continue
            names += [base or "", *(f"{base}.{alias.name}" for alias in node.names)]
    parents = (name.rsplit(".", depth)[0] for name in names for depth in range(name.count("."), -1, -1))
    return tuple(dict.fromkeys(filter(None, parents)))


def _file_of(name: str) -> Path | None:
    """The source file of a module, found without importing the module; None if there is no such file."""
    spec, path = None, None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        if depth > 1 and path is None:  # not a package: the last part is a name in a module
            return None
        try:
            spec = PathFinder.find_spec(".".join(parts[:depth]), path)
        except (
            ImportError,
            ValueError,
            OSError,
            KeyError,
            AttributeError,
        ):  # namespace packages ask sys.modules for their parent
            return None
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _is_own(file: Path) -> bool:
    """Whether a file belongs to the user, and not to Python, to an installed distribution or to this package."""
    parents = set(file.resolve().parents)
    return not parents & _installed() and _PACKAGE not in parents and not {"site-packages", "dist-packages"} & set(file.parts)


@functools.lru_cache(maxsize=1)
def _installed() -> set[Path]:
    paths = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    return {Path(path).resolve() for path in (*paths, *site.getsitepackages(), site.getusersitepackages()) if path}


def class_parts(classes: Iterable[type]) -> Iterator[str]:
    """Yield strings that change with the code of classes without a source file, such as classes in a notebook. They cover the
    functions, classes and plain values that this code uses from the same module, including decorated functions."""
    seen: set[int] = set()
    for cls in classes:
        if not hasattr(sys.modules.get(cls.__module__), "__file__"):
            yield from _parts(cls, cls.__module__, seen)


def _parts(value: Any, module: str, seen: set[int]) -> Iterator[str]:
    if id(value) in seen:
        return
    if isinstance(value, (list, dict)):
        seen.add(id(value))  # it may contain itself
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif isinstance(value, (tuple, list, frozenset, set)):
        ordered = sorted(value, key=repr) if isinstance(value, (frozenset, set)) else value
        for item in ordered:
            yield from _parts(item, module, seen)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield repr(key) if isinstance(key, _PLAIN) else ""
            yield from _parts(item, module, seen)
    elif isinstance(value, types.CodeType):
        yield from (value.co_code.hex(), *value.co_names, *value.co_varnames)
        yield from _parts(value.co_consts, module, seen)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _parts(value.__func__, module, seen)
    elif isinstance(value, property):
        yield from _parts((value.fget, value.fset, value.fdel), module, seen)
    elif isinstance(value, types.CellType):
        with suppress(ValueError):  # it is empty
            if not isinstance(value.cell_contents, (list, dict, set)):  # these are state, such as a decorator's cache
                yield from _parts(value.cell_contents, module, seen)
    elif isinstance(value, (functools.partial, functools.partialmethod)):
        yield from _parts((value.func, value.args, value.keywords), module, seen)
    elif isinstance(value, _WRAPPERS):  # such as cached_property, or the result of lru_cache
        seen.add(id(value))
        yield from _parts(tuple(vars(value).get(name) for name in _WRAPPED), module, seen)
    elif isinstance(value, types.FunctionType) and value.__module__ == module:
        seen.add(id(value))
        yield from _parts((value.__code__, value.__defaults__, value.__kwdefaults__), module, seen)
        yield from _parts(value.__closure__ or (), module, seen)  # a decorator keeps the decorated function there
        for name in _global_names(value.__code__):
            if name in value.__globals__:
                yield name
                yield from _parts(value.__globals__[name], module, seen)
    elif isinstance(value, type) and value.__module__ == module:
        seen.add(id(value))
        for base in value.__mro__[1:]:
            yield from _parts(base, module, seen)
        for name, item in vars(value).items():
            if name not in ("__doc__", "__dict__", "__weakref__", "__module__", "__firstlineno__", "__static_attributes__"):
                yield name
                yield from _parts(item, module, seen)


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
