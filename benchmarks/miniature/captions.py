"""Captions for the miniature's world, drawn from a small grammar of synonyms and word orders."""

import numpy as np
from world import Scene

Words = dict[str, tuple[str, ...]]  # a value and what it is called

_COLOUR_WORDS: Words = {"purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")}
_SHAPE_WORDS: Words = {"circle": ("circle", "disc", "ball"), "square": ("square", "box"), "triangle": ("triangle",)}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("",), "large": ("large", "big")}
_BACKGROUND_WORDS = {"white": ("white", "bright"), "black": ("black", "dark"), "gray": ("gray", "grey")}
_GOES = ("moves", "slides", "glides", "drifts", "goes")
_GOING = ("moving", "sliding", "gliding", "drifting", "going")
_WAYS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
}
# What a shape does when it goes nowhere: finite verbs, and participles.
_DOES: Words = {
    "growing": ("grows", "gets bigger", "expands"),
    "shrinking": ("shrinks", "gets smaller", "contracts"),
    "still": ("stays still", "does not move", "stands still"),
}
_DOING: Words = {
    "growing": ("growing", "getting bigger", "expanding"),
    "shrinking": ("shrinking", "getting smaller", "contracting"),
    "still": ("standing still", "not moving", "staying still"),
}
# Of ten captions, so many say the size, and so many the background.
_SAY_SIZE = 0.5
_SAY_BACKGROUND = 0.5


def caption_of(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene; shape, colour and motion are always said, size and background in half of the captions each."""
    noun = _noun_phrase(scene, rng)
    place = f"a {_pick(rng, _BACKGROUND_WORDS[scene.background])} background" if rng.random() < _SAY_BACKGROUND else ""
    order = rng.integers(4)
    if order == 0 and place:
        return f"on {place}, {noun} {_motion(scene, rng, _GOES, _DOES)}"
    if order == 1:
        words = f"{noun} {_motion(scene, rng, _GOING, _DOING)}"
    elif order == 2:
        words = f"{noun} that {_motion(scene, rng, _GOES, _DOES)}"
    else:
        words = f"{noun} {_motion(scene, rng, _GOES, _DOES)}"
    return f"{words} on {place}" if place else words


def captions_of(scenes: list[Scene], seed: tuple[int, ...]) -> list[str]:
    """Describe several scenes, the same way every time for the same seed."""
    rng = np.random.default_rng(seed)
    return [caption_of(scene, rng) for scene in scenes]


def _noun_phrase(scene: Scene, rng: np.random.Generator) -> str:
    size = _pick(rng, _SIZE_WORDS[scene.size]) if rng.random() < _SAY_SIZE else ""
    colour = _pick(rng, _COLOUR_WORDS.get(scene.colour, (scene.colour,)))
    shape = _pick(rng, _SHAPE_WORDS[scene.shape])
    return " ".join(word for word in (_pick(rng, ("a", "a", "the")), size, colour, shape) if word)


def _motion(scene: Scene, rng: np.random.Generator, going: tuple[str, ...], doing: Words) -> str:
    if scene.motion in _WAYS:
        return f"{_pick(rng, going)} {_pick(rng, _WAYS[scene.motion])}"
    return _pick(rng, doing[scene.motion])


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]


def _meanings() -> dict[str, tuple[str, str]]:
    """Map each word that names a shape, a colour or a motion to (attribute, value)."""
    words: dict[str, tuple[str, str]] = {}
    for attribute, table in (("colour", {c: (c,) for c in ("red", "green", "blue", "yellow")} | _COLOUR_WORDS),
                             ("shape", _SHAPE_WORDS)):  # fmt: skip
        words |= {word: (attribute, value) for value, synonyms in table.items() for word in synonyms}
    for value, ways in _WAYS.items():
        words |= {way.removeprefix("to the "): ("motion", value) for way in ways}
    for table in (_DOES, _DOING):
        words |= {phrase: ("motion", value) for value, phrases in table.items() for phrase in phrases}
    return words


MEANINGS = _meanings()


def meaning_of(caption: str) -> dict[str, str]:
    """Read shape, colour and motion back out of a caption of this grammar; absent ones are missing."""
    text = f" {caption.lower().replace(',', ' ')} "
    return dict(MEANINGS[phrase] for phrase in MEANINGS if f" {phrase} " in text)
