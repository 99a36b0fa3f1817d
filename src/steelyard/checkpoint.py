"""Checkpoints that hold exact state, cannot run code when read, and are whole or not there at all.

A checkpoint is a folder: `tensors.safetensors`, `state.json`, and `manifest.json` with the size and SHA-256 of the
two. It is written beside its place (`NAME.partial`), the manifest last, made durable and renamed into its place, so
that a folder under its final name is complete. Nothing is pickled.

The `pack_*` functions turn what a training loop carries besides its model into such tensors and JSON, and the
`unpack_*` functions put it back, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steelyard.errors import InputError
from steelyard.run_dir import fsync_folder, json_text

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_FILES = (_TENSORS, _STATE)
_FORMAT = 1
# How torch computes the step, not what it computes: these stay as the new optimiser was built.
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}


class CheckpointError(InputError):
    """A checkpoint that is damaged, or does not fit what it is to be loaded into."""


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint at `folder`, replacing one that is there.

    `tensors` may be of any shape (0-dim and empty included), dtype that safetensors knows, and device; tensors that
    are one and the same view of memory (tied weights) are stored once. `state` is JSON with text keys; see `json_text`
    with `exact`. Returns when everything is durable. Raises CheckpointError for a tensor that cannot be stored and
    InputError for a state that is not JSON.
    """
    text = json_text(dict(state), "state", exact=True)
    _settle_one(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(folder, "partial")
    partial.mkdir()
    stored, tied = _untie(tensors)
    try:
        save_file(stored, partial / _TENSORS, metadata={"tied": json.dumps(tied)})
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder}: the tensors cannot be stored ({error!r})") from error
    (partial / _STATE).write_text(text, encoding="ascii")
    files = {name: _seal(partial / name) for name in _FILES}
    (partial / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=2), encoding="ascii")
    _seal(partial / _MANIFEST)
    fsync_folder(partial)
    old = _beside(folder, "old")
    if folder.exists():
        # A folder cannot be replaced in one move; `_settle_one` mends what a crash between the two leaves.
        os.rename(folder, old)
    os.rename(partial, folder)
    fsync_folder(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint after checking every byte against its manifest; the tensors come back on the CPU.

    Tied tensors come back as one tensor under each of their names. Raises CheckpointError naming the file at fault.
    """
    if not folder.exists() and _beside(folder, "old").exists():
        folder = _beside(folder, "old")
    _verify(folder)
    try:
        with safe_open(folder / _TENSORS, framework="pt", device="cpu") as file:
            # Cloned: what safe_open returns may stay tied to the file, which is pruned one day.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    except SafetensorError as error:
        raise CheckpointError(f"{folder / _TENSORS} cannot be read: {error}.") from error
    tensors.update({name: tensors[same] for name, same in tied.items()})
    return tensors, json.loads((folder / _STATE).read_bytes())


def remove(folder: Path) -> None:
    """Delete a checkpoint; one move takes it out of sight, so that a crash leaves no half of it under its name."""
    removed = _beside(folder, "removed")
    if removed.exists():
        shutil.rmtree(removed)
    os.rename(folder, removed)
    shutil.rmtree(removed)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to `NAME.damaged`, where nothing will look for it, and return that path."""
    aside = _beside(folder, "damaged")
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(folder, aside)
    return aside


def settle(parent: Path) -> None:
    """Clear away what interrupted calls of `save` and `remove` left among the checkpoints in `parent`."""
    for entry in sorted(parent.iterdir()):
        for suffix in (".partial", ".removed", ".old"):
            if entry.name.endswith(suffix):
                _settle_one(entry.with_name(entry.name.removesuffix(suffix)))


def _beside(folder: Path, word: str) -> Path:
    return folder.with_name(f"{folder.name}.{word}")


def _settle_one(folder: Path) -> None:
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    for leftover in (old, _beside(folder, "partial"), _beside(folder, "removed")):
        if leftover.exists():
            shutil.rmtree(leftover)


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, and which further names stand for which of them."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    views: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(f"tensor '{name}' must be dense and in memory to be stored, got {tensor.layout}")
        plain = tensor.detach().resolve_conj().resolve_neg()
        view = (plain.device, plain.data_ptr(), plain.dtype, tuple(plain.shape), plain.stride())
        storage = (plain.device, plain.untyped_storage().data_ptr())
        if plain.numel() and view in views:
            tied[name] = views[view]
            continue
        views[view] = name
        contiguous = plain.cpu().contiguous()
        shares = storage in storages and contiguous.data_ptr() == plain.data_ptr()
        stored[name] = contiguous.clone() if shares else contiguous
        storages.add(storage)
    return stored, tied


def _seal(path: Path) -> dict[str, Any]:
    """Make a file durable; its size and SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _verify(folder: Path) -> None:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        expected = {name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]) for name in _FILES}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete.") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged: it is not the manifest of a checkpoint.") from None
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}, this version reads {_FORMAT}.")
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing: the checkpoint is damaged.")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} is damaged: it must have {size} bytes, but has {path.stat().st_size}.")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the manifest.")


def pack_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser as (tensors named `prefix/...`, JSON), for `save`; the tensors are not copied.

    Holds the state of every parameter and the options of every group (the learning rate above all). Parameters
    are known by their order, shape, dtype and, where the optimiser was given names, their name.
    """
    tensors: dict[str, Tensor] = {}
    groups = []
    index = 0
    for number, group in enumerate(optimizer.param_groups):
        options = {}
        for key in _tensor_options(group):
            tensors[f"{prefix}/group/{number}/{key}"] = group[key]
        for key, value in group.items():
            if not isinstance(value, Tensor) and key not in ("params", "param_names"):
                options[key] = list(value) if isinstance(value, tuple) else value
        entries = []
        for parameter, described in zip(group["params"], _describe(group), strict=True):
            held = optimizer.state.get(parameter, {})
            entry = {**described, "tensors": [], "values": {}}
            for key, value in held.items():
                if isinstance(value, Tensor):
                    tensors[f"{prefix}/{index}/{key}"] = value
                    entry["tensors"].append(key)
                else:
                    entry["values"][key] = value
            entries.append(entry)
            index += 1
        groups.append({"options": options, "tensor_options": _tensor_options(group), "parameters": entries})
    return tensors, {"optimizer": type(optimizer).__name__, "groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], packed: Mapping[str, Any], prefix: str
) -> None:
    """Put what `pack_optimizer` returned into an optimiser over the same parameters, bit for bit.

    Options that only choose an implementation (foreach, fused, capturable, differentiable) stay as they are. Raises
    CheckpointError, before anything is changed, where kind, groups, parameters or tensors do not match.
    """
    _check_optimizer(optimizer, tensors, packed, prefix)
    index = 0
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, packed["groups"], strict=True)):
        for key, value in saved["options"].items():
            if key not in _IMPLEMENTATION:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for key in saved["tensor_options"]:
            group[key].copy_(tensors[f"{prefix}/group/{number}/{key}"])
        on_device = bool(group.get("capturable") or group.get("fused"))
        for parameter, entry in zip(group["params"], saved["parameters"], strict=True):
            held: dict[str, Any] = dict(entry["values"])
            for key in entry["tensors"]:
                # torch counts steps on the CPU unless the whole step runs on the device.
                device = torch.device("cpu") if key == "step" and not on_device else parameter.device
                held[key] = tensors[f"{prefix}/{index}/{key}"].to(device, copy=True)
            if held:
                optimizer.state[parameter] = held
            else:
                optimizer.state.pop(parameter, None)
            index += 1


