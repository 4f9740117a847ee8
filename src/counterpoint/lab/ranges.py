"""The values of a setting that a sweep tries.

>>> Range.parse("lr=1e-4..1e-1:log")
Range(name='lr', low=0.0001, high=0.1, log=True, choices=())
>>> Range.parse("encoder=conv-s,resnet-s").choices
('conv-s', 'resnet-s')
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from counterpoint.errors import CounterpointError
from counterpoint.systems.settings import setting_value

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Range:
    """The values of a setting that a sweep tries: an interval, or choices."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Range:
        """Parse NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C. CounterpointError for another form."""
        name, sign, values = text.partition("=")
        name = name.replace("-", "_")
        if not sign or not name or not values:
            raise CounterpointError(f"--over takes NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C; got '{text}'")
        if ".." not in values:
            parts = values.split(",")
            if not all(map(str.strip, parts)):
                raise CounterpointError(f"--over {text}: a choice is empty; remove a comma")
            return cls(name, choices=tuple(map(setting_value, parts)))
        interval, _, scale = values.partition(":")
        try:
            low, high = (
                float(part) if "." in part or "e" in part.lower() else int(part) for part in interval.split("..")
            )
        except ValueError:
            raise CounterpointError(
                f"--over {text}: '{interval}' is no interval of two numbers, such as 1e-4..1e-1"
            ) from None
        if not math.isfinite(high - low):
            raise CounterpointError(f"--over {text}: the ends must be finite numbers")
        if not low < high or scale not in ("", "log") or (scale == "log" and not low > 0):
            raise CounterpointError(
                f"--over {text}: the lower number must come first, and be above 0 with :log, the only scale besides none"
            )
        return cls(name, low, high, scale == "log")

    def ends(self) -> tuple[Any, ...]:
        """Return the values at which the settings are checked before the first trial."""
        return self.choices or (self.low, self.high)

    def draw(self, trial: optuna.Trial) -> Any:
        """Return the value for a trial."""
        if self.choices:
            number = trial.suggest_categorical(self.name, list(range(len(self.choices))))
            return self.choices[number]
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def shown(self, value: Any) -> Any:
        """Return a value as the settings have it: of choices, Optuna knows the number."""
        return self.choices[value] if self.choices else value

    def grid(self) -> list[Any]:
        """Return the values of a grid: the choices, or five points from end to end."""
        if self.choices:
            return list(range(len(self.choices)))
        low, high = (math.log(v) if self.log else v for v in (self.low, self.high))
        points = [low + (high - low) * n / 4 for n in range(5)]
        values = [math.exp(p) if self.log else p for p in points]
        values[0], values[-1] = self.low, self.high
        return (
            sorted({round(v) for v in values}) if isinstance(self.low, int) and isinstance(self.high, int) else values
        )
