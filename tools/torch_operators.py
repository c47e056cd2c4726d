#!/usr/bin/env python3
"""Run PyTorch's own databases of operators and modules through `ada_loss.torch` and write what came of it to
docs/torch-operators.md.

For every entry that has a float16 backward pass on the CPU: gradients of a loss times 2**-24 against those in
float32, at least as good as those of PyTorch with the best of three fixed scales. Takes a minute or two and
needs `expecttest`, which PyTorch's databases import.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves, tree_map

import ada_loss.torch
from ada_loss.torch import operators

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "torch-operators.md"
SMALL = -24
"""The exponent of the factor that makes losses small."""
FIXED = (0, 4, 8)
"""Exponents of the scales that PyTorch's own gradients may choose from."""
ENOUGH = 40.0
"""A signal-to-noise ratio in dB with which nobody asks for more."""
SAMPLES = 6
"""Inputs of an operator or a module that are tried."""

INTRODUCTION = f"""\
# Operators in PyTorch

What `ada_loss.torch` does with each operator that met a scaled gradient while every entry of PyTorch's own
databases was differentiated that has a float16 backward pass on the CPU: the loss times 2^{SMALL}, the
gradients at most 1 dB below PyTorch's with the best of {len(FIXED)} fixed scales, or at {ENOUGH:.0f} dB and
more. Written by `python tools/torch_operators.py` and checked by `tests/torch_/test_operator_database.py`.
"""

KINDS = """
*passes through*: at its scale. *sums*, *decides*, *joins*: computed in float32, and scaled anew before it is
rounded once. *exit*: leaves float16. *view*: shares its scale. *in place*: writes to a gradient. *parts*:
made of other operators. *sees true values*: its result is no gradient. *true values*: has no rule, and is
computed from true gradients in float32; that is right and slower, and a warning says so once.
"""

Call = Callable[[torch.dtype], tuple[Any, list[torch.Tensor]]]
"""Computes an output in a dtype; returns it and the leaves that it depends on."""


