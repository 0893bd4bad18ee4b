"""Recipes: gin-config 0.5.0, with the mistakes that gin accepts in silence made errors.

A recipe is a .gin file. Every one begins with `from __gin__ import dynamic_registration`, imports
modules of the package, and binds parameters of one function and of the objects handed to it.
That function's signature is the schema; nothing in the library is decorated.

Gin parses, scopes and writes the texts. What is done here in its place: reading the statements one
by one, so that every message can name file and line and an `include` is found from any directory;
the checks of recipe_checks.py; and the calls. `@x()` calls the plain `x`, once, and `@x` hands over
the plain `x`, in a `functools.partial` if it has bindings. Gin's own wrapper would look bindings up
again at every call, could not be pickled for a worker process, and rewrites the exceptions that
pass through it.

Gin's state is global: loading a recipe forgets the one before.
"""

import copy
import functools
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser

from dppo_jax import recipe_checks
from dppo_jax.recipe_checks import MACRO, Binding, Bindings, ConfigError, nearest, shorten
from dppo_jax.recipe_files import display, find_include, find_recipe

_DYNAMIC = "__gin__.dynamic_registration"
_BARE_WORD = re.compile(r"[\w./~][\w./~:+=@-]*")
_loaded: "Recipe | None" = None  # the one that gin's global state belongs to


class Recipe:
    """A parsed and checked configuration of `function`. Made by `load_recipe`."""

    def __init__(self, path: Path, function: Callable[..., Any]):
        self.path = path
        self.function = function
        self._bindings: Bindings = {}
        self._config_text = ""
        self._operative_config_text: str | None = None

    def arguments(self, *names: str, given: Iterable[str] = ()) -> dict[str, Any]:
        """Keyword arguments of the function, objects built: all that are bound, or `names`.

        `names` without a binding have their defaults. `given` are the caller's own: left out here
        and of the operative text.
        """
        if _loaded is not self:
            raise RuntimeError(f"another recipe was loaded after {self.path}")
        gin_config._OPERATIVE_CONFIG.clear()
        parameters = recipe_checks.parameters(self.function)
        skip = {*given, *(set(parameters) - set(names) if names else ())}
        found = self._evaluate(gin_config._INVERSE_REGISTRY[self.function], skip)
        self._operative_config_text = gin.operative_config_str()
        return {name: parameters[name].default for name in names} | found

    def call(self, **given: Any) -> Any:
        """Calls the function with its configuration; `given` wins over what is bound."""
        return self.function(**self.arguments(given=given), **given)

    def config_text(self) -> str:
        """What was asked for: every binding, overrides included, as one file."""
        return self._config_text

    def operative_config_text(self) -> str:
        """What is in force: bindings and defaults of all that `arguments` called; replayable."""
        if self._operative_config_text is None:
            raise RuntimeError("operative_config_text() is known once arguments() has been called")
        return self._operative_config_text

    def _evaluate(
        self, configurable: Any, skip: Iterable[str] = (), called: bool = True
    ) -> dict[str, Any]:
        """Bindings in the current scope, evaluated and entered into gin's operative record.

        The defaults of what is called here are entered too. A function that is only handed over
        will be called by others, perhaps with positions that a recorded default would occupy.
        """
        scope, selector = gin.current_scope(), configurable.selector
        seen = recipe_checks.in_scope(self._bindings, scope, selector)
        bound = {name: layers[-1] for name, layers in seen.items() if name not in skip}
        operative = {
            name: parameter.default
            for name, parameter in recipe_checks.parameters(configurable.wrapped).items()
            if called and parameter.default is not parameter.empty and name not in skip
        }
        operative |= {name: binding.value for name, binding in bound.items()}
        record = gin_config._OPERATIVE_CONFIG.setdefault(("/".join(scope), selector), {})
        record.update(operative)
        values = {}
        for name, binding in bound.items():
            try:
                values[name] = copy.deepcopy(binding.value)
            except ConfigError:
                raise
            except (ValueError, TypeError, OSError) as error:
                raise ConfigError(f"{binding}: {_first_line(error)}") from error
        return values


