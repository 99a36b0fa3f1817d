"""A language model's layers over flat rows of trees.

For layers built like Llama's (also Mistral, Qwen 2 and 3) the layer is written out here: the residual stream stays
float32, the products run in the precision asked for, and nothing is computed for padding. Other models, and layers
that carry adapters or hooks, run their own code with the attention of trees in the place of theirs. `models.load`
checks at every opening that this gives the model's own numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from steelyard.data.collate import Reads, TreeBatch, fill
from steelyard.errors import InputError
from steelyard.models.attention import tree_attention
from steelyard.models.pointwise import rms_norm, rotate, swiglu

Stored = Literal["float32", "bfloat16"]
Precision = Literal["float32", "bfloat16", "auto"]  # auto: configurations put `config.fastest_precision` in its place

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
# A product in bfloat16 takes milliseconds longer where it meets a number of rows for the first time: few are met.
_ROWS = 64
_ATTENTION = "steelyard_trees"


class TrunkOutput(NamedTuple):
    """`states_TD` after the last layer and the final norm, or before layer `last`; `collected`: the states that were
    asked for, by number (0: the embeddings; n: after n layers, without the final norm)."""

    states_TD: Float[Tensor, "T D"]
    collected: dict[int, Float[Tensor, "T D"]]


def autocast(precision: Precision, device: torch.device) -> Any:
    """The trunk's arithmetic: float32, or bfloat16 products with float32 weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def run_trunk(
    trunk: nn.Module,
    batch: TreeBatch,
    precision: Precision = "float32",
    *,
    first: int = 0,
    states_TD: Float[Tensor, "T D"] | None = None,
    last: int | None = None,
    collect: Sequence[int] = (),
    read: Literal["all"] | Reads = "all",
) -> TrunkOutput:
    """The states of every token of the batch; with `read` "scored" of the B K scored tokens, in their order; with
    "responses" T rows of which only those before response tokens are to be read.

    For a batch that was collated for this reading, the last layer computes nothing else.

    `first` with `states_TD` starts before layer `first` (0-based) from these states; `last` stops before layer `last`
    and leaves out the final norm.

    Raises InputError if a text is longer than a sliding window or than the model's places and rotation reach, has
    tokens that the model does not know (on a CPU; a GPU would have to wait), or the model cannot be run in parts.
    """
    require_window(trunk, batch)
    _require_known(trunk, batch)
    require_positions(trunk, lambda: int(batch.positions_T.max()) + 1)
    rows = batch.tokens
    if precision == "bfloat16" and batch.ids_T.device.type == "cpu":
        batch = fill(batch, _ROWS)
        if states_TD is not None:
            states_TD = F.pad(states_TD, (0, 0, 0, batch.tokens - rows))
    if not in_parts(trunk):
        if first or states_TD is not None or last is not None:
            raise InputError(f"{type(trunk).__name__}: only Llama, Mistral and Qwen style models can be run in parts")
        output = _whole(trunk, batch, precision, collect)
        if read == "scored":
            output = output._replace(states_TD=output.states_TD[batch.last_BK.flatten()])
    else:
        output = _in_parts(trunk, batch, precision, first, states_TD, last, collect, read)
    return TrunkOutput(output.states_TD[:rows], {n: x[:rows] for n, x in output.collected.items()})


def _in_parts(
    parts: Any,
    batch: TreeBatch,
    precision: Precision,
    first: int,
    states_TD: Tensor | None,
    last: int | None,
    collect: Sequence[int],
    read: Literal["all"] | Reads,
) -> TrunkOutput:
    depth = len(parts.layers)
    x = parts.embed_tokens(batch.ids_T) if states_TD is None else states_TD
    # bfloat16 tables would put a token's position off by several places.
    cos, sin = (t[0] for t in parts.rotary_emb(x[None].float(), batch.positions_T[None]))
    collected = {}
    rest: Tensor | None = None  # what the layer before has yet to add to x
    for number in range(first, depth if last is None else last):
        layer = parts.layers[number]
        plain = _plain(layer)
        if rest is not None and (number in collect or not plain):
            x, rest = x + rest, None
        if number in collect:
            collected[number] = x
        if not plain:
            x = _own_code(parts, layer, x, cos, sin, batch, precision)
            continue
        norm = _norm_of(layer.input_layernorm, precision)
        x = x if rest is None else x + rest
        h = rms_norm(x, *norm)
        # Behind the last attention only some tokens' states are read.
        few = read == batch.reads and number == depth - 1 and depth not in collect
        x, rest = _layer(layer, x, h, (cos, sin), batch, precision, few)
    if rest is not None:
        x = x + rest
    if last is None:
        if depth in collect:
            collected[depth] = x
        some = len(x) < batch.tokens
        if read == "scored" and not some:
            x = x[batch.last_BK.flatten()]
        x = parts.norm(x)
        if read == "responses" and some:
            x = x.new_zeros(batch.tokens, x.shape[-1]).index_copy(0, batch.read_n, x)
    return TrunkOutput(x, collected)


