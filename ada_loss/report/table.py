"""The same facts for a terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from ada_loss.core.verdicts import PlaceSummary, Verdict, Word, percent, power
from ada_loss.report.facts import FIXED, Layer, RunFacts, best_single, line_sentence, lines

COLUMNS = 80

_NAME, _WINDOW, _SHARE = 26, 17, 8


def table(
    facts: RunFacts, runs: Sequence[RunFacts] = (), *, most: int | None = None, summary: bool = True
) -> str:
    """A run's layers: the scales that suit, what single ones would lose, what the run lost.

    most: how many layers to show, those that suit the fewest scales; None for all. summary: whether the run's
    summary is to follow.
    """
    runs = runs or [facts]
    text = [
        " ".join(
            [
                _cut("layer", _NAME),
                f"{'scales that suit':<{_WINDOW}}",
                *(f"{f'lost {power(exponent)}':>{_SHARE}}" for exponent in (0, FIXED)),
                "verdict",
            ]
        ),
        "-" * COLUMNS,
    ]
    layers = facts.layers
    shown = layers if most is None else sorted(layers, key=lambda layer: _room(layer))[:most]
    text += [_line(layer) for layer in layers if layer in shown]
    if len(shown) < len(layers):
        text.append(f"... and {len(layers) - len(shown)} layers that suit more scales")
    if not summary:
        return "\n".join(text)
    text += ["", *(wrapped(sentence) for sentence in facts.summary())]
    text += [wrapped(line_sentence(facts, line)) for line in lines(facts, runs)]
    if facts.window.empty and layers:
        best, missed = best_single(facts)
        text.append(wrapped(f"The best single scale, {power(best)}, fails {missed} of {len(layers)} layers."))
    return "\n".join(text)


def _room(layer: Layer) -> float:
    return layer.window.highest - layer.window.lowest


def _line(layer: Layer) -> str:
    losses = [percent(layer.underflow(exponent)).removeprefix("under ") for exponent in (0, FIXED)]
    shares = [
        ("<" if 0 < layer.underflow(e) < 1e-3 else "") + loss
        for e, loss in zip((0, FIXED), losses, strict=True)
    ]
    verdict = worst(layer.places)
    room = COLUMNS - _NAME - _WINDOW - 2 * _SHARE - 4
    said = {Word.UNDERFLOW: f"lost {percent(verdict.number)}"}.get(verdict.word, verdict.word.value)
    columns = [
        _cut(layer.path, _NAME),
        f"{_window(layer):<{_WINDOW}}",
        *(f"{share:>{_SHARE}}" for share in shares),
        said[:room] if len(said) <= room else said.replace("overflow in backward", "overflow"),
    ]
    return " ".join(columns)[:COLUMNS].rstrip()


def _window(layer: Layer) -> str:
    window = layer.window
    if not layer.trained:
        return "no gradient"
    if window.empty:
        return f"none: {power(window.lowest)}>{power(window.highest)}"
    return f"{power(window.lowest)} to {power(window.highest)}"


def worst(places: Sequence[PlaceSummary]) -> Verdict:
    """The verdict of the place that fared worst."""
    order = [Word.FINE, Word.NEVER_TRAINED, Word.UNDERFLOW, Word.OVERFLOW_BACKWARD, Word.OVERFLOW_FORWARD]
    return max(
        (place.verdict for place in places), key=lambda verdict: (order.index(verdict.word), verdict.number)
    )


def _cut(text: str, width: int) -> str:
    """A text in so many columns: of a long path the end tells more than the beginning."""
    return f"{text:<{width}}" if len(text) <= width else "..." + text[len(text) - width + 3 :]


def wrapped(text: str) -> str:
    """A sentence in lines of 80 columns."""
    found, line = [], ""
    for word in (_cut(word, COLUMNS).rstrip() for word in text.split()):
        if line and len(line) + 1 + len(word) > COLUMNS:
            found.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*found, line])