def _tensor_options(group: Mapping[str, Any]) -> list[str]:
    """Options held as tensors, such as a learning rate that compiled code reads."""
    return sorted(key for key, value in group.items() if isinstance(value, Tensor))


def _describe(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = group.get("param_names", [None] * len(group["params"]))
    return [
        {"name": name, "shape": list(parameter.shape), "dtype": str(parameter.dtype)}
        for name, parameter in zip(names, group["params"], strict=True)
    ]


def _check_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], packed: Mapping[str, Any], prefix: str
) -> None:
    def refuse(what: str, here: object, stored: object) -> None:
        if here != stored:
            raise CheckpointError(f"optimiser '{prefix}': {what} must match the checkpoint's {stored}, got {here}.")

    refuse("its kind", type(optimizer).__name__, packed["optimizer"])
    refuse("the number of groups", len(optimizer.param_groups), len(packed["groups"]))
    needed = []
    index = 0
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, packed["groups"], strict=True)):
        described, entries = _describe(group), saved["parameters"]
        refuse(f"the number of parameters in group {number}", len(described), len(entries))
        for here, entry in zip(described, entries, strict=True):
            for field in ("name", "shape", "dtype"):
                refuse(f"the {field} of parameter {index}", here[field], entry[field])
            needed += [f"{prefix}/{index}/{key}" for key in entry["tensors"]]
            index += 1
        refuse(f"the tensor options of group {number}", _tensor_options(group), saved["tensor_options"])
        needed += [f"{prefix}/group/{number}/{key}" for key in saved["tensor_options"]]
    if missing := [name for name in needed if name not in tensors]:
        raise CheckpointError(f"optimiser '{prefix}': the checkpoint lacks {', '.join(missing[:3])}.")


def pack_generator(generator: torch.Generator) -> Tensor:
    """The state of a torch generator, uint8 on the CPU."""
    return generator.get_state()


def unpack_generator(generator: torch.Generator, state: Tensor) -> None:
    """Put a state back. Raises CheckpointError if it belongs to another kind of generator."""
    try:
        generator.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"the state does not fit a generator on {generator.device}: {error}.") from error


def pack_rng() -> dict[str, Tensor]:
    """The global random state of torch: `rng/cpu` and, where this process uses CUDA, `rng/cuda` of its device."""
    states = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["rng/cuda"] = torch.cuda.get_rng_state()
    return states


def unpack_rng(tensors: Mapping[str, Tensor]) -> None:
    """Put back what `pack_rng` returned; other names in `tensors` are ignored.

    Raises CheckpointError if it is missing, or if the run used CUDA and there is none here.
    """
    if "rng/cpu" not in tensors:
        raise CheckpointError("the checkpoint lacks 'rng/cpu', the random state of torch.")
    if "rng/cuda" in tensors:
        if not torch.cuda.is_available():
            raise CheckpointError("the checkpoint was made with CUDA, which is not available here: resume it there.")
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    torch.set_rng_state(tensors["rng/cpu"])


def pack_numpy(generator: np.random.Generator) -> dict[str, Any]:
    """The state of a numpy generator as JSON."""
    packed: dict[str, Any] = _plain(generator.bit_generator.state)
    return packed


def unpack_numpy(generator: np.random.Generator, packed: Mapping[str, Any]) -> None:
    """Put a state back. Raises CheckpointError if it belongs to another kind of generator."""
    kind = type(generator.bit_generator).__name__
    if packed.get("bit_generator") != kind:
        raise CheckpointError(f"the state must be one of {kind}, got {packed.get('bit_generator')}.")
    generator.bit_generator.state = _unplain(dict(packed))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value if isinstance(value, str) else int(value)


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"array", "dtype"}:
            return np.array(value["array"], dtype=value["dtype"])
        return {key: _unplain(item) for key, item in value.items()}
    return value