def require_window(trunk: nn.Module, batch: TreeBatch) -> None:
    """Raise InputError if a text is longer than what a layer with a sliding window sees."""
    window = attention_window(trunk)
    if window is not None and int(batch.positions_T.max()) >= window:
        # Who sees whom is decided by the trees alone: the window would be silently left out.
        raise InputError(
            f"{type(trunk).__name__}: a text has {int(batch.positions_T.max()) + 1} tokens, more than the model's "
            f"sliding window of {window}; set max_length to at most {window}, or use a model without a window"
        )


def _require_known(trunk: nn.Module, batch: TreeBatch) -> None:
    config: Any = trunk.config
    size = config.get_text_config().vocab_size
    if batch.ids_T.device.type == "cpu" and (most := int(batch.ids_T.max())) >= size:
        raise InputError(
            f"{type(trunk).__name__}: the tokenizer gives token {most}, but the model knows {size} (0 to {size - 1}): "
            "they do not belong together; put the model's own tokenizer into its folder"
        )


def attention_window(trunk: nn.Module) -> int | None:
    """Tokens that a layer with a sliding window sees; None where every layer sees the whole text."""
    config: Any = trunk.config
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    window: int | None = getattr(text, "sliding_window", None)
    return window


def require_positions(trunk: nn.Module, longest: Callable[[], int]) -> None:
    """Raise InputError if texts of up to `longest()` tokens have places that the model has not learned, or would be
    rotated by angles that depend on each other.

    `dynamic` and `longrope` turn all texts of a pass by other angles once its longest is longer than what the model was
    first trained on: a text's numbers would then depend on its neighbours.
    """
    if any(isinstance(getattr(trunk, name, None), nn.Embedding) for name in ("wpe", "embed_positions")):
        learned: Any = trunk.config
        if (length := longest()) > (most := int(learned.max_position_embeddings)):
            raise InputError(
                f"{type(trunk).__name__}: a text has up to {length} tokens, but the model knows {most} places; keep "
                f"prompt and response to {most} tokens (max_length, max_new_tokens)"
            )
    kinds = getattr(getattr(trunk, "rotary_emb", None), "rope_type", "")
    if not {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else (kinds,)):
        return
    config: Any = trunk.config
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    most = int(rope.get("original_max_position_embeddings") or text.max_position_embeddings)
    if (length := longest()) > most:
        raise InputError(
            f"{type(trunk).__name__}: for texts of up to {length} tokens, beyond {most}, this model rotates all of a "
            f"batch by the longest (rope_type dynamic or longrope); keep prompt and response to {most} tokens"
        )


def in_parts(trunk: nn.Module) -> bool:
    """Whether the model is a stack of Llama-like layers, which can be run one by one."""
    layers = getattr(trunk, "layers", None)
    return bool(layers) and all(type(layer).__name__ in _LAYERS for layer in layers)  # type: ignore[union-attr]


def _plain(layer: Any) -> bool:
    """Whether the written-out layer computes what this layer does: no adapters, no hooks, SiLU."""
    attention, mlp = layer.self_attn, layer.mlp
    linear = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (layer, attention, mlp))
    return (
        not hooked
        and all(type(m) is nn.Linear for m in linear)
        and type(layer.input_layernorm).__name__ in _NORMS
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )


