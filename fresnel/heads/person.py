"""Who is shown: a person's parameters, drawn by chance; docs/heads.md says what depends on what."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fresnel.objects.render_set import chance

ANCESTRIES = ("african", "asian", "caucasian")
_OPPOSITES = (
    *(("decr", "incr"), ("down", "up"), ("in", "out"), ("backward", "forward")),
    *(("concave", "convex"), ("compress", "uncompress"), ("square", "round")),
)
_MOVING = (
    *("r-", "measure", "head-trans", "head-angle"),
    *("head-square", "head-round", "neck-trans", "neck-double"),
)
_SHAPES = ("diamond", "oval", "rectangular", "round", "square", "triangular", "invertedtriangular")
_SPREAD, _MOST = 0.27, 0.7
"""Standard deviation and largest value of a slider, whose extremes are 1 ..."""
_CALM = {"head": 0.4, "asym": 0.35, "forehead": 0.7, "neck": 0.5, "ear": 0.9}
"""... and what the first is multiplied with, so that skulls stay human."""
_BOTH = ("Left", "Right")
EXPRESSIONS: dict[str, dict[str, float]] = {
    "neutral": {},
    "smile": {"mouthSmile": 0.8, "cheekSquint": 0.4, "eyeSquint": 0.2, "mouthDimple": 0.3},
    "laugh": {"mouthSmile": 0.9, "mouthUpperUp": 0.3, "jawOpen": 0.35, "eyeSquint": 0.35},
    "surprise": {"browInnerUp": 0.7, "browOuterUp": 0.7, "eyeWide": 0.5, "jawOpen": 0.4},
    "anger": {"browDown": 0.8, "noseSneer": 0.4, "mouthPress": 0.4, "eyeSquint": 0.3},
    "sadness": {"browInnerUp": 0.8, "mouthFrown": 0.6, "mouthShrugLower": 0.3},
    "speech": {"jawOpen": 0.3, "mouthFunnel": 0.3, "mouthLowerDown": 0.2},
    "doubt": {"mouthPucker": 0.4, "browDown": 0.3, "mouthFrown": 0.3},
}
KINDS = ("skins", "eyes", "eyebrows", "eyelashes", "hair")
"""Of assets, if there are any: a share in [0, 1) chooses among those that suit."""
STYLES = ("bald", "cropped", "short", "parted", "curly", "bob", "long", "tied")
"""Of hair, from none to most."""


@dataclass(frozen=True)
class Person:
    """All that decides how a head looks; colours are linear in [0, 1], shares in [0, 1].

    ``sex`` is 0 for a woman and 1 for a man, ``sliders`` are weights of shape targets in [-1, 1]
    by stem ("nose-hump"), ``units`` of an expression's by target;
    ``fringe`` is below 0 where the hairline recedes; ``choices`` choose among assets.
    """

    name: str
    sex: float
    age_years: float
    ancestry: tuple[float, float, float]
    weight: float
    muscle: float
    sliders: dict[str, float]
    expression: str
    units: dict[str, float]
    melanin: float
    redness: float
    spots: float
    lips: float
    stubble: float
    eyes: str
    hair: str
    fringe: float
    hair_color: tuple[float, float, float]
    grey: float
    brows: float
    choices: dict[str, float]

    @property
    def is_man(self) -> bool:
        return self.sex > 0.5


@functools.cache
def stems(targets: tuple[str, ...]) -> dict[str, tuple[list[str], list[str]]]:
    """Sliders: the targets of a negative and of a positive weight, left and right together."""
    known, found = set(targets), dict[str, tuple[list[str], list[str]]]()
    for name in sorted(known):
        for low, high in _OPPOSITES:
            stem, plus = name.removesuffix(f"-{low}"), f"{name.removesuffix(low)}{high}"
            if stem == name or plus not in known or name.startswith(_MOVING):
                continue
            pair = ([name], [plus])
            if name.startswith("l-"):
                stem = stem[2:]
                pair = ([name, f"r{name[1:]}"], [plus, f"r{plus[1:]}"])
            found[stem] = pair
    found |= {f"head-{shape}": ([], [f"head-{shape}"]) for shape in _SHAPES}
    asymmetric = {name[:-2] for name in known if name.startswith("asym-")}
    return found | {stem: ([f"{stem}-l"], [f"{stem}-r"]) for stem in sorted(asymmetric)}


def draw(seed: int, index: int, sliders: Iterable[str]) -> Person:
    """The person of a number: the same whoever else is drawn.

    Args:
        sliders: the names that `stems` found.
    """
    name = name_of(index)
    random = chance(seed, name, "person")
    man = random.uniform() < 0.5
    age = random.uniform(6.0, 85.0)
    ancestry = random.dirichlet((0.35, 0.35, 0.35))
    african, _asian, caucasian = ancestry
    expression = "neutral"
    if random.uniform() < 0.65:
        expression = str(random.choice(list(EXPRESSIONS)[1:]))
    strength, units = random.uniform(0.35, 1.0), dict[str, float]()
    for unit, most in EXPRESSIONS[expression].items():
        units |= _sides(unit, strength * most * random.uniform(0.7, 1.0))
    up, side, closed = random.normal(0, 0.2), random.normal(0, 0.2), random.uniform(0, 0.1)
    units |= _sides("eyeLookUp" if up > 0 else "eyeLookDown", min(abs(up), 0.6))
    inner, outer = _BOTH if side > 0 else _BOTH[::-1]
    units |= {f"eyeLookIn{inner}": abs(side), f"eyeLookOut{outer}": abs(side)}
    units |= _sides("eyeBlink", closed)
    melanin = ancestry @ (
        random.uniform(0.62, 0.95),
        random.uniform(0.22, 0.42),
        random.uniform(0.03, 0.3),
    )
    fair = random.uniform() * caucasian**2
    dark = np.array([0.012, 0.009, 0.008])
    browns = np.array([[0.07, 0.035, 0.018], [0.03, 0.015, 0.009], [0.16, 0.09, 0.04]])
    blonds = np.array([[0.42, 0.28, 0.13], [0.30, 0.19, 0.09], [0.27, 0.08, 0.03]])
    tint = browns[random.integers(3)] if fair < 0.6 else blonds[random.integers(3)]
    color = dark + (tint - dark) * (1.0 if fair > 0.25 else 0.15) * random.uniform(0.6, 1.0)
    dyed = random.uniform() < (0.1 if man else 0.5)
    grey = 0.0 if dyed else float(np.clip((age - random.normal(50.0, 9.0)) / 28.0, 0.0, 1.0))
    style = _style(random, man, age, african)
    light = random.uniform() < caucasian**2 * 0.75
    palette = ("blue", "green", "grey", "lightbrown") if light else ("brown", "darkbrown")
    values = {
        stem: random.normal(0.0, _SPREAD) * _CALM.get(stem.partition("-")[0], 1.0)
        for stem in sorted(sliders)
    }
    receded = max(0.0, min(1.0, (age - 20.0) / 40.0)) * (1.0 if man else 0.3)  # at most
    shaped = str(random.choice(_SHAPES))
    for stem in values:
        if stem.startswith("head-") and stem[5:] in _SHAPES:
            values[stem] = 3 * abs(values[stem]) * (stem[5:] == shaped)
    return Person(
        name=name,
        sex=_short(random.uniform(0.85, 1.0) if man else random.uniform(0.0, 0.15)),
        age_years=_short(age),
        ancestry=tuple(map(_short, ancestry)),  # type: ignore[arg-type]
        weight=_short(np.clip(random.normal(0.5, 0.17), 0.1, 0.95)),
        muscle=_short(np.clip(random.normal(0.5, 0.15), 0.1, 0.9)),
        sliders={stem: _short(np.clip(value, -_MOST, _MOST)) for stem, value in values.items()},
        expression=expression,
        units={unit: _short(value) for unit, value in units.items() if value > 0.01},
        melanin=_short(melanin),
        redness=_short(random.uniform(0.2, 1.0)),
        spots=_short(random.uniform() ** 2 * (0.3 + 0.7 * max(0.0, age - 35) / 50)),
        lips=_short(random.uniform(0.0, 0.5 if man or age < 15 else 1.0)),
        stubble=_short(random.uniform(-0.5, 1.0) if man and age > 17 else 0.0),
        eyes=str(random.choice(palette)),
        hair=style,
        fringe=_short(random.uniform(-receded, 0.3 if man else 1.0)),
        hair_color=tuple(map(_short, color)),  # type: ignore[arg-type]
        grey=_short(grey),
        brows=_short(random.uniform(0.3, 1.0)),
        choices={what: _short(random.uniform()) for what in (*KINDS, "style", "side")},
    )


def _sides(unit: str, value: float) -> dict[str, float]:
    if unit in ("jawOpen", "browInnerUp", "mouthFunnel", "mouthPucker", "mouthShrugLower"):
        return {unit: value}
    return {f"{unit}{side}": value for side in _BOTH}


def _style(random: np.random.Generator, man: bool, age: float, african: float) -> str:
    lost = man and random.uniform() < max(0.0, age - 25.0) / 110.0
    shares = dict.fromkeys(STYLES, 0.0)
    if man:
        shares |= {"bald": 0.04, "cropped": 0.3, "short": 0.3, "parted": 0.25, "long": 0.03}
    else:
        shares |= {"bald": 0.01, "cropped": 0.06, "short": 0.14, "parted": 0.1}
        shares |= {"bob": 0.25, "long": 0.22, "tied": 0.17}
    shares["curly"] = 0.08 + 0.3 * african
    if lost:
        shares = {"bald": 0.5, "cropped": 0.5}
    weights = np.array(list(shares.values()))
    return str(random.choice(list(shares), p=weights / weights.sum()))


def _short(value: Any) -> float:
    """Three digits: what the manifest says is what was drawn, on every machine."""
    return round(float(value), 3)


def name_of(index: int) -> str:
    return f"head_{index:05d}"


def split_of(index: int) -> str:
    """80 % of people are "train", 5 % "val" and 15 % "test"; a person is in one of them."""
    place = index % 20
    return "train" if place < 16 else "val" if place < 17 else "test"
