"""Typed config sections and strict YAML: the machinery below `xopd.config`, free of any field.

A section is a frozen dataclass whose fields are bool, int, float, str, `str | None` or a StrEnum;
`Annotated[int, Range(...)]` gives a number its range and the string below a field is its help.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml

from xopd.errors import UserError

MAX_FILE_BYTES = 1_000_000
_MAX_YAML_DEPTH = 4  # a config is section -> field -> scalar; anything deeper is a mistake
_TRUE_FALSE = {"true": True, "false": False}
_NULL = ("null", "none", "~")


class ConfigError(UserError):
    """A config file, override or value that cannot be used; the message names the field."""


class Range(NamedTuple):
    """Allowed values of a number: an interval, closed unless an end is marked open."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    def contains(self, value: float) -> bool:
        """Whether the value lies in the interval."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"{left}{self.low:.12g}, {self.high:.12g}{right}"


class FieldSpec(NamedTuple):
    """What one field takes."""

    name: str  # "loss.text_weight"
    kind: type
    optional: bool
    allowed: Range | None
    default: object  # dataclasses.MISSING where the field is required

    @property
    def leaf(self) -> str:
        """Name inside its section."""
        return self.name.rpartition(".")[2]

    @property
    def takes(self) -> str:
        """Type and range in words, for help and errors."""
        if issubclass(self.kind, StrEnum):
            text = " | ".join(str(member) for member in self.kind)
        else:
            text = self.kind.__name__ + (f" in {self.allowed}" if self.allowed else "")
        return text + (" or null" if self.optional else "")


@dataclass(frozen=True)
class Section:
    """Base of the sections: converts and checks each field when the section is built."""

    def __post_init__(self) -> None:
        for spec in field_specs(type(self)):
            value = _convert(spec, getattr(self, spec.leaf))
            object.__setattr__(self, spec.leaf, value)  # the one way to normalise a frozen field


def parse_text(spec: FieldSpec, text: str) -> object:
    """Text of an override as the value that YAML would have held, by the type of the field."""
    if spec.optional and text.lower() in _NULL:
        return None
    if spec.kind is bool:
        return _TRUE_FALSE.get(text.lower(), text)
    if spec.kind is int:
        try:
            return int(text)
        except ValueError:
            return text  # _convert reports it with the field's name and range
    return text


def _convert(spec: FieldSpec, value: object) -> object:
    """`value` as the type of the field, in its range; ConfigError names field, value and range."""
    if value is None and spec.optional:
        return None
    if issubclass(spec.kind, StrEnum):
        members = {str(member): member for member in spec.kind}
        if isinstance(value, str) and value in members:
            return members[value]
    elif spec.kind is float:
        number = _to_float(value)
        if number is not None and (spec.allowed is None or spec.allowed.contains(number)):
            return number
    elif spec.kind is int:
        integer = value if isinstance(value, int) and not isinstance(value, bool) else None
        if integer is not None and (spec.allowed is None or spec.allowed.contains(integer)):
            return integer
    elif spec.kind is str:
        if isinstance(value, str) and value.strip():
            return value
        raise ConfigError(f"{spec.name}: expected non-empty text, got {value!r} (quote it in YAML)")
    elif isinstance(value, spec.kind):
        return value
    raise ConfigError(f"{spec.name}: expected {spec.takes}, got {value!r}")


def _to_float(value: object) -> float | None:
    # YAML 1.1 reads "3e-4" as text, so text that spells a finite number is a number here.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def field_specs(cls: type) -> tuple[FieldSpec, ...]:
    """The fields of a section class; LossConfig.clip_low is named "loss.clip_low"."""
    section = cls.__name__.removesuffix("Config").lower()
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(_spec(f"{section}.{f.name}", hints[f.name], f.default) for f in fields(cls))


def _spec(name: str, hint: Any, default: object) -> FieldSpec:
    allowed = None
    if typing.get_origin(hint) is Annotated:
        hint, allowed = typing.get_args(hint)
    members = typing.get_args(hint)  # of `str | None`
    optional = type(None) in members
    kind = next(m for m in members if m is not type(None)) if optional else hint
    return FieldSpec(name, kind, optional, allowed, default)


def field_docstrings(cls: type) -> Mapping[str, str]:
    """The string below each field, which Python itself throws away, from the class's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    if not isinstance(body, ast.ClassDef):
        raise TypeError(f"source of {cls.__name__} does not start with a class")
    found: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            expression = following.value if isinstance(following, ast.Expr) else None
            if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
                found[statement.target.id] = inspect.cleandoc(expression.value)
    return found


def read_strict_yaml(path: Path) -> dict[object, object]:
    """The mapping in a YAML file, built by safe_load; an empty file gives an empty mapping.

    Raises ConfigError for an unreadable file, one over MAX_FILE_BYTES, a syntax error, an alias, a
    key given twice or a document that is not a mapping.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: {size_bytes} bytes, more than {MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the config: {error}") from error
    try:
        _check_events(path, yaml.parse(text, Loader=yaml.SafeLoader))
        _check_duplicates(path, yaml.compose(text, Loader=yaml.SafeLoader))
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def _check_events(path: Path, events: Iterator[yaml.Event]) -> None:
    """Refuses aliases and deep nesting before anything is built from the text."""
    depth = 0
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}:{line}: YAML aliases are not allowed; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_YAML_DEPTH:
            raise ConfigError(f"{path}:{line}: nested deeper than section -> field -> value")


def _check_duplicates(path: Path, node: yaml.Node | None) -> None:
    """Refuses a key given twice, of which safe_load would silently keep the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        if name in seen:
            line = key.start_mark.line + 1
            raise ConfigError(f"{path}:{line}: key {name!r} appears twice; keep one")
        seen.add(name)
        _check_duplicates(path, value)
