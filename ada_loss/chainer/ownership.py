"""Which functions of a graph belong to which scaled model, whatever computed them.

A model's call tags the functions that it applies (`tagging.py`). The others are found in the graph when a
backward pass starts: by the parameters that they use, and by what they use the results of.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import chainer
import numpy as np
from chainer.functions.util.forget import Forget

from ada_loss.chainer.fan_outs import find_fan_outs
from ada_loss.chainer.parameters import adopt
from ada_loss.chainer.products import is_decision
from ada_loss.chainer.tagging import Point, Site, Tag, communicates, given_to, named_links, tag_of
from ada_loss.chainer.transforms import transform
from ada_loss.chainer.user_functions import is_users

Outputs = Iterable[tuple[Any, Any]]
"""Nodes at which a backward pass begins, with their gradients."""

_models: dict[int, weakref.ref[Any]] = {}
"""The scaled models that exist, by id, in the order in which they were scaled."""


class Home(NamedTuple):
    """Where a parameter is: in which scaled model, in which of its links, and that link's path."""

    model: weakref.ref[Any]
    link: weakref.ref[chainer.Link]
    path: str


class _Place(NamedTuple):
    """Where a function is.

    scope: that of its owner, if it has one. path: of the nearest decision point from it on upstream. home: of
    a parameter by which it is owned.
    """

    scope: Any = None
    path: str = "/"
    home: Home | None = None


_NOWHERE = _Place()


def register(model: Any) -> None:
    """Count a link among the scaled models, as long as it exists."""
    key = id(model)
    _models[key] = weakref.ref(model, lambda _: _models.pop(key, None))


def is_scaled(link: chainer.Link) -> bool:
    """Whether a link is a scaled model."""
    reference = _models.get(id(link))
    return reference is not None and reference() is link


def claim() -> None:
    """Note in every parameter of a scaled model where it is; layers that have been added become variants.

    Of several models that share one it is the first, and of models inside one another the outermost.
    """
    models = [model for reference in list(_models.values()) if (model := reference()) is not None]
    links = [named_links(model) for model in models]
    inner = {id(link) for found in links for path, link in found.items() if path != "/"}
    claimed: set[int] = set()
    for model, found in zip(models, links, strict=True):
        if id(model) in inner:
            continue
        for parameter, link, path in _parameters_of(model, found):
            if id(parameter) not in claimed:
                claimed.add(id(parameter))
                adopt(parameter).home = Home(weakref.ref(model), weakref.ref(link), path)
        model.ada_loss.report = transform(found, model.ada_loss.policy.parts)


def _parameters_of(model: Any, links: dict[str, chainer.Link]) -> Iterator[tuple[Any, chainer.Link, str]]:
    """The parameters of a model, with the link that each is in and its path."""
    for path, link in links.items():
        for name in sorted(link._params):
            yield vars(link)[name], link, path
    # A model may count parameters among its own that are in none of its links.
    for path, parameter in model.namedparams():
        yield parameter, model, path.rpartition("/")[0] or "/"


def owner_of(parameter: Any) -> Any:
    """The scaled model that a parameter is in; None for others."""
    home = _known_home(parameter)
    return home and home.model()


def holder_of(link: chainer.Link) -> tuple[Any, str] | None:
    """A scaled model that a link lies in, and the link's path there."""
    for reference in list(_models.values()):
        model = reference()
        found = {} if model is None else named_links(model)
        path = next((path for path, other in found.items() if other is link and path != "/"), None)
        if path is not None:
            return model, path
    return None


def scaled_models(target: chainer.Link) -> dict[str, Any]:
    """The scaled models that a link holds, each once, by path, and those that its parameters are in."""
    found = {path: link for path, link in named_links(target).items() if is_scaled(link)}
    known = {id(model) for model in found.values()}
    for path, parameter in sorted(target.namedparams()):
        model = owner_of(parameter)
        if model is not None and id(model) not in known:
            known.add(id(model))
            found[path] = model
    return found


def in_scopes(outputs: Outputs) -> Iterator[Any]:
    """The functions of a graph that a scaled model's call has tagged, or that use a parameter of one.

    Without any, no scaled model has a part in the graph.
    """
    claimed = not _models
    for function in upstream(outputs):
        if tag_of(function) is not None:
            yield function
            continue
        if not claimed and any(_known_home(parameter) is None for parameter in _parameters(function)):
            claimed = True
            claim()
        if _home(function) is not None:
            yield function


