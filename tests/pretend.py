"""A second device that is only pretended: tensors that say they are on `cuda` and lie in the CPU's memory.

It stands in for a GPU where there is none. Whoever mixes tensors of the two places, reads one without asking for it
on the CPU, or loses the device on the way is refused as on a GPU; everything else is computed with the CPU's
operations, so that results can be compared. Torch's own FakeTensorMode cannot do this: on a build without CUDA the
backward pass of its CUDA tensors aborts the process, and it stops wherever a number is read.

Not seen: kernels of the GPU, FlexAttention (its rule is computed by plain products here), fused optimisers' kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
# Of what autograd makes by itself in a backward pass, there on the gradient's device: it is where it is used.
ANYWHERE = torch.device("meta")
_aten = torch.ops.aten
_ACROSS = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default}


class DeviceMismatch(RuntimeError):
    """Tensors of two devices met, as a GPU would refuse."""


class Pretence:
    """Which storages are on the pretended GPU, and how often numbers there were read."""

    def __init__(self) -> None:
        # The storages are kept alive, so that no address is used twice.
        self.places: dict[int, tuple[torch.device, torch.UntypedStorage]] = {}
        self.reads: Counter[str] = Counter()
        self.calls = 0  # from Python that are going on

    def of(self, x: Tensor) -> torch.device:
        """Where a tensor pretends to be."""
        return self.places[x.untyped_storage()._cdata][0] if x.untyped_storage()._cdata in self.places else CPU

    def put(self, found: Any, device: torch.device) -> Any:
        """Say of every tensor in `found` that it is on `device`; returns `found`."""
        for x in tree_iter(found):
            if isinstance(x, Tensor):
                self.places[x.untyped_storage()._cdata] = device, x.untyped_storage()
        return found


class _Operations(TorchDispatchMode):
    """Sees every operation, those of backward passes too."""

    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self.pretence = pretence

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        here = [self.pretence.of(x) for x in tensors]
        made_by_autograd = not tensors and not self.pretence.calls
        device = CUDA if CUDA in here else ANYWHERE if ANYWHERE in here or made_by_autograd else CPU
        if device == CUDA and func not in _ACROSS:
            self._check(func, args, tensors, here)
            if func in _READS:
                self.pretence.reads[func.overloadpacket.__name__] += 1
            if func in _INDEXED and any(x.dtype == torch.bool for x in tree_iter(args[1]) if isinstance(x, Tensor)):
                self.pretence.reads["places where a mask is true"] += 1  # how many there are is read
            self.pretence.put([x for x, at in zip(tensors, here, strict=True) if at == ANYWHERE], CUDA)
        with torch._C.DisableTorchFunction():
            found = func(*args, **(kwargs or {}))
        for x in tree_iter(found):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.pretence.places:
                self.pretence.put(x, device)
        return found

    def _check(self, func: Any, args: Any, tensors: list[Tensor], here: list[torch.device]) -> None:
        # A CPU tensor of no dimension counts as a number, and the CPU's indices are moved where they are needed.
        free = {id(x) for x in tree_iter(args[1])} if func in _INDEXED and self.pretence.of(args[0]) == CUDA else set()
        wrong = [x for x, place in zip(tensors, here, strict=True) if place == CPU and x.dim() and id(x) not in free]
        if wrong:
            raise DeviceMismatch(f"{func}: tensors on cuda meet one on the CPU of shape {tuple(wrong[0].shape)}")


class _Calls(TorchFunctionMode):
    """Sees every call from Python: which device is asked for, and who asks where a tensor is."""

    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self.pretence = pretence

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.pretence.calls += 1
        try:
            return self._call(func, args, dict(kwargs or {}))
        finally:
            self.pretence.calls -= 1

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return CUDA if self.pretence.of(args[0]) == CUDA else func(*args)
        if func in (Tensor.numpy, Tensor.__array__) and self.pretence.of(args[0]) == CUDA:
            raise DeviceMismatch("a tensor on cuda cannot be read as an array; use .cpu() first")
        if func in (Tensor.to, Tensor.cpu):
            return self._move(func, args, kwargs)
        asked = _device(kwargs.get("device"))
        if asked is None:
            return func(*args, **kwargs)
        return self.pretence.put(func(*args, **kwargs | {"device": CPU}), asked)

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        x, asked = args[0], [*args[1:], *kwargs.values()]
        if any(isinstance(a, str | torch.device) and _device(a) is None for a in asked):
            other_kind: Tensor = func(*args, **kwargs)
            return other_kind
        wanted = CPU if func is Tensor.cpu else next((d for d in map(_device, asked) if d), self.pretence.of(x))
        dtype = next((a for a in asked if isinstance(a, torch.dtype)), x.dtype)
        other: Tensor = func(x, dtype) if func is Tensor.to else x
        if wanted == self.pretence.of(x):
            return other
        if self.pretence.of(x) == CUDA:
            self.pretence.reads["copy to the CPU"] += 1
        moved: Tensor = self.pretence.put(torch.clone(other), wanted)
        return moved


def _device(value: Any) -> torch.device | None:
    """CPU or CUDA by name; None for anything else, meta tensors too."""
    if isinstance(value, str | torch.device):
        return {"cuda": CUDA, "cpu": CPU}.get(torch.device(value).type)
    return None


def _backward(loss: Tensor) -> None:
    """Tensor.backward as a call that the modes do not see: what it calls in turn they then do."""
    run = torch.autograd.graph._engine_run_backward
    run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _dense(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: float, enable_gqa: bool) -> Tensor:
    """FlexAttention by plain products: (1, H, T, d) each."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~block_mask, -torch.inf)
    return scores.softmax(-1) @ v


def _sees(batch: Any, read: bool) -> Tensor:
    place, tree, branch = torch.arange(batch.tokens, device=batch.ids_T.device), batch.tree_T, batch.branch_T
    own = (branch == 0) | (branch == branch[:, None])
    sees: Tensor = (place <= place[:, None]) & (tree == tree[:, None]) & own
    return sees[batch.read_n] if read else sees


@contextmanager
def pretended_gpu() -> Iterator[Pretence]:
    """Inside, one GPU is there, and `cuda` names it."""
    pretence = Pretence()
    with (
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(Tensor, "backward", _backward),
        # Hooks of saved tensors run inside a call on the way forth, where the true device is seen.
        mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=lambda x: (x.shape, x.dtype)),
        mock.patch.object(torch, "Generator", side_effect=lambda device="cpu", make=torch.Generator: make()),
        mock.patch("steelyard.models.attention._compiled_flex", return_value=_dense),
        mock.patch("steelyard.models.attention._block_mask", _sees),
        _Calls(pretence),
        _Operations(pretence),
    ):
        yield pretence
