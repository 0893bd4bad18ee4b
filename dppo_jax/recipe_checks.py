"""What a recipe may not get wrong, checked before anything is built. Knows no gin.

The walk starts at the configured function and follows references the way a call would: a reference
brings its own scopes or inherits those it is called in, a macro is a scope of its own. Whatever
the walk does not reach has no effect, and is an error. The exception is layering: a value that a
later statement replaced still reaches, but only for bindings older than the replacement, so that an
overlay may choose another objective without having to undo the settings of the first.
"""

import difflib
import inspect
import math
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dppo_jax import annotations

MACRO = "gin.macro"
CONSTANT = "gin.constant"  # there is one: gin.REQUIRED
_IN_FORCE = sys.maxsize  # the statement that ends what nothing replaced


class ConfigError(ValueError):
    """A recipe or override that cannot be used: one line with the place and the binding."""


class Reference:
    """`@x`, `@x()` or `%x` inside a value."""

    configurable: Any  # .selector: full name; .wrapped: the function or class
    scopes: list[str]
    evaluate: bool

    def called_in(self, scope: list[str]) -> list[str]:
        """A scope of its own replaces the one it stands in; a bare `@x` is called in none."""
        return self.scopes or (scope if self.evaluate else [])


@dataclass
class Binding:
    """The value that one parameter, or one macro, has in one scope."""

    where: str  # file:line, or the flag of the command line
    name: str  # as written
    value: Any
    order: int  # its place among all statements read
    replaced: list[tuple[Any, int]] = field(default_factory=list)  # earlier values, ended when

    def __str__(self) -> str:
        if self.where.startswith("--gin."):
            return shorten(self.where)
        return f"{self.where}: {self.name} = {shorten(repr(self.value))}"


Bindings = dict[tuple[str, str], dict[str, Binding]]  # (scope, selector) -> parameter -> binding


