"""Fills the run configuration from recipes and `--set`; errors for unknown keys and wrong values.

Order: defaults < recipe < `--set dotted.key=value`. An unknown key is an error that names the nearest one; a
value out of range is an error that names the allowed ones.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import without_mark
from data_pipeline.remote.address import remote_url
from train.config.schema import RunConfig


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package, sorted."""
    folder = resources.files("train.recipes")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """Read a recipe as nested plain values.

    Args:
        name_or_path: a name from `recipe_names`, the path of a TOML file, or a run's `config.json`.
    Raises:
        UserError: no such recipe (with the nearest one), or a file that cannot be parsed (with its line).
    """
    path = Path(name_or_path)
    suffix = path.suffix.lower()
    if suffix in (".toml", ".json"):
        if not path.is_file():
            raise UserError(f"recipe file {path} does not exist")
        text, name = without_mark(path.read_bytes(), path), path.stem
    else:
        name = name_or_path
        if name not in recipe_names():
            raise UserError(f"unknown recipe {name!r}{_nearest(name, recipe_names())}")
        text = (resources.files("train.recipes") / f"{name}.toml").read_bytes()
    try:
        values = msgspec.json.decode(text) if suffix == ".json" else msgspec.toml.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name_or_path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {name_or_path} is not a table of keys")
    return {"recipe": name, **values}


def make_config(
    recipe: str, overrides: Iterable[str] = (), data: Path | None = None, init: str | None = None
) -> RunConfig:
    """Resolve the configuration of a run.

    Args:
        recipe: name or file of a recipe.
        overrides: `dotted.key=value` texts, values in TOML; a bare word counts as a string.
        data: the data folder or its address, in place of `data.root`.
        init: weights to begin with, in place of `init_from`.
    Raises:
        UserError: an unknown key (with the nearest known one) or a value that is not allowed (with those that
            are).

    >>> make_config("tiny-imagenet", ["schedule.learning_rate=0.02"]).schedule.learning_rate
    0.02
    """
    values = load_recipe(recipe)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set takes dotted.key=value, not {override!r}")
        *parents, last = key.strip().split(".")
        table = values
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {override}: {parent!r} is a value, not a table of keys")
        table[last] = _parse_value(text.strip())
    if data is not None:
        values.setdefault("data", {})["root"] = remote_url(data) or str(data)
    if init is not None:
        values["init_from"] = init
    return decode_config(values)


def decode_config(values: Mapping[str, Any]) -> RunConfig:
    """Check nested plain values against the schema; see `make_config` for the errors."""
    _check_keys(values, RunConfig, prefix="")
    try:
        return msgspec.convert(values, RunConfig)
    except msgspec.ValidationError as error:
        raise UserError(f"configuration: {_readable(error)}") from error


def to_json(config: RunConfig) -> str:
    """Format a configuration as readable JSON; saved as a `.json` file it is a recipe."""
    return msgspec.json.format(msgspec.json.encode(config)).decode()


def _parse_value(text: str) -> Any:
    try:
        return msgspec.toml.decode(f"value = {text}")["value"]
    except msgspec.DecodeError:
        if re.fullmatch(r"[A-Za-z0-9_./~@:+-]+", text):
            return text
        raise UserError(f"--set: {text!r} is not a TOML value; quote strings") from None


_TYPES: dict[type[Any], dict[str, Any]] = {}


def _types_of(schema: type[Any]) -> dict[str, Any]:
    """Return the types of a schema's keys, evaluated once: 10 ms for a configuration."""
    if schema not in _TYPES:
        _TYPES[schema] = get_type_hints(schema)
    return _TYPES[schema]


def _check_keys(values: Mapping[str, Any], schema: type[Any], prefix: str) -> None:
    fields = _types_of(schema)
    for key, value in values.items():
        if key not in fields:
            every = [f"{prefix}{name}" for name in fields]
            shown = (prefix + str(key))[:100]  # cut: it may come from an untrusted checkpoint
            raise UserError(f"unknown key {shown!r}{_nearest(shown, every, list(_all_keys(RunConfig)))}")
        inner = fields[key]
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            if not isinstance(value, Mapping):
                raise UserError(f"key {prefix + key!r} is a table; set one of its keys, e.g. {prefix}{key}.…")
            _check_keys(value, inner, f"{prefix}{key}.")


def _all_keys(schema: type[Any], prefix: str = "") -> dict[str, Any]:
    """Map each dotted key that holds a value to its type."""
    keys: dict[str, Any] = {}
    for name, kind in _types_of(schema).items():
        nested = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
        keys |= _all_keys(kind, f"{prefix}{name}.") if nested else {f"{prefix}{name}": kind}
    return keys


def _nearest(name: str, candidates: list[str], others: list[str] | None = None) -> str:
    """Return `; did you mean …?` with the closest candidate, else the list of all candidates."""
    pools = (candidates, others or [])
    # A key given without its table, or in the wrong one, is recognised by its last part.
    last = [c for pool in pools for c in pool if c.split(".")[-1] == name.split(".")[-1]]
    close = [c for pool in pools for c in difflib.get_close_matches(name, pool, n=1, cutoff=0.6)]
    best = next(iter((*last, *close)), None)
    return f"; there are: {', '.join(candidates)}" if best is None else f"; did you mean {best!r}?"


def _readable(error: msgspec.ValidationError) -> str:
    """Rephrase msgspec's `Expected … - at `$.schedule.kind``: the key first, a Literal's values listed."""
    text, _, where = str(error).rpartition(" - at `$.")
    key = where.rstrip("`")
    if not text:
        return str(error)
    kind = _all_keys(RunConfig).get(re.sub(r"\[.*", "", key))
    for one in (kind, *get_args(kind)):
        if get_origin(one) is Literal and "[" not in key:
            text += f"; it is one of {', '.join(map(str, get_args(one)))}{' or a list' * (one is not kind)}"
    return f"{key}: {text}"
