"""The outputs of frozen layers on disk: computed once for a data set, read by everything that trains the layers above.

An entry holds the states of all tokens of one tree before layer `cut`. It belongs to the tree's tokens, not to their
roles: with chosen and rejected swapped, with another weight or margin, in a subset or in another file, the same pair
finds the same entry. Several processes may fill and read one folder at once: a part is built under a lock and renamed
into its place when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steelyard.data.collate import collate, pack
from steelyard.data.encode import Tree
from steelyard.errors import InputError
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import Precision, in_parts, run_trunk

PARTS = 16  # locks of one folder: as many processes can build at once
SHARD_BYTES = 1 << 28  # of states: what a killed build loses at most
_INDEX = np.dtype([("key", np.uint8, (16,)), ("start", np.int64), ("tokens", np.int64)])
_STORED: dict[Precision, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}


def _require_parts(model: RewardModel) -> None:
    if not in_parts(model.trunk):
        raise InputError(
            f"{type(model.trunk).__name__}: only Llama, Mistral and Qwen style models can be run in parts, so the "
            "outputs of frozen layers cannot be kept; leave out activation_cache"
        )


def lower_layers(model: RewardModel, cut: int) -> str:
    """A digest of what decides the states before layer `cut`: embeddings, layers below, the trunk's shape.

    A model keeps it through training of the layers above, whatever folder it is saved in. Raises InputError if the
    model cannot be run in parts.
    """
    _require_parts(model)
    trunk: Any = model.trunk
    config = trunk.config.get_text_config().to_dict()
    # What a folder says about itself, its head and its tokens changes no state.
    told = {k: v for k, v in config.items() if k.startswith(("rope", "rms", "layer", "hidden", "head", "num_"))}
    digest = hashlib.sha256(json.dumps([type(trunk).__name__, told], sort_keys=True, default=str).encode())
    for module in (trunk.embed_tokens, *trunk.layers[:cut]):
        for name, weight in module.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class TrunkCache:
    """Scores trees with `model`, whose layers below `cut` are read from `folder` where they would be computed.

    Args:
        folder: of the cache; may be shared by models, cuts and data sets.
        model: a reward model whose lower layers are frozen. Only Llama-like stacks can be run in parts.
        source: what tells the lower layers from others: `lower_layers`.
        cut: layers that are frozen, 1 ... all of them.
        states: how states are stored. float32 changes nothing; bfloat16 halves the file and rounds the layers' input.

    Raises:
        InputError: the model cannot be run in parts, or `cut` is not one of its layers.
    """

    def __init__(
        self,
        folder: str | Path,
        model: RewardModel,
        *,
        source: str,
        cut: int,
        states: Precision = "float32",
    ) -> None:
        depth = int(model.hf.config.get_text_config().num_hidden_layers)
        _require_parts(model)
        if not 1 <= cut <= depth:
            raise InputError(
                f"the outputs of {cut} frozen layers cannot be kept: the model has {depth}, of which at least one must "
                "be frozen; lower trainable_layers, or leave out activation_cache"
            )
        self.model, self.cut = model, cut
        self.width = int(model.hf.config.get_text_config().hidden_size)
        self._stored = _STORED[states]
        about = {"model": source, "layers": cut, "precision": model.precision, "states": states, "width": self.width}
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(folder) / f"layers-{cut}-{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        _publish(self.folder / "about.json", lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))
        self._shards: dict[str, np.ndarray] = {}
        self._places: dict[bytes, tuple[str, int]] = {}

    def missing(self, trees: Sequence[Tree]) -> dict[bytes, Tree]:
        """Those of the trees that are not there yet, by their key."""
        self._read()
        return {k: t for t in trees if (k := key(t)) not in self._places}

    def prepare(
        self,
        trees: Sequence[Tree],
        *,
        max_tokens: int = 4096,
        say: Callable[[str], None] | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> int:
        """Compute what is missing; returns the number of tokens computed here.

        `say` is told the size before anything is written, `on_tokens` how many tokens each step computed. What
        another process is building is waited for.

        Raises InputError if the disk has no room, or if entries that are there were made by other weights.
        """
        missing = self.missing(trees)
        if known := next((t for t in trees if key(t) in self._places), None):
            self._check(known)
        if not missing:
            return 0
        self._require_room(missing, say)
        computed = 0
        parts = {k[0] % PARTS for k in missing}
        # First the parts that nobody else is building, beginning anywhere; then those that somebody was.
        order = sorted(parts, key=lambda part: (part - os.getpid()) % PARTS)
        for patient in (False, True):
            for part in order:
                computed += self._fill(missing, part, patient, max_tokens, on_tokens)
        return computed

    def states(self, trees: Sequence[Tree]) -> Float[Tensor, "T D"]:
        """States before layer `cut`, float32, in the order in which `collate` lays out these trees."""
        rows = []
        for tree in trees:
            shard, start = self._place(tree)
            order = _order(tree)
            at = start + len(tree.prompt)
            rows.append(self._shards[shard][start:at])
            place = {}
            for k in order:
                place[k] = self._shards[shard][at : at + len(tree.responses[k])]
                at += len(tree.responses[k])
            rows += [place[k] for k in range(len(tree.responses))]
        stored = torch.from_numpy(np.concatenate(rows))
        states = stored.view(torch.bfloat16) if self._stored == np.uint16 else stored
        return states.float().to(self.model.device)

    def rewards(self, trees: Sequence[Tree], *, pad_id: int) -> Float[Tensor, "B K"]:
        """What `model(collate(trees))` gives, with the gradient of the layers above the cut."""
        model = self.model
        batch = collate(trees, pad_id, model.device)
        states = self.states(trees)
        top = run_trunk(model.trunk, batch, model.precision, first=self.cut, states_TD=states, scored_only=True)
        rewards: Tensor = model.head(top.states_TD.view(*batch.last_BK.shape, -1).float()).squeeze(-1)
        return rewards

    @torch.no_grad()
    def score(self, trees: Sequence[Tree], *, pad_id: int, max_tokens: int = 8192) -> Float[np.ndarray, "N K"]:
        """`RewardModel.score` with the lower layers read; trees that are not there yet are added."""
        self.prepare(trees, max_tokens=max_tokens)
        rewards = np.zeros((len(trees), len(trees[0].responses) if trees else 0), dtype=np.float32)
        with _evaluating(self.model):
            for group in pack([len(t) for t in trees], max_tokens):
                rewards[group] = self.rewards([trees[i] for i in group], pad_id=pad_id).cpu().numpy()
        return rewards

    def score_sets(
        self, sets: Mapping[str, Sequence[Tree]], *, pad_id: int, max_tokens: int = 8192
    ) -> dict[str, Float[np.ndarray, "N K"]]:
        """`score` for several sets that share pairs, in either order: every pair is computed once."""
        distinct = {key(t): t for trees in sets.values() for t in trees}
        rewards = self.score(list(distinct.values()), pad_id=pad_id, max_tokens=max_tokens)
        known = {
            k: dict(zip(t.responses, row, strict=True)) for (k, t), row in zip(distinct.items(), rewards, strict=True)
        }
        return {
            name: np.array([[known[key(t)][r] for r in t.responses] for t in trees], dtype=np.float32)
            for name, trees in sets.items()
        }

    def _place(self, tree: Tree) -> tuple[str, int]:
        name = key(tree)
        if name not in self._places:
            self.prepare([tree])
        shard, start = self._places[name]
        if shard not in self._shards:
            self._shards[shard] = self._open(shard)
        return shard, start

    def _open(self, shard: str) -> np.ndarray:
        path = self.folder / f"{shard}.npy"
        try:
            found: np.ndarray = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: a damaged part of an activation cache ({error}); delete {self.folder}") from None
        if found.dtype != self._stored or found.ndim != 2 or found.shape[1] != self.width:
            raise InputError(f"{path}: not what its name says ({found.dtype}, {found.shape}); delete {self.folder}")
        return found

    def _read(self) -> None:
        """Learn of shards that were finished since the last look."""
        known = {shard for shard, _ in self._places.values()}
        for path in sorted(self.folder.glob("*.index.npy")):
            shard = path.name.removesuffix(".index.npy")
            if shard in known:
                continue
            try:
                index = np.load(path)
                rows = zip(index["key"], index["start"].tolist(), strict=True)
            except (OSError, ValueError, IndexError) as error:
                raise InputError(f"{path}: a damaged index ({error}); delete {self.folder}") from None
            self._places |= {k.tobytes(): (shard, start) for k, start in rows}

    def _require_room(self, missing: Mapping[bytes, Tree], say: Callable[[str], None] | None) -> None:
        need = sum(map(len, missing.values())) * self.width * self._stored.itemsize
        free = shutil.disk_usage(self.folder).free
        what = (
            f"outputs of {self.cut} frozen layers for {len(missing)} trees: {_size(need)} to {self.folder}, "
            f"{_size(free)} free"
        )
        if need > 0.95 * free:
            raise InputError(
                f"{what}; free the disk, name another folder (activation_cache), store them as bfloat16 "
                "(activation_precision), or use fewer pairs"
            )
        if say is not None:
            say(what)

    def _fill(
        self,
        missing: Mapping[bytes, Tree],
        part: int,
        patient: bool,
        max_tokens: int,
        on_tokens: Callable[[int], None] | None,
    ) -> int:
        """Build one part's missing entries, unless another process is at it (`patient`: wait for that process)."""
        mine = {k: t for k, t in missing.items() if k[0] % PARTS == part and k not in self._places}
        if not mine:
            return 0
        computed = 0
        with _lock(self.folder / f"part-{part:x}.lock", wait=patient) as held:
            if held is False:
                return 0
            self._read()
            mine = {k: t for k, t in mine.items() if k not in self._places}
            # Where there are no locks, another process's build must not be taken for a killed one.
            for leftover in self.folder.glob(f".part-{part:x}-*") if held else ():
                leftover.unlink(missing_ok=True)
            for keys in self._shares(mine):
                self._build(part, {k: mine[k] for k in keys}, max_tokens, on_tokens)
                computed += sum(len(mine[k]) for k in keys)
            self._read()
        return computed

    def _shares(self, entries: Mapping[bytes, Tree]) -> Iterator[list[bytes]]:
        """The entries in shards of bounded size."""
        share: list[bytes] = []
        size = 0
        for k, tree in entries.items():
            share.append(k)
            size += len(tree) * self.width * self._stored.itemsize
            if size >= SHARD_BYTES:
                yield share
                share, size = [], 0
        if share:
            yield share

    @torch.no_grad()
    def _build(
        self, part: int, entries: Mapping[bytes, Tree], max_tokens: int, on_tokens: Callable[[int], None] | None
    ) -> None:
        trees = [canonical(t) for t in entries.values()]
        lengths = np.array([len(t) for t in trees])
        starts = np.cumsum(lengths) - lengths
        shard = f"part-{part:x}-{hashlib.sha256(b''.join(entries)).hexdigest()[:16]}"

        def write(path: Path) -> None:
            out = np.lib.format.open_memmap(path, mode="w+", dtype=self._stored, shape=(int(lengths.sum()), self.width))
            for group in pack(lengths.tolist(), max_tokens):
                states = self._compute([trees[i] for i in group])
                at = 0
                for i in group:
                    out[starts[i] : starts[i] + lengths[i]] = states[at : at + lengths[i]]
                    at += int(lengths[i])
                if on_tokens is not None:
                    on_tokens(at)
            out.flush()

        index = np.zeros(len(trees), _INDEX)
        index["key"] = np.frombuffer(b"".join(entries), np.uint8).reshape(-1, 16)
        index["start"], index["tokens"] = starts, lengths
        with _evaluating(self.model):
            _publish(self.folder / f"{shard}.npy", write)
        # The index comes last: what it names is whole.
        _publish(self.folder / f"{shard}.index.npy", lambda path: _save(path, index))

    @torch.no_grad()
    def _compute(self, trees: Sequence[Tree]) -> np.ndarray:
        batch = collate(trees, 0, self.model.device)  # no state depends on padding
        states = run_trunk(self.model.trunk, batch, self.model.precision, last=self.cut).states_TD.float().cpu()
        if self._stored == np.uint16:
            return states.bfloat16().view(torch.uint16).numpy()
        found: np.ndarray = states.numpy()
        return found

    def _check(self, tree: Tree) -> None:
        """Raise InputError unless a stored entry is what the model computes now."""
        with _evaluating(self.model):
            now = self._compute([canonical(tree)])
        shard, start = self._place(tree)
        there = self._shards[shard][start : start + len(tree)]
        if self._stored == np.uint16:
            now, there = (torch.from_numpy(x.copy()).view(torch.bfloat16).float().numpy() for x in (now, there))
        coarse = self._stored == np.uint16 or self.model.precision == "bfloat16"
        difference = float(np.abs(now - there).max() / np.abs(now).max())
        if not difference < (3e-2 if coarse else 1e-3):
            raise InputError(
                f"{self.folder}: holds the outputs of other weights or of another version (relative difference "
                f"{difference:.2g}); delete it, or name another folder (activation_cache)"
            )


def canonical(tree: Tree) -> Tree:
    """The tree with its responses in an order that does not depend on which one was chosen."""
    return Tree(tree.prompt, tuple(tree.responses[k] for k in _order(tree)))


def key(tree: Tree) -> bytes:
    """16 bytes that stand for the tree's tokens, whichever response comes first."""
    parts = (tree.prompt, *(tree.responses[k] for k in _order(tree)))
    digest = hashlib.blake2b(np.array([len(parts), *map(len, parts)], np.int64).tobytes(), digest_size=16)
    for part in parts:
        digest.update(np.array(part, np.int64).tobytes())
    return digest.digest()


def _order(tree: Tree) -> list[int]:
    return sorted(range(len(tree.responses)), key=lambda k: tree.responses[k])


@contextlib.contextmanager
def _evaluating(model: RewardModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[bool | None]:
    """Whether this process holds the lock inside; None where there are no locks (some cluster file systems)."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    held: bool | None = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            held = None
        yield held
    finally:
        os.close(handle)


def _publish(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the place, then rename into it: a reader sees the whole file or none."""
    partial = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    write(partial)
    os.replace(partial, path)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
