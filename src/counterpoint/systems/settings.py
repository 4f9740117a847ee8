"""Read, change and store the settings of a system and of its parts by name.

A composed system's settings are the base's own, with those of each part in `config.parts[SLUG]`. The name of a part's setting
is "SLUG.NAME": "mochi.hardest" in overrides, recipes and claims, `--mochi.hardest` on the command line.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from typing import Any

import yaml

from counterpoint.engine.settings import CheckedSettings, fitted
from counterpoint.errors import CounterpointError, unknown


class _PlainLoader(yaml.SafeLoader):
    """Reads values without aliases, by which a short text can hold a value of any size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias")
        return super().compose_node(parent, index)


def setting_value(text: str) -> Any:
    """Parse the value of a setting as YAML reads it. Numbers without a point, such as 1e-3, are numbers, too.

    Raises CounterpointError for a text that is no YAML, and for one with aliases (*NAME).

    >>> setting_value("1e-3"), setting_value("[1, 2]"), setting_value("conv-s")
    (0.001, [1, 2], 'conv-s')
    """
    try:
        found = yaml.load(text, _PlainLoader)  # a safe loader: it makes plain values only
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        raise CounterpointError(f"the value '{text[:80]}' cannot be read; write a number, a word, or [A, B]") from error
    # YAML 1.1 demands a point in a number with an exponent.
    return float(found) if isinstance(found, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", found) else found


@dataclass
class PartConfig(CheckedSettings):
    """Settings of a part. Subclasses add fields."""

    def __post_init__(self) -> None:
        self.need_sound_values()

    def facts(self, data: Any) -> dict[str, Any]:
        """Return the facts of the data that the part needs in addition to the base's, fit for JSON."""
        return {}


def claim_settings(slug: str) -> dict[str, Any]:
    """Return the setting that all arms of a system's claim share: its recipe for the claim's data.

    >>> claim_settings("m3col")["epochs"]
    100
    """
    text = resources.files("counterpoint").joinpath(f"claims/{slug}.toml").read_text(encoding="utf-8")
    found: dict[str, Any] = tomllib.loads(text)["setting"]
    return found


def with_settings(config: Any, values: Mapping[str, Any], slug: str = "the system") -> Any:
    """Replace some settings.

    Args:
        config: settings of a system, with those of its parts.
        values: new values by name. A part's setting is named "SLUG.NAME", or is in a mapping under SLUG or under "parts". A
            list replaces a tuple.
        slug: the system's name, for messages.

    The setting `start` may have the name of its option, "from".

    Raises CounterpointError, which names the setting, for an unknown setting and for a missing part.

    >>> from counterpoint.catalog import load_system
    >>> system = load_system("moco-v2+mochi")
    >>> config = with_settings(system.config(), {"lr": 0.1, "mochi.hardest": 64}, system.slug)
    >>> config.lr, config.parts["mochi"].hardest
    (0.1, 64)
    """
    there: dict[str, Any] = getattr(config, "parts", {})
    own = {f.name for f in fields(config)} - {"parts"}
    plain: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for name, value in _spread(values, own).items():
        if name == "from" and name not in own and "start" in own:  # the option --from sets `start`
            name = "start"
        part, dot, rest = name.partition(".")
        if dot and part in there:
            below.setdefault(part, {})[rest] = value
        elif dot and part not in own:
            raise CounterpointError(
                f"{slug} has no part {part}, so there is no setting {name}; its parts: {', '.join(there) or 'none'}"
            )
        elif name not in own:
            raise CounterpointError(f"{slug} has no setting {name}; {_hint(name, config)}")
        else:
            plain[name] = fitted(config, name, value)
    for part, more in below.items():
        known = {f.name for f in fields(there[part])}
        for name, value in more.items():
            if name not in known:
                raise CounterpointError(f"{slug} has no setting {part}.{name}; {_hint(f'{part}.{name}', config)}")
            more[name] = fitted(there[part], name, value)
    if below:
        plain["parts"] = there | {part: replace(there[part], **more) for part, more in below.items()}
    return replace(config, **plain) if plain else config


def _spread(values: Mapping[str, Any], own: set[str]) -> dict[str, Any]:
    """Convert mappings of a part's settings to dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name == "parts" and isinstance(value, Mapping):
            found |= _spread(value, own)
        elif name not in own and isinstance(value, Mapping):
            found |= {f"{name}.{below}": more for below, more in value.items()}
        else:
            found[name] = value
    return found


def _hint(name: str, config: Any) -> str:
    """Suggest settings with similar names."""
    known = flat(config)
    same = [full for full in known if full.rpartition(".")[2] == name]
    if same:
        return f"did you mean {' or '.join(same)}?"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return str(unknown("setting", name, known if near else sorted(known))).partition("; ")[2]


def flat(config: Any) -> dict[str, Any]:
    """Return all settings by name; those of parts have dotted names."""
    found = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "parts"}
    for slug, part in getattr(config, "parts", {}).items():
        found |= {f"{slug}.{name}": value for name, value in flat(part).items()}
    return found


def stored(config: Any) -> dict[str, Any]:
    """Return settings for config.yaml, each part's in a mapping under its slug. `with_settings` reads them."""
    found = asdict(config)
    parts = found.pop("parts", {})
    return found | parts