def shorten(text: str) -> str:
    """At most a hundred characters of one line."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message: did you mean the name that looks most alike? Empty if none does."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def in_scope(bindings: Bindings, scope: list[str], selector: str) -> dict[str, list[Binding]]:
    """Bindings that a call in `scope` sees, by parameter; the last of each list applies."""
    seen: dict[str, list[Binding]] = {}
    for depth in range(len(scope) + 1):
        for name, binding in bindings.get(("/".join(scope[:depth]), selector), {}).items():
            seen.setdefault(name, []).append(binding)
    return seen


def check(bindings: Bindings, root: Any, given: Iterable[str], path: str) -> Iterator[tuple]:
    """Raises ConfigError, or yields the (scope, selector, parameter) of replaced parts' bindings.

    `root` is the configured function (as Reference.configurable), `given` the parameters that its
    caller supplies.
    """
    walk = _Walk(bindings)
    walk.call(root, [], _IN_FORCE, path, given)
    for (scope, selector), parameters in bindings.items():
        for name, binding in parameters.items():
            reached = walk.reached.get(id(binding), -1)
            if reached == _IN_FORCE:
                continue
            if binding.order > reached:
                raise ConfigError(_no_effect(binding, scope, selector, bindings))
            yield scope, selector, name


class _Walk:
    def __init__(self, bindings: Bindings):
        self.reached: dict[int, int] = {}  # id of a binding -> older ones than this are excused
        self._bindings = bindings
        self._called: dict[tuple[str, str, bool], int] = {}
        self._within: list[tuple[str, str, bool]] = []

    def call(
        self,
        configurable: Any,
        scope: list[str],
        until: int,
        caller: str,
        given: Iterable[str] | None = (),
    ) -> None:
        """Visits a call by what is in force until statement `until`; `given` None: all of it."""
        selector = configurable.selector
        key = ("/".join(scope), selector, given is None)
        current = until == _IN_FORCE
        if current and key in self._within:
            raise ConfigError(f"{caller}: refers to itself")
        if self._called.get(key, -1) >= until:
            return
        self._called[key] = until
        self._within.append(key)
        seen = in_scope(self._bindings, scope, selector)
        if current and given is not None:
            _require(configurable, {*seen, *given}, caller)
        hints = annotations.parameter_types(configurable.wrapped) if current else {}
        for name, layers in seen.items():
            for binding in layers:
                self.reached[id(binding)] = max(until, self.reached.get(id(binding), -1))
                for value, ended in [(binding.value, _IN_FORCE), *binding.replaced]:
                    self._follow(value, scope, min(until, ended), binding)
                if current and selector != MACRO:
                    self._fit(hints.get(name, Any), binding)
        self._within.pop()

    def _follow(self, value: Any, scope: list[str], until: int, binding: Binding) -> None:
        for reference in _references(value):
            target = reference.configurable
            if target.selector == CONSTANT:
                if until == _IN_FORCE:
                    name = binding.name
                    raise ConfigError(f"{binding}: required; set it, or give --gin.{name}=VALUE")
            elif target.selector == MACRO and not self._macro(reference):
                if until == _IN_FORCE:
                    name = "/".join(reference.scopes)
                    macros = (n for n, selector in self._bindings if selector == MACRO)
                    raise ConfigError(f"{binding}: no macro {name} is set{nearest(name, macros)}")
            else:
                given = () if reference.evaluate else None
                self.call(target, reference.called_in(scope), until, str(binding), given)

    def _macro(self, reference: Reference) -> dict[str, Binding]:
        return self._bindings.get(("/".join(reference.scopes), MACRO), {})

    def _fit(self, hint: Any, binding: Binding) -> None:
        """Blames the macro when the whole value is one, since that is the line to change."""
        blamed = binding
        while isinstance(blamed.value, Reference) and blamed.value.configurable.selector == MACRO:
            blamed = self._macro(blamed.value)["value"]
        value = self._plain(blamed.value)
        if not annotations.accepts(hint, value):
            use = "" if blamed is binding else f"{binding.name} "
            raise ConfigError(f"{blamed}: {use}wants {_wanted(hint, value)}")
        if any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in _leaves(value)):
            raise ConfigError(f"{blamed}: gin cannot write {value!r} back; bind a finite number")

    def _plain(self, value: Any) -> Any:
        """The value with macros replaced, and references by a stand-in for what they give."""
        if isinstance(value, Reference):
            if value.configurable.selector == MACRO:
                return self._plain(self._macro(value)["value"].value)
            function = value.configurable.wrapped
            return annotations.Result(function) if value.evaluate else function
        if isinstance(value, dict):
            return {self._plain(key): self._plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._plain(item) for item in value)
        return value


def _require(configurable: Any, present: set[str], caller: str) -> None:
    for parameter in parameters(configurable.wrapped).values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and parameter.name not in present:
            name = f"{configurable.selector}.{parameter.name}"
            raise ConfigError(f"{caller}: {name} is required and has no value")


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters by name; of builtins that do not tell, none."""
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:
        return {}


def _no_effect(binding: Binding, scope: str, selector: str, bindings: Bindings) -> str:
    if selector == MACRO:
        macros = (n for n, s in bindings if s == MACRO and n != scope)
        return f"{binding}: nothing uses this macro{nearest(scope, macros)}"
    called = f"{scope}/{selector}" if scope else selector
    return f"{binding}: no effect, nothing in force calls {called}"


def _wanted(hint: Any, value: Any) -> str:
    """The annotation, what came instead if that is not plain, and the usual cure."""
    wanted, given = annotations.describe(hint), type(value).__name__
    if isinstance(value, annotations.Result) or given in wanted:
        return wanted
    if typing.get_origin(hint) is typing.Literal:
        return wanted + nearest(str(value), [str(option) for option in typing.get_args(hint)])
    wanted += f", not {given}"
    if callable(value) and annotations.accepts(hint, annotations.Result(value)):
        return f"{wanted}; with () behind the name it is called"
    if isinstance(value, str):
        if value.lower() in ("true", "false", "none"):
            return f"{wanted}; write {value.capitalize()} without quotes"
        return f"{wanted}; a function or object is written @module.name"
    if isinstance(value, list):
        return f"{wanted}; a tuple is written (a, b)"
    return wanted


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _references(value: Any) -> Iterator[Reference]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Reference))
