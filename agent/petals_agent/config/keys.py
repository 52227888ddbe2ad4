"""Looks up keys in the schema: which exist, what they accept, how they are written."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from petals_agent.config.kinds import Allowed, Located, Written
from petals_agent.config.schema import NOT_YET, Config
from petals_agent.config.values import format_duration

KeyPath = tuple[str | int, ...]
ANY = "*"  # stands for a name that the operator chooses, as in health.probes.*


@cache
def schema_keys() -> Mapping[tuple[str, ...], FieldInfo]:
    """Every key of the schema by its path: ("serve", "blocks"), ("health", "probes", "*", "period")."""
    return dict(_walk(Config, ()))


def _walk(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in model.model_fields.items():
        path, annotation = (*prefix, name), field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _walk(annotation, path)
        elif get_origin(annotation) is dict:
            yield from _walk(get_args(annotation)[1], (*path, ANY))
        else:
            yield path, field


def sections() -> list[str]:
    """Names of the sections, in the order of the schema."""
    return list(Config.model_fields)


def siblings(path: KeyPath) -> list[str]:
    """The names that the schema has beside the last part of `path`: sections, or the keys of one table."""
    parent = _canonical(path[:-1])
    depth = len(parent)
    return list(
        dict.fromkeys(
            known[depth] for known in schema_keys() if known[:depth] == parent and len(known) > depth
        )
    )


def field_at(path: KeyPath) -> FieldInfo | None:
    """The field of a key, or of the list that an item belongs to."""
    return schema_keys().get(_canonical(path))


def _canonical(path: KeyPath) -> tuple[str, ...]:
    """As `schema_keys` has it: without list indexes, and "*" for a name that the operator chose."""
    names = tuple(part for part in path if isinstance(part, str))
    return (*names[:2], ANY, *names[3:]) if names[:2] == ("health", "probes") and len(names) > 2 else names


def is_not_yet(path: KeyPath) -> bool:
    """True if the key is checked but takes effect from a later version."""
    names = [str(part) for part in path[:2]]
    return names[0] in NOT_YET or ".".join(names) in NOT_YET


def located(path: KeyPath) -> bool:
    """True if the key holds paths that are relative to the folder of the file that set them."""
    field = field_at(path)
    return field is not None and any(isinstance(mark, Located) for mark in field.metadata)


def written(path: KeyPath, value: Any) -> Any:
    """`value` as `config show` writes it: durations and sizes with units."""
    field = field_at(path)
    forms = [mark.form for mark in _marks(field) if isinstance(mark, Written)] if field else []
    return forms[0](value) if forms and value is not None else value


def leaves(config: BaseModel, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of a configuration with its value, in the order of the schema, plugins' own tables included."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, (*prefix, name))
        elif isinstance(value, dict):
            for item, model in value.items():
                yield from table_leaves(model.model_dump(exclude_none=True), (*prefix, name, item))
        else:
            yield (*prefix, name), value
    for name, table in (config.__pydantic_extra__ or {}).items():
        yield from table_leaves(table, (*prefix, name))


def table_leaves(
    table: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key below a table that holds no table, before the tables as TOML wants it, and every empty table."""
    for name, value in table.items():
        if not isinstance(value, Mapping):
            yield (*prefix, name), value
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from table_leaves(value, (*prefix, name))
    if not table and prefix:
        yield prefix, {}


def takes_list(field: FieldInfo) -> bool:
    """True if the field accepts a list."""
    return any(get_origin(kind) is tuple for kind in _kinds(field.annotation))


def takes_only_text(field: FieldInfo) -> bool:
    """True if every value of the field is text, so that 12 on a command line means "12"."""
    return not any(
        kind in (int, float, bool) or get_origin(kind) is tuple for kind in _kinds(field.annotation)
    )


def choices(field: FieldInfo) -> list[str]:
    """The words among what a field accepts, such as "auto"."""
    return [
        word for kind in _kinds(field.annotation) if get_origin(kind) is Literal for word in get_args(kind)
    ]


def allowed(field: FieldInfo) -> str:
    """What a field accepts, in words."""
    marks = _marks(field)
    texts = [mark.text for mark in marks if isinstance(mark, Allowed)]
    kinds = _kinds(field.annotation)
    if float not in kinds and int not in kinds and not texts:
        return ", ".join(f'"{word}"' for word in choices(field))
    text = texts[0] if texts else "a number" if float in kinds else "a whole number"
    if choices(field) or (texts and int in kinds):
        return text  # it names its bounds itself
    return text + _bounds(marks, is_duration=any(isinstance(mark, Written) for mark in marks))


def _bounds(marks: list[Any], *, is_duration: bool) -> str:
    def word(bound: Any) -> str:
        return str(format_duration(bound)) if is_duration else f"{bound:g}"

    words = [f"from {word(mark.ge)}" for mark in marks if isinstance(mark, Ge)]
    words += [f"above {word(mark.gt)}" for mark in marks if isinstance(mark, Gt)]
    words += [f"up to {word(mark.le)}" for mark in marks if isinstance(mark, Le)]
    return f", {' '.join(words)}" if words else ""


def _marks(field: FieldInfo) -> list[Any]:
    """The field's annotations, the outermost first, then those of the members of its union."""
    inner = [mark for member in get_args(field.annotation) for mark in getattr(member, "__metadata__", ())]
    return [*reversed(field.metadata), *inner]


def _kinds(annotation: Any) -> list[Any]:
    """The members of a union, without their annotations."""
    if hasattr(annotation, "__metadata__"):
        return _kinds(annotation.__origin__)
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in _kinds(member)]
    return [annotation]
