"""Checkpoints: everything that training needs to go on as if it had never stopped.

A checkpoint is a folder `iteration-N` with one file of arrays per rank and a manifest with their digests. It
is written under another name and renamed when complete, so a killed run leaves no half checkpoint under a
good name; one that was damaged later is recognized by the digests. Ranks mostly hold the same values: rank 0
stores everything, the others what differs from rank 0's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chainer
import numpy as np
from chainer.serializers import DictionarySerializer, NpzDeserializer
from chainer.training import Extension, Trainer

from errors import InputError
from files import flush_to_disk, write_json
from ranks import Alone

FOLDER = "checkpoints"
MANIFEST = "checkpoint.json"
NONE_PATHS = "none-paths"
# A second one, in case that the newest is damaged.
KEPT = 2


class Checkpoints(Extension):
    """Writes a checkpoint each time that it is called; behind all other extensions, whose state it saves.

    Args:
        folder: where checkpoints go.
        settings: what a run has to share with the one that it resumes.
        ranks: who takes part.
    """

    priority = -100

    def __init__(self, folder: Path, settings: dict[str, Any], ranks: Alone) -> None:
        self._folder = folder
        self._settings = settings
        self._ranks = ranks

    def initialize(self, trainer: Trainer) -> None:
        if self._ranks.rank == 0:
            for leftover in self._folder.glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)

    def __call__(self, trainer: Trainer) -> None:
        name = f"iteration-{trainer.updater.iteration:08d}"
        partial = self._folder / f".{name}.partial"
        if self._ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        digests = self._write_arrays(partial, _flatten(trainer))
        if self._ranks.rank == 0:
            manifest = {
                "iteration": trainer.updater.iteration,
                "settings": self._settings,
                "digests": digests,
            }
            write_json(partial / MANIFEST, manifest)
            _move_into_place(partial, self._folder / name)
            for old in sorted(self._folder.glob("iteration-*"))[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        # Nobody trains on before the checkpoint is complete.
        self._ranks.broadcast(None)

    def _write_arrays(self, folder: Path, arrays: dict[str, np.ndarray]) -> list[str]:
        """Write this rank's file; returns the digests of all ranks' files on rank 0."""
        own = {name: _digest_array(array) for name, array in arrays.items()}
        shared = self._ranks.broadcast(own)
        if self._ranks.rank:
            arrays = {name: array for name, array in arrays.items() if own[name] != shared.get(name)}
        path = folder / _file_of(self._ranks.rank)
        with open(path, "wb") as file:
            np.savez(file, **arrays)
            flush_to_disk(file)
        return self._ranks.gather(_digest_file(path))


def resume(trainer: Trainer, origin: Path, settings: dict[str, Any], ranks: Alone) -> int | None:
    """Load the newest complete checkpoint into a trainer; returns its iteration, None if there is none.

    Args:
        trainer: assembled as for the run that wrote the checkpoint.
        origin: a checkpoint, or a run's folder.
        settings: of this run.
        ranks: who takes part.

    Raises InputError if the checkpoint belongs to a run with other settings or another number of ranks, or if
    another version of ada_loss wrote it.
    """
    path = ranks.together(lambda: _choose(origin, settings, ranks.size) if ranks.rank == 0 else None)
    path = ranks.broadcast(path)
    if path is None:
        return None
    arrays = _read_arrays(path / _file_of(0)) | _read_arrays(path / _file_of(ranks.rank))
    ranks.together(lambda: _load(trainer, path, arrays))
    return trainer.updater.iteration


def _load(trainer: Trainer, path: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        trainer.serialize(NpzDeserializer(arrays))
    # Its digests are those that were written, so that it is whole, but of another version.
    except ValueError as error:
        raise InputError(f"{path} can't be loaded: {error}") from error
    except KeyError as error:
        raise InputError(
            f"{path} can't be loaded, since it lacks {error.args[0]} and so is of another version of the "
            "example: resume with that version, or train anew without --resume and with another --out."
        ) from error


def _choose(origin: Path, settings: dict[str, Any], n_ranks: int) -> Path | None:
    for path in _candidates(origin):
        manifest = _complete_manifest(path)
        if manifest is None:
            warnings.warn(f"The checkpoint {path} is incomplete or damaged and is passed over.", stacklevel=2)
            continue
        _check_same_run(path, manifest, settings, n_ranks)
        return path
    return None


def _candidates(origin: Path) -> Iterator[Path]:
    """Checkpoints that may be meant, the newest first."""
    if (origin / MANIFEST).exists() or origin.name.startswith("iteration-"):
        yield origin
    for folder in (origin, origin / FOLDER):
        yield from sorted(folder.glob("iteration-*"), reverse=True)


def _complete_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found = [_digest_file(path / _file_of(rank)) for rank in range(len(manifest["digests"]))]
        return manifest if found and found == manifest["digests"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_same_run(path: Path, manifest: dict[str, Any], settings: dict[str, Any], n_ranks: int) -> None:
    written_by = len(manifest["digests"])
    if written_by != n_ranks:
        raise InputError(
            f"{path} was written by {written_by} ranks and this is {n_ranks}: use mpiexec -n {written_by}."
        )
    theirs = manifest["settings"]
    for name, value in settings.items():
        if theirs.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{path} was written with {flag} {theirs[name]} and this is {value}: use the same."
            )


def _flatten(trainer: Trainer) -> dict[str, np.ndarray]:
    """All state of a trainer as arrays by path; paths whose value is None are listed under NONE_PATHS."""
    serializer = DictionarySerializer()
    trainer.serialize(serializer)
    empty = [path for path, array in serializer.target.items() if array.dtype.hasobject]
    arrays = {path: array for path, array in serializer.target.items() if path not in empty}
    return arrays | {NONE_PATHS: np.array(empty, dtype=str)}


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays that `_flatten` gave, or the part of them that is in a file."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays | {name: np.array(None) for name in arrays.get(NONE_PATHS, ())}


def _move_into_place(partial: Path, path: Path) -> None:
    # One of that name can only be of a run that is now repeated from before it.
    shutil.rmtree(path, ignore_errors=True)
    os.rename(partial, path)


def _digest_array(array: np.ndarray) -> str:
    header = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(header + array.tobytes()).hexdigest()


def _digest_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _file_of(rank: int) -> str:
    return f"rank-{rank}.npz"


class RandomState(Extension):
    """Keeps NumPy's global generator in the checkpoint; layers such as dropout draw from it."""

    def serialize(self, serializer: Any) -> None:
        name, keys, position, has_gauss, gauss = np.random.get_state()
        state = (
            name,
            serializer("keys", keys.copy()),
            serializer("position", position),
            serializer("has_gauss", has_gauss),
            serializer("gauss", gauss),
        )
        if isinstance(serializer, chainer.serializer.Deserializer):
            np.random.set_state(state)