def _layer(
    layer: Any,
    x: Tensor,
    h: Tensor,
    rotary: tuple[Tensor, Tensor],
    batch: TreeBatch,
    precision: Precision,
    few: bool,
) -> tuple[Tensor, Tensor]:
    """(states, what the MLP adds to them); the addition is left to the next layer's norm. `h`: the normed states.

    With `few` all tokens are keys, but only `batch.read_n` are queries.
    """
    attention, mlp = layer.self_attn, layer.mlp
    d = attention.head_dim
    k, v = (_linear(m, h, precision).view(len(h), -1, d) for m in (attention.k_proj, attention.v_proj))
    at = rotary
    if few:
        x, h = (t.index_select(0, batch.read_n) for t in (x, h))
        at = (rotary[0][batch.read_n], rotary[1][batch.read_n])
    q = _linear(attention.q_proj, h, precision).view(len(h), -1, d)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    # Qwen 3's norms of queries and keys give float32.
    q, k = rotate(q, *at).to(v.dtype), rotate(k, *rotary).to(v.dtype)
    o = tree_attention(q, k, v, batch, attention.scaling, read=few)
    y = _linear(attention.o_proj, o.reshape(len(x), -1), precision)
    x = x + y
    h = rms_norm(x, *_norm_of(layer.post_attention_layernorm, precision))
    h = swiglu(_linear(mlp.gate_proj, h, precision), _linear(mlp.up_proj, h, precision))
    return x, _linear(mlp.down_proj, h, precision)


def _norm_of(norm: Any, precision: Precision) -> tuple[Tensor, float, torch.dtype]:
    return norm.weight, norm.variance_epsilon, torch.bfloat16 if precision == "bfloat16" else torch.float32


def _linear(module: nn.Linear, x: Tensor, precision: Precision) -> Tensor:
    if precision == "float32":
        return F.linear(x, module.weight, module.bias)
    y: Tensor = _Linear16.apply(x, module.weight)
    return y if module.bias is None else y + module.bias.bfloat16()


class _Linear16(torch.autograd.Function):
    """x w' in bfloat16 for a float32 weight, whose gradient is float32 and so adds up exactly over micro-batches.

    The weight is rounded anew each time: that is about a hundredth of the product's cost, and no copy can be stale.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.bfloat16().t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        dx = g @ weight.bfloat16() if ctx.needs_input_grad[0] else None
        # Turned round first: matrix units take a transposed left side slowly, up to twice the time.
        dw = (g.t().contiguous() @ x).float() if ctx.needs_input_grad[1] else None
        return dx, dw


def _own_code(
    trunk: Any, layer: Any, x: Tensor, cos: Tensor, sin: Tensor, batch: TreeBatch, precision: Precision
) -> Tensor:
    with autocast(precision, x.device), _trees_in(trunk):
        y: Tensor = layer(
            x[None],
            attention_mask=None,
            position_ids=batch.positions_T[None],
            position_embeddings=(cos[None], sin[None]),
            steelyard_batch=batch,
        )
    return y[0]


def _whole(trunk: Any, batch: TreeBatch, precision: Precision, collect: Sequence[int]) -> TrunkOutput:
    # A four-dimensional mask is taken as it is: none is built. The attention of trees does not read it.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.ids_T.device)
    with autocast(precision, batch.ids_T.device), _trees_in(trunk):
        output = trunk(
            input_ids=batch.ids_T[None],
            attention_mask=unread,
            position_ids=batch.positions_T[None],
            use_cache=False,
            output_hidden_states=bool(collect),
            steelyard_batch=batch,
        )
    states = output.last_hidden_state[0]
    if states.shape[0] != batch.tokens:
        raise InputError(f"{type(trunk).__name__}: does not give one state per token; it cannot be used here")
    return TrunkOutput(states, {n: output.hidden_states[n][0] for n in collect})


@contextlib.contextmanager
def _trees_in(trunk: Any) -> Iterator[None]:
    """Inside, the model's attention is that of trees."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _interface)
    config = trunk.config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _interface(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The signature that transformers calls attention by: (1, H, T, d) each."""
    batch: TreeBatch = kwargs["steelyard_batch"]
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    q, k = q.to(v.dtype), k.to(v.dtype)
    return tree_attention(q, k, v, batch, scale)[None], None
