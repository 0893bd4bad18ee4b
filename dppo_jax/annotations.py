"""Whether a configured value fits the annotation of the parameter that receives it.

Stricter than Python at run time and laxer than a type checker: what cannot be decided from the
value and the annotation alone (a protocol, an array type of a call's result) is accepted.
"""

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
    """Stands for what `function` returns when a value is the outcome of a call not made yet."""

    function: Callable[..., Any]


def parameter_types(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters of a function, or of the constructor of a class.

    Annotations that name what exists only for type checkers cannot be resolved; the function's
    parameters are then unchecked.
    """
    is_record = dataclasses.is_dataclass(function) or hasattr(function, "_fields")
    owner = function.__init__ if inspect.isclass(function) and not is_record else function
    try:
        return typing.get_type_hints(owner)
    except (NameError, TypeError):
        return {}


def describe(hint: Any) -> str:
    """An annotation as the source code would write it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(describe(option) for option in typing.get_args(hint))
    if hint in (None, types.NoneType):
        return "None"
    return inspect.formatannotation(hint).replace("collections.abc.", "").replace("typing.", "")


def accepts(hint: Any, value: Any) -> bool:
    """True when `value` may be given where `hint` is asked for."""
    if isinstance(hint, typing.NewType):
        return accepts(hint.__supertype__, value)
    if hasattr(hint, "__value__"):  # `type X = ...` of Python 3.12
        return accepts(hint.__value__, value)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(option, value) for option in options)
    if isinstance(value, Result):
        return _accepts_result(origin or hint, value.function)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in options)
    if hint is None:
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if (origin or hint) is collections.abc.Callable:
        return callable(value)
    if origin is None:
        return _is_instance(value, hint)
    return _accepts_container(origin, options, value)


def _accepts_container(origin: Any, options: tuple[Any, ...], value: Any) -> bool:
    if isinstance(value, str) or not _is_instance(value, origin):
        return False
    if isinstance(value, dict):
        key, item = options if len(options) == 2 else (Any, Any)
        return all(accepts(key, k) and accepts(item, v) for k, v in value.items())
    if origin is tuple and not (len(options) == 2 and options[1] is Ellipsis):
        return len(value) == len(options) and all(map(accepts, options, value))
    if isinstance(value, (tuple, list)) and options:
        return all(accepts(options[0], item) for item in value)
    return True


def _accepts_result(wanted: Any, function: Callable[..., Any]) -> bool:
    """A class gives instances of itself; a function gives what it is annotated to return."""
    if inspect.isclass(function):
        made: Any = function
    else:
        returned = parameter_types(function).get("return", Any)
        made = typing.get_origin(returned) or returned
    if not inspect.isclass(wanted) or not inspect.isclass(made) or wanted is object:
        return True
    if made is Any or getattr(wanted, "_is_protocol", False):
        return True
    if wanted is collections.abc.Callable:
        return made is collections.abc.Callable or any("__call__" in c.__dict__ for c in made.mro())
    return issubclass(made, wanted) or (wanted is float and made is int)


def _is_instance(value: Any, hint: Any) -> bool:
    if not inspect.isclass(hint) or getattr(hint, "_is_protocol", False) or hint is Any:
        return True
    return isinstance(value, hint)