@dataclass
class Finding:
    """What running an entry of a database has shown.

    samples: how many inputs were tried. worst: by how many dB the worst fell short of what it had to reach;
    not positive where none did. used: operators of backward that met scaled tensors, and how each was dealt
    with. refused: whether a sentence said that an input cannot be dealt with.
    """

    name: str
    samples: int = 0
    worst: float = -math.inf
    refused: bool = False
    used: dict[str, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return self.worst <= 0


def operator_entries() -> Iterator[tuple[str, Iterator[Call]]]:
    """Every entry of the database of operators that has a float16 backward pass on the CPU."""
    for entry in op_db:
        if entry.supports_autograd and torch.float16 in entry.supported_backward_dtypes("cpu"):
            variant = entry.variant_test_name
            yield f"{entry.name}.{variant}" if variant else entry.name, _operator_calls(entry)


def module_entries() -> Iterator[tuple[str, Iterator[Call]]]:
    """Every entry of the database of modules."""
    for entry in module_db:
        yield entry.name, _module_calls(entry)


def _operator_calls(entry: Any) -> Iterator[Call]:
    for sample in entry.sample_inputs("cpu", torch.float16, requires_grad=True):

        def call(dtype: torch.dtype, sample: Any = sample) -> tuple[Any, list[torch.Tensor]]:
            arguments = _cast((sample.input, sample.args, sample.kwargs), dtype)
            output = entry(arguments[0], *arguments[1], **arguments[2])
            return sample.output_process_fn_grad(output), _leaves_of(arguments)

        yield call


def _module_calls(entry: Any) -> Iterator[Call]:
    for sample in entry.module_inputs_func(
        entry, device="cpu", dtype=torch.float32, requires_grad=True, training=True
    ):
        made, given = sample.constructor_input, sample.forward_input
        if given is None:
            continue

        def call(dtype: torch.dtype, made: Any = made, given: Any = given) -> tuple[Any, list[torch.Tensor]]:
            torch.manual_seed(0)
            module = entry.module_cls(*made.args, **made.kwargs)
            arguments = _cast((given.args, given.kwargs), torch.float16, of=torch.float32)
            module.half().to(dtype)
            arguments = _cast(arguments, dtype)
            output = module(*arguments[0], **arguments[1])
            return output, _leaves_of(arguments) + list(module.parameters())

        yield call


def _cast(value: Any, dtype: torch.dtype, of: torch.dtype = torch.float16) -> Any:
    """Fresh leaves, those of a dtype in another one."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            fresh = leaf.detach().to(dtype) if leaf.dtype == of else leaf.detach().clone()
            return fresh.requires_grad_(leaf.requires_grad)
        return dtype if leaf is of else leaf

    return tree_map(cast, value)


def _leaves_of(arguments: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.requires_grad]


def examine(name: str, calls: Iterator[Call]) -> Finding:
    """Run the entry's samples; those that PyTorch itself cannot differentiate in float16 do not count."""
    finding = Finding(name)
    for call in islice(calls, SAMPLES):
        try:
            reference = _gradients(call, torch.float32)
            fixed = [_gradients(call, torch.float16, exponent) for exponent in FIXED]
        except (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError):
            continue
        if reference is None or any(gradients is None for gradients in fixed):
            continue
        finding.samples += 1
        try:
            with _recorded(finding.used):
                ours = _gradients(call, torch.float16, SMALL, scaled=True)
        except RuntimeError as error:
            if "cannot be scaled" not in str(error):
                raise
            finding.refused, finding.worst = True, math.inf
            continue
        needed = min(max(_signal_to_noise(gradients, reference) for gradients in fixed) - 1, ENOUGH)
        finding.worst = max(finding.worst, needed - _signal_to_noise(ours, reference))
    return finding


def _gradients(call: Call, dtype: torch.dtype, exponent: int = 0, *, scaled: bool = False) -> Any:
    """True gradients of all leaves, of a loss times 2**exponent; None if there is nothing to
    differentiate."""
    torch.manual_seed(0)
    output, leaves = call(dtype)
    outputs = [o for o in tree_leaves(output) if isinstance(o, torch.Tensor) and o.requires_grad]
    outputs = [_dense(o) for o in outputs if o.is_floating_point()]
    if not outputs or not leaves:
        return None
    generator = torch.Generator().manual_seed(1)
    loss = sum((o.float() * torch.randn(o.shape, generator=generator)).sum() for o in outputs)
    loss = loss * 2.0**exponent
    if scaled:
        with ada_loss.torch.backward():
            loss.backward()
    else:
        loss.backward()
    return [None if leaf.grad is None else _dense(leaf.grad).double() * 2.0**-exponent for leaf in leaves]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _signal_to_noise(actual: list[Any], reference: list[Any]) -> float:
    """The worst of all gradients, in dB, over the elements that are finite in the reference."""
    worst = math.inf
    for ours, theirs in zip(actual, reference, strict=True):
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None:
            return -math.inf
        finite = torch.isfinite(theirs)
        noise = (ours - theirs)[finite].square().sum()
        if noise != 0:
            ratio = float(10 * torch.log10(theirs[finite].square().sum() / noise))
            worst = min(worst, ratio if ratio == ratio else -math.inf)
    return worst


class _recorded:
    """Notes which operators meet scaled tensors, and which of them have no rule."""

    def __init__(self, used: dict[str, str]) -> None:
        self._used = used

    def __enter__(self) -> None:
        self._apply = operators.apply
        operators.apply = self._record

    def __exit__(self, *exception: Any) -> None:
        operators.apply = self._apply

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        operators.fallback.forget_warnings()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = self._apply(func, args, kwargs)
        name = str(func.overloadpacket)
        missing = any("has no rule" in str(warning.message) for warning in caught)
        kind = operators.kind_of(func)
        self._used[name] = "true values" if missing and kind == "sees true values" else kind
        return result


def document(findings: dict[str, list[Finding]]) -> str:
    """The coverage as Markdown."""
    lines = [
        INTRODUCTION,
        "| database | entries | as good as that | not |",
        "| --- | ---: | ---: | --- |",
    ]
    for title, entries in findings.items():
        tried = [entry for entry in entries if entry.samples]
        bad = ", ".join(map(_named, (entry for entry in tried if not entry.good))) or "none"
        good = sum(entry.good for entry in tried)
        lines.append(f"| {title} | {len(tried)} | {good} | {bad} |")
    uses, kinds = _uses(findings)
    lines += [
        KINDS,
        "| operator | kind | entries that use it |",
        "| --- | --- | ---: |",
    ]
    lines += [f"| `{name}` | {kinds[name]} | {uses[name]} |" for name in sorted(kinds)]
    return "\n".join(lines) + "\n"


def _named(finding: Finding) -> str:
    return f"`{finding.name}`" + " (refused, in a sentence)" * finding.refused


def _uses(findings: dict[str, list[Finding]]) -> tuple[Counter[str], dict[str, str]]:
    uses: Counter[str] = Counter()
    kinds: dict[str, str] = {}
    for finding in [finding for entries in findings.values() for finding in entries]:
        uses.update(list(finding.used))
        for name, kind in finding.used.items():
            if kinds.get(name) != "true values":
                kinds[name] = kind
    return uses, kinds


def examine_all() -> dict[str, list[Finding]]:
    """Both databases, by title."""
    databases = {"operators": operator_entries(), "modules": module_entries()}
    return {title: [examine(*entry) for entry in entries] for title, entries in databases.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the document is up to date")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text = document(examine_all())
    if arguments.check:
        return int(DOCUMENT.read_text(encoding="utf-8") != text)
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
