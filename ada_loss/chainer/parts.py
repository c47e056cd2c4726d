"""Parts of a model, by path: which of them a filter leaves out, and which have settings of their own."""

from __future__ import annotations

import difflib
import glob
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import chainer

from ada_loss.chainer.settings import config_of
from ada_loss.core.config import AdaLossConfig
from ada_loss.core.rules import FIXED

Predicate = Callable[[str, chainer.Link], bool]

Filter = Predicate | str | Sequence[str]
"""Says which links are scaled: a function of the path ("/extractor/conv1_1") and the link, or patterns."""

Layers = Mapping[str, Mapping[str, Any] | AdaLossConfig]
"""Settings of parts, by pattern."""

Links = Mapping[str, chainer.Link]
"""The links of a model, by path."""

UNSCALED = AdaLossConfig(loss_scale_method=FIXED.name)


@dataclass(frozen=True)
class Patterns:
    """Links whose path matches one of the patterns, or that lie below one that does.

    Those that match a pattern with "!" in front are none of them; without other patterns all others are.
    """

    patterns: tuple[str, ...]

    def __contains__(self, path: object) -> bool:
        wanted = [pattern for pattern in self.patterns if not pattern.startswith("!")]
        unwanted = [pattern[1:] for pattern in self.patterns if pattern.startswith("!")]
        return (not wanted or _any_matches(wanted, path)) and not _any_matches(unwanted, path)


@dataclass(frozen=True)
class AllBut:
    """All links that are not among others."""

    others: Patterns

    def __contains__(self, path: object) -> bool:
        return path not in self.others


Paths = Patterns | AllBut | frozenset[str]


@dataclass(frozen=True)
class Part:
    """Links that have settings of their own.

    paths: which. config: the settings. has_scale: whether gradients carry the initial scale of these settings
    there, whatever they arrive with. refused: whether a filter has left them out.
    """

    paths: Paths
    config: AdaLossConfig
    has_scale: bool = False
    refused: bool = False


class Parts(dict[str, AdaLossConfig]):
    """The settings of links by path, where they are not the model's; also of links that are added later."""

    def __init__(self, parts: Iterable[Part] = ()) -> None:
        super().__init__()
        self._parts = tuple(parts)

    def part(self, path: str) -> Part | None:
        """The last part that a path belongs to."""
        return next((part for part in reversed(self._parts) if path in part.paths), None)

    def get(self, path: str, default: Any = None) -> Any:
        """The settings of a path; `default` if they are the model's."""
        part = self.part(path)
        return default if part is None else part.config

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __contains__(self, path: object) -> bool:
        """Whether a link is not scaled at all."""
        part = self.part(str(path))
        return part is not None and part.refused

    @property
    def have_scales(self) -> bool:
        """Whether there is a part with a scale of its own."""
        return any(part.has_scale for part in self._parts)

    def __reduce__(self) -> Any:
        return Parts, (self._parts,)


def parts_of(links: Links, filter: Filter | None, layers: Layers | None, config: AdaLossConfig) -> Parts:
    """The parts of a model that `AdaLossScaled` is told of.

    Args:
        links: the model's links.
        filter: what is scaled. A function is asked about every link, and with a link refuses whatever is
            below it; unless it refuses the model itself, when it is only asked about layers.
        layers: settings, of which those that are not given are the model's.
        config: the model's settings.
    """
    own = [
        Part(Patterns((pattern,)), _config(settings, config), _has_scale(settings))
        for pattern, settings in (layers or {}).items()
    ]
    _warn_of_strangers("layers", layers or {}, links)
    return Parts([*own, *_refused(filter, links)])


def _refused(filter: Filter | None, links: Links) -> list[Part]:
    if filter is None:
        return []
    if callable(filter):
        refused = _refused_by_function(filter, links)
    else:
        patterns = (filter,) if isinstance(filter, str) else tuple(filter)
        _warn_of_strangers("filter", [pattern.removeprefix("!") for pattern in patterns], links)
        refused = [AllBut(Patterns(patterns))]
    layers = [path for path, link in links.items() if link._params]
    if all(any(path in paths for paths in refused) for path in layers):
        _warn("The filter leaves out every layer, so that nothing in the model is scaled.")
    return [Part(paths, UNSCALED, refused=True) for paths in refused]


def _refused_by_function(accepts: Predicate, links: Links) -> list[Paths]:
    if not _accepts(accepts, "/", links["/"], otherwise=False):
        return [frozenset(path for path, link in links.items() if link._params and not accepts(path, link))]
    refused: list[str] = []
    for path, link in links.items():
        below = any(path.startswith(f"{above}/") for above in refused)
        if not below and not _accepts(accepts, path, link, otherwise=True):
            refused.append(path)
    return [Patterns(tuple(map(glob.escape, refused)))] if refused else []


def _accepts(accepts: Predicate, path: str, link: chainer.Link, *, otherwise: bool) -> bool:
    """What a filter says of a link; `otherwise` if that lacks what layers have and the filter looks at."""
    try:
        return accepts(path, link)
    except AttributeError:
        if link._params:
            raise
        return otherwise


def _config(settings: Mapping[str, Any] | AdaLossConfig, model: AdaLossConfig) -> AdaLossConfig:
    if isinstance(settings, AdaLossConfig):
        return settings
    merged = asdict(model) | dict(settings)
    config = config_of(merged.pop("loss_scale_method"), merged)
    if "init_scale" in settings and config.rule != FIXED:
        raise ValueError(
            "Only a part whose loss_scale_method is 'fixed' has an init_scale of its own: every other rule "
            "chooses the scale there."
        )
    return config


def _has_scale(settings: Mapping[str, Any] | AdaLossConfig) -> bool:
    if isinstance(settings, AdaLossConfig):
        return settings.init_scale != 1
    return "init_scale" in settings


def _any_matches(patterns: Iterable[str], path: Any) -> bool:
    return any(fnmatchcase(path, p) or fnmatchcase(path, f"{p.rstrip('/')}/*") for p in patterns)


def _warn_of_strangers(name: str, patterns: Iterable[str], links: Links) -> None:
    """Say which patterns mean no link at all."""
    for pattern in patterns:
        if not any(_any_matches([pattern], path) for path in links):
            close = difflib.get_close_matches(pattern, links, 1)
            meant = f"did you mean {close[0]!r}?" if close else f"paths are such as {[*links][-1]!r}."
            _warn(f"{name} matched nothing: no link has a path like {pattern!r}; {meant}")


def _warn(text: str) -> None:
    # From here by parts_of, transform and AdaLossScaled to the script.
    warnings.warn(text, stacklevel=6)