def load_recipe(
    path: str | Path,
    function: Callable[..., Any],
    overrides: Sequence[str] = (),
    given: Sequence[str] = (),
    overlays: Sequence[str] = (),
) -> Recipe:
    """Reads a recipe for `function` and the overrides ("NAME=VALUE"), checks and locks them.

    `given` names the parameters that the caller supplies, so that they need no binding. `overlays`
    are .gin files read after the recipe, found from here or as the recipe's own includes are.
    """
    global _loaded
    _loaded = None
    _forget()
    recipe = Recipe(find_recipe(Path(path)), function)
    reader = _Reader(recipe)
    reader.read_file(recipe.path)
    for overlay in overlays:
        here = Path(overlay)
        found = here if here.is_file() else find_include(overlay, [recipe.path], "over the recipe")
        reader.read_file(found.resolve())
    reader.read_overrides(overrides)
    if function not in gin_config._INVERSE_REGISTRY:
        name = f"{function.__module__}.{function.__name__}"
        raise ConfigError(f"{display(recipe.path)}: binds no parameter of {name}")
    root = gin_config._INVERSE_REGISTRY[function]
    shown = display(recipe.path)
    for scope, selector, name in list(recipe_checks.check(recipe._bindings, root, given, shown)):
        for bindings in (recipe._bindings, gin_config._CONFIG):
            del bindings[scope, selector][name]
            if not bindings[scope, selector]:
                del bindings[scope, selector]
    gin.finalize()
    recipe._config_text = gin.config_str()
    _loaded = recipe
    return recipe


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--gin.NAME=VALUE` from a command line: ("NAME=VALUE" of each, all the rest)."""
    overrides = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
    for override in overrides:
        if not re.fullmatch(r"[\w./]+=.+", override, re.DOTALL):
            raise ConfigError(f"--gin.{override}: write --gin.NAME=VALUE, no spaces around the =")
    return overrides, [a for a in arguments if not a.startswith("--gin.")]


def bindings(text: str, name: str) -> dict[str, str]:
    """What a configuration text binds, as it is written; `name` is for errors."""
    return {
        _written(statement): " ".join(repr(statement.value).split())
        for statement in _statements(text, name, _Verbatim())
        if isinstance(statement, config_parser.BindingStatement)
    }


def difference(asked: str, stored: str, there: str = "in the stored run") -> str | None:
    """One line with the first bindings in which two configuration texts differ; None: in none.

    `there` says where the second is from.
    """
    ours = bindings(asked, "the asked configuration")
    theirs = bindings(stored, "the stored one")
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    parts = [
        f"{name} is {shorten(ours.get(name, 'unset'))} here"
        f" and {shorten(theirs.get(name, 'unset'))} {there}"
        for name in names[:3]
    ]
    if len(names) > 3:
        parts.append(f"and {len(names) - 3} more")
    return "; ".join(parts) or None


class _Reference(gin_config.ConfigurableReference, recipe_checks.Reference):
    """Evaluated by `copy.deepcopy`, as in gin, but through no wrapper."""

    recipe: Recipe

    def __eq__(self, other: object) -> bool:
        # Gin compares what it wrote, read back as its own class, with this one.
        return isinstance(other, gin_config.ConfigurableReference) and (
            (self.configurable, self.scopes, self.evaluate)
            == (other.configurable, other.scopes, other.evaluate)
        )

    __hash__ = gin_config.ConfigurableReference.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        function = self.configurable.wrapped
        with gin.config_scope(self.called_in(gin.current_scope())):
            bound = self.recipe._evaluate(self.configurable, called=self.evaluate)
            if self.evaluate:
                return function(**bound)
        return functools.partial(function, **bound) if bound else function


class _Delegate(gin_config.ParserDelegate):
    """Makes the references of a recipe."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self._recipe = recipe

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> _Reference:
        _resolve(scoped_selector.rsplit("/", 1)[-1])
        reference = _Reference(scoped_selector, evaluate)
        reference.recipe = self._recipe
        return reference

    def macro(self, name: str) -> _Reference:
        if name in ("REQUIRED", "gin.REQUIRED"):
            return self.configurable_reference(f"gin.REQUIRED/{recipe_checks.CONSTANT}", True)
        return self.configurable_reference(f"{name}/{MACRO}", True)


class _Verbatim(config_parser.ParserDelegate):
    """Leaves references as the text that they are."""

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> "_Text":
        return _Text(f"@{scoped_selector}{'()' * evaluate}")

    def macro(self, name: str) -> "_Text":
        return _Text(f"%{name}")


class _Text(str):
    __repr__ = str.__str__  # no quotes


class _Reader:
    """Carries the statements of files and command line into gin and the recipe's bindings."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._open: list[Path] = []
        self._count = 0
        self._imports: dict[str, config_parser.ImportStatement] = {}

    def read_file(self, path: Path) -> None:
        """Reads a file and, where they stand, the files that it includes."""
        self._open.append(path)
        shown = display(path)
        # Gin keeps the names that a file imports to that file.
        with gin_config._parse_scope() as context:
            for statement in _statements(
                path.read_text(encoding="utf-8"), shown, _Delegate(self._recipe)
            ):
                where = f"{shown}:{statement.location.line_num}"
                if not context.imports and getattr(statement, "module", None) != _DYNAMIC:
                    raise ConfigError(
                        f"{where}: begin with from __gin__ import dynamic_registration"
                    )
                try:
                    self._read(statement, where, context)
                except ImportError as error:
                    raise ConfigError(f"{where}: {_first_line(error)}") from error
            gin_config._IMPORTS.update(context.imports)
        self._open.pop()

    def read_overrides(self, overrides: Sequence[str]) -> None:
        """Reads "NAME=VALUE" with all names that the files import (the outermost file's first).

        A bare word that is no gin value is a string, as shells eat quotes; where a string does not
        fit, the check of types says so.
        """
        with gin_config._parse_scope() as context:
            for statement in self._imports.values():
                context.process_import(statement)
            for override in overrides:
                name, _, value = override.partition("=")
                where = f"--gin.{override}"
                try:
                    list(_statements(f"{name} = {value}\n", where, _Verbatim()))
                except ConfigError as error:
                    if not _BARE_WORD.fullmatch(value):
                        quoted = f"--gin.{name}=\"'...'\""
                        raise ConfigError(
                            f"{shorten(where)}: not a gin value; a string with blanks or symbols"
                            f" needs quotes inside the shell's: {quoted}"
                        ) from error
                    value = repr(value)
                for statement in _statements(f"{name} = {value}\n", where, _Delegate(self._recipe)):
                    self._read(statement, where, context)

    def _read(self, statement: Any, where: str, context: gin_config.ParseContext) -> None:
        match statement:
            case config_parser.IncludeStatement():
                self.read_file(find_include(statement.filename, self._open, where))
            case config_parser.ImportStatement():
                context.process_import(statement)
                self._imports.setdefault(statement.bound_name(), statement)
            case config_parser.BindingStatement():
                self._bind(statement, where)

    def _bind(self, statement: config_parser.BindingStatement, where: str) -> None:
        scope, selector, name, value, _ = statement
        if not name:  # NAME = value
            scope, selector, name = f"{scope}/{selector}".lstrip("/"), MACRO, "value"
        configurable = _resolve(selector, where)
        accepted = recipe_checks.parameters(configurable.wrapped)
        if name not in accepted and all(p.kind is not p.VAR_KEYWORD for p in accepted.values()):
            raise ConfigError(
                f"{where}: {selector} has no parameter {name}{nearest(name, accepted)}"
            )
        gin.bind_parameter((scope, selector, name), value)
        self._count += 1
        bound = self._recipe._bindings.setdefault((scope, configurable.selector), {})
        binding = Binding(where, _written(statement), value, self._count)
        if name in bound:
            binding.replaced = [*bound[name].replaced, (bound[name].value, self._count)]
        bound[name] = binding


def _written(statement: config_parser.BindingStatement) -> str:
    name = (
        f"{statement.selector}.{statement.arg_name}" if statement.arg_name else statement.selector
    )
    return f"{statement.scope}/{name}" if statement.scope else name


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _resolve(selector: str, where: str = "") -> Any:
    """Gin's configurable of that name, registered if need be; `where` prefixes the message."""
    prefix = where and f"{where}: "
    context = gin_config._parse_context()
    symbol, *rest = selector.split(".")
    if symbol not in context._symbol_table:
        raise ConfigError(
            f"{prefix}{symbol} is not imported{nearest(symbol, context._symbol_table)}"
        )
    value = context._symbol_table[symbol]
    for name in rest:
        if not hasattr(value, name):
            owner = getattr(value, "__name__", symbol)
            raise ConfigError(f"{prefix}{owner} has no {name}{nearest(name, dir(value))}")
        value = getattr(value, name)
    if not callable(value):
        raise ConfigError(f"{prefix}{selector} is not a function or class")
    return context.get_configurable(selector)


def _statements(text: str, name: str, delegate: Any) -> Iterator[Any]:
    """Gin's statements of a text, its errors made one line; `name` is a file or a flag."""
    parser = None
    try:
        parser = config_parser.ConfigParser(text, delegate)
        yield from parser
    except SyntaxError as error:
        unread = re.search(r"Failed to parse token '(.*)'", error.msg)
        message = f"cannot read {unread[1]}; strings need quotes." if unread else error.msg
        text = shorten(error.text or "")
        raise ConfigError(f"{name}:{error.lineno}: syntax: {message} In: {text}") from error
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise ConfigError(f"{name}:{line}: syntax: {message}") from error
    except (ValueError, TypeError) as error:  # a reference that does not resolve
        line = f":{parser.current_token.start[0]}" if parser and not name.startswith("--") else ""
        raise ConfigError(f"{name}{line}: {_first_line(error)}") from error


def _forget() -> None:
    """Clears gin, its registry too: it would keep the import spelling of the last recipe."""
    gin.clear_config()
    for function, configurable in list(gin_config._INVERSE_REGISTRY.items()):
        if configurable.import_source and configurable.module != "gin":
            del gin_config._INVERSE_REGISTRY[function]
            gin_config._REGISTRY.pop(configurable.selector)