def tag_graph(outputs: Outputs) -> None:
    """Tag the functions of a graph that belong to a scaled model.

    Those are the functions that a model's call has tagged, those that use a parameter of a model, and, where
    they are given float16, those that use results of one.
    """
    functions = sorted(upstream(outputs), key=lambda function: function.rank)
    untagged = [function for function in functions if tag_of(function) is None]
    if _models and any(_known_home(p) is None for function in untagged for p in _parameters(function)):
        claim()
    places: dict[Any, _Place] = {}
    scopes: dict[int, Any] = {}
    found: dict[Any, list[tuple[Any, str]]] = {}
    for function in functions:
        place, tag = _place(function, places, scopes), tag_of(function)
        if tag is None and place.scope is not None:
            found.setdefault(place.scope.policy, []).append((function, place.path))
            if _belongs(function, place):
                tag = function.ada_loss_tag = Tag(place.scope, _point(function, place), by_call=False)
        if tag is not None and tag.point is not None:
            place = place._replace(path=tag.point.site.path)
        if tag is not None and not tag.scope.policy.has_met_float16:
            tag.scope.policy.has_met_float16 = any(x.dtype == np.float16 for x in function.inputs)
        places[function] = place
    for policy, applied in found.items():
        if policy.fan_outs is None:
            policy.fan_outs = find_fan_outs(applied)


def upstream(outputs: Outputs) -> Iterator[Any]:
    """Every function through which gradients go from `outputs` on."""
    seen = set()
    waiting = [node.creator_node for node, _ in outputs]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in seen:
            seen.add(function)
            yield function
            waiting += [x.creator_node for x in function.inputs if x.requires_grad]


def _parameters(function: Any) -> Iterator[Any]:
    """The parameters that a function is given, or that the part of a model has that it computes again."""
    for x in function.inputs:
        if x.creator_node is None and isinstance(variable := x.get_variable_or_none(), chainer.Parameter):
            yield variable
    if isinstance(function, Forget) or is_users(function):
        for link in links_in(function.func if isinstance(function, Forget) else vars(function)):
            yield from link.params()


def _known_home(parameter: Any) -> Home | None:
    home = getattr(parameter, "home", None)
    return home if home is not None and home.model() is not None else None


def _home(function: Any) -> Home | None:
    """The home of the first parameter of a scaled model among a function's inputs."""
    return next((home for p in _parameters(function) if (home := _known_home(p)) is not None), None)


def _place(function: Any, places: dict[Any, _Place], scopes: dict[int, Any]) -> _Place:
    """A function's owner: by its tag, by its parameters, or that of the first of its inputs that has one."""
    before = (places[x.creator_node] for x in function.inputs if x.creator_node in places)
    upstream = next((place for place in before if place.scope is not None), _NOWHERE)
    tag = tag_of(function)
    if tag is not None:
        return _Place(tag.scope, upstream.path)
    home = _home(function)
    if home is None:
        return upstream._replace(home=None)
    model: Any = home.model()
    if id(model) not in scopes:
        scopes[id(model)] = model.ada_loss.scope(model)
    return _Place(scopes[id(model)], home.path, home)


def _point(function: Any, place: _Place) -> Point | None:
    if not is_decision(function):
        return None
    own = getattr(place.home.link(), "ada_loss_config", None) if place.home else None
    name, config = given_to(function)
    path = name or place.path
    return Point(Site(path, place.scope.policy.next_call(path)), config or own)


def _belongs(function: Any, place: _Place) -> bool:
    """Whether a function at a place in a scope, which no call has tagged, is in the scope itself."""
    if communicates(function):
        return False
    return place.home is not None or any(x.requires_grad and x.dtype == np.float16 for x in function.inputs)


def links_in(function: Any) -> Iterator[chainer.Link]:
    """The links that a callable is, is bound to, or refers to by its closure, arguments and attributes."""
    waiting, seen = [function], set()
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, chainer.Link):
            yield thing
        elif isinstance(thing, tuple | list):
            waiting += thing
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, MethodType):
            waiting += [thing.__self__, thing.__func__]
        elif isinstance(thing, partial):
            waiting += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, FunctionType):
            variables = inspect.getclosurevars(thing)
            waiting += [*variables.nonlocals.values(), *variables.globals.values()]
            waiting += thing.__defaults__ or ()
        elif callable(thing) and not isinstance(thing, type):
            waiting += getattr(thing, "__dict__", {}).values()
