"""The outputs of frozen layers on disk: computed once for a data set, read by everything that trains the layers above.

An entry holds the states before layer `cut` of a prompt's tokens, or of a response's. It belongs to these tokens, not
to their roles: chosen or rejected, in whatever pair, with another weight or margin, in a subset or in another file, the
same response finds the same entry. Several processes may fill and read one folder at once: a part is built under a lock
and renamed into its place when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steelyard.data.collate import collate
from steelyard.data.distinct import batches, distinct
from steelyard.data.encode import Tree
from steelyard.errors import InputError
from steelyard.models import scoring
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import Stored, in_parts, run_trunk

PARTS = 16  # locks of one folder: as many processes can build at once
SHARD_BYTES = 1 << 28  # of states: what a killed build loses at most
_INDEX = np.dtype([("key", np.uint8, (16,)), ("start", np.int64), ("tokens", np.int64)])
_STORED: dict[Stored, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}


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
        states: Stored = "float32",
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
        about = {
            "entries": "responses",
            "model": source,
            "layers": cut,
            "precision": model.precision,
            "states": states,
            "width": self.width,
        }
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(folder) / f"layers-{cut}-{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        _publish(self.folder / "about.json", lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))
        self._shards: dict[str, np.ndarray] = {}
        self._places: dict[bytes, tuple[str, int]] = {}

    def missing(self, trees: Iterable[Tree], max_tokens: int = 4096) -> list[Tree]:
        """What would have to be computed: trees with the responses that are not there yet, each once."""
        self._read()
        left = []
        for tree in trees:
            new = tuple(r for r in tree.responses if key(tree.prompt, r) not in self._places)
            if new:
                left.append(Tree(tree.prompt, new))
        return distinct(left, max_tokens)

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
        missing = self.missing(trees, max_tokens)
        known = (Tree(t.prompt, (r,)) for t in trees for r in t.responses if key(t.prompt, r) in self._places)
        if (one := next(known, None)) is not None:
            self._check(one)
        if not missing:
            return 0
        self._require_room(missing, say)
        computed = 0
        parts: dict[int, list[Tree]] = {}
        for tree in missing:
            parts.setdefault(_part(tree), []).append(tree)
        # First the parts that nobody else is building, beginning anywhere; then those that somebody was.
        order = sorted(parts, key=lambda part: (part - os.getpid()) % PARTS)
        for patient in (False, True):
            for part in order:
                computed += self._fill(parts[part], part, patient, max_tokens, on_tokens)
        return computed

    def states(self, trees: Sequence[Tree]) -> Float[Tensor, "T D"]:
        """States before layer `cut`, float32, in the order in which `collate` lays out these trees."""
        rows = []
        for tree in trees:
            for entry, tokens in _entries(tree):
                shard, start = self._place(tree, entry)
                rows.append(self._shards[shard][start : start + tokens])
        stored = torch.from_numpy(np.concatenate(rows))
        states = stored.view(torch.bfloat16) if self._stored == np.uint16 else stored
        return states.float().to(self.model.device)

    def rewards(self, trees: Sequence[Tree], *, pad_id: int) -> Float[Tensor, "B K"]:
        """What `model(collate(trees))` gives, with the gradient of the layers above the cut."""
        model = self.model
        batch = collate(trees, pad_id, model.device)
        states = self.states(trees)
        top = run_trunk(model.trunk, batch, model.precision, first=self.cut, states_TD=states, read="scored")
        rewards: Tensor = model.head(top.states_TD.view(*batch.last_BK.shape, -1).float()).squeeze(-1)
        return rewards

    def score(self, trees: Sequence[Tree], *, pad_id: int, max_tokens: int = 8192) -> Float[np.ndarray, "N K"]:
        """`RewardModel.score` with the lower layers read; responses that are not there yet are added."""
        return self.score_sets({"": trees}, pad_id=pad_id, max_tokens=max_tokens)[""]

    @torch.no_grad()
    def score_sets(
        self, sets: Mapping[str, Sequence[Tree]], *, pad_id: int, max_tokens: int = 8192
    ) -> dict[str, Float[np.ndarray, "N K"]]:
        """`score` for several sets; what they share is computed once."""
        self.prepare([t for trees in sets.values() for t in trees], max_tokens=max_tokens)
        with _evaluating(self.model):
            return scoring.score_sets(lambda trees: self.rewards(trees, pad_id=pad_id).cpu(), sets, max_tokens)

    def _place(self, tree: Tree, entry: bytes) -> tuple[str, int]:
        if entry not in self._places:
            self.prepare([tree])
        shard, start = self._places[entry]
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

    def _require_room(self, missing: Sequence[Tree], say: Callable[[str], None] | None) -> None:
        need = sum(tokens for own in self._new(missing) for _, _, tokens in own) * self.width * self._stored.itemsize
        free = shutil.disk_usage(self.folder).free
        responses = sum(len(t.responses) for t in missing)
        what = (
            f"outputs of {self.cut} frozen layers for {responses} responses: {_size(need)} to {self.folder}, "
            f"{_size(free)} free"
        )
        if need > 0.95 * free:
            raise InputError(
                f"{what}; free the disk, name another folder (activation_cache), store them as bfloat16 "
                "(activation_precision), or use fewer pairs"
            )
        if say is not None:
            say(what)

    def _new(self, trees: Sequence[Tree]) -> list[list[tuple[bytes, int, int]]]:
        """Of each tree the entries that neither the folder nor a tree before it has: (key, place in it, tokens)."""
        seen: set[bytes] = set()
        found = []
        for tree in trees:
            own, at = [], 0
            for entry, tokens in _entries(tree):
                if entry not in self._places and entry not in seen:
                    seen.add(entry)
                    own.append((entry, at, tokens))
                at += tokens
            found.append(own)
        return found

    def _fill(
        self,
        mine: Sequence[Tree],
        part: int,
        patient: bool,
        max_tokens: int,
        on_tokens: Callable[[int], None] | None,
    ) -> int:
        """Build what is missing of one part, unless another process is at it (`patient`: wait for that process)."""
        if not self.missing(mine, max_tokens):
            return 0
        computed = 0
        with lock(self.folder / f"part-{part:x}.lock", wait=patient) as held:
            if held is False:
                return 0
            mine = self.missing(mine, max_tokens)
            # Where there are no locks, another process's build must not be taken for a killed one.
            for leftover in self.folder.glob(f".part-{part:x}-*") if held else ():
                leftover.unlink(missing_ok=True)
            for share in self._shares(mine):
                self._build(part, share, max_tokens, on_tokens)
                computed += sum(map(len, share))
                self._read()
        return computed

    def _shares(self, trees: Sequence[Tree]) -> Iterator[list[Tree]]:
        """The trees in shards of bounded size."""
        share: list[Tree] = []
        size = 0
        for tree in trees:
            share.append(tree)
            size += len(tree) * self.width * self._stored.itemsize
            if size >= SHARD_BYTES:
                yield share
                share, size = [], 0
        if share:
            yield share

    @torch.no_grad()
    def _build(
        self, part: int, trees: Sequence[Tree], max_tokens: int, on_tokens: Callable[[int], None] | None
    ) -> None:
        new = self._new(trees)
        entries = [entry for own in new for entry, _, _ in own]
        lengths = np.array([tokens for own in new for _, _, tokens in own])
        starts = np.cumsum(lengths) - lengths
        to = dict(zip(entries, starts.tolist(), strict=True))
        stored = dict(zip(trees, new, strict=True))
        shard = f"part-{part:x}-{hashlib.sha256(b''.join(entries)).hexdigest()[:16]}"

        def write(path: Path) -> None:
            out = np.lib.format.open_memmap(path, mode="w+", dtype=self._stored, shape=(int(lengths.sum()), self.width))
            for group in batches(trees, max_tokens):
                states = self._compute(group)
                root = 0
                for tree in group:
                    for entry, at, tokens in stored[tree]:
                        out[to[entry] : to[entry] + tokens] = states[root + at : root + at + tokens]
                    root += len(tree)
                if on_tokens is not None:
                    on_tokens(root)
            out.flush()

        index = np.zeros(len(entries), _INDEX)
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
        """Raise InputError unless the stored states of a tree are what the model computes now."""
        with _evaluating(self.model):
            now = self._compute([tree])
        there = self.states([tree]).cpu().numpy()
        if self._stored == np.uint16:
            now = torch.from_numpy(now).view(torch.bfloat16).float().numpy()
        coarse = self._stored == np.uint16 or self.model.precision == "bfloat16"
        difference = float(np.abs(now - there).max() / np.abs(now).max())
        if not difference < (3e-2 if coarse else 1e-3):
            raise InputError(
                f"{self.folder}: holds the outputs of other weights or of another version (relative difference "
                f"{difference:.2g}); delete it, or name another folder (activation_cache)"
            )


def key(prompt: Sequence[int], response: Sequence[int] = ()) -> bytes:
    """16 bytes that stand for the tokens of a response to a prompt, or with no response of the prompt itself."""
    digest = hashlib.blake2b(np.int64(len(prompt)).tobytes(), digest_size=16)
    digest.update(np.array([*prompt, *response], np.int64).tobytes())
    return digest.digest()


def _entries(tree: Tree) -> list[tuple[bytes, int]]:
    """(key, tokens) of the prompt and of each response, as `collate` lays them out."""
    return [(key(tree.prompt), len(tree.prompt)), *((key(tree.prompt, r), len(r)) for r in tree.responses)]


def _part(tree: Tree) -> int:
    """All responses to a prompt are built together."""
    return key(tree.prompt)[0] % PARTS


@contextlib.contextmanager
def _evaluating(model: RewardModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[bool | None]:
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
