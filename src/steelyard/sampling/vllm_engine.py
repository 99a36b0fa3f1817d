"""Sampling with vLLM, an extra: `pip install 'steelyard[vllm]'`.

Unproven: written from vLLM's documentation (`LLM`, `SamplingParams`, token prompts, the weight reload of its sleep
mode) and tested against a stand-in that speaks the same interface. It has not run on a GPU.

What holds by construction: every sample is a request of its own with a seed of its own, so its random numbers do not
depend on its company; prompts are shared by vLLM's prefix cache. What does not: the numbers are vLLM's, so the samples
are other ones than those of the samplers in this process, and its logits depend on the batch by rounding.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

from steelyard.errors import InputError
from steelyard.models.load import quiet_loading
from steelyard.models.lora import has_adapters, merged_state
from steelyard.models.policy import PolicyModel
from steelyard.sampling.loop import stream_key
from steelyard.sampling.settings import Sample, SamplingConfig

# Below this vLLM clamps the temperature, or takes the most probable token.
_COLDEST = 0.01


class VllmSampler:
    """Implements `backends.Sampler`. The engine starts with the first call; later calls reload its weights."""

    def __init__(self, policy: PolicyModel, *, gpu_memory: float) -> None:
        """Raises InputError if vLLM is not installed."""
        try:
            import vllm
        except ImportError:
            raise InputError(
                "sampler = vllm: needs the package vllm and a GPU; install it with: pip install 'steelyard[vllm]', or "
                "use sampler = auto"
            ) from None
        self.vllm: Any = vllm
        # The parts of the policy, not itself: a sampler lives as long as its policy, and must not keep it alive.
        self.hf, self.precision = policy.hf, policy.precision
        self.gpu_memory = gpu_memory
        self.folder = tempfile.mkdtemp(prefix="steelyard-vllm-")
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.engine: Any = None

    def sample(
        self,
        prompts: Sequence[tuple[int, ...]],
        keys: Sequence[str],
        *,
        k: int,
        config: SamplingConfig,
        end_id: int,
        seed: int,
    ) -> list[list[Sample]]:
        """See `backends.Sampler`. Raises InputError for a temperature that vLLM does not take."""
        if config.temperature < _COLDEST:
            raise InputError(
                f"sampling.temperature: vLLM needs at least {_COLDEST}, got {config.temperature:g}; raise it, or use "
                "sampler = auto"
            )
        self._load()
        requests = [(p, stream_key(seed, key, n)) for p, key in zip(prompts, keys, strict=True) for n in range(k)]
        outputs = self.engine.generate(
            [{"prompt_token_ids": list(p)} for p, _ in requests],
            [self._parameters(config, end_id, number) for _, number in requests],
            use_tqdm=False,
        )
        samples = [_response(output.outputs[0], end_id, config) for output in outputs]
        return [samples[i : i + k] for i in range(0, len(samples), k)]

    def _parameters(self, config: SamplingConfig, end_id: int, number: int) -> Any:
        return self.vllm.SamplingParams(
            n=1,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=0,
            repetition_penalty=config.repetition_penalty,
            max_tokens=config.max_new_tokens,
            min_tokens=config.min_new_tokens,
            # The end token is ours, whatever the folder's generation_config says.
            ignore_eos=True,
            stop_token_ids=[end_id],
            seed=number % 2**63,
            detokenize=False,
        )

    def _load(self) -> None:
        """Start the engine, or give it the weights as they are now."""
        # At every call: whether a weight has changed cannot be told without reading it. A tensor's version number does
        # not rise with a step of the fused AdamW.
        with quiet_loading():
            self.hf.save_pretrained(self.folder, state_dict=merged_state(self.hf) if has_adapters(self.hf) else None)
        if self.engine is None:
            self.engine = self.vllm.LLM(
                model=self.folder,
                skip_tokenizer_init=True,
                dtype=self.precision,
                generation_config="vllm",
                enable_prefix_caching=True,
                gpu_memory_utilization=self.gpu_memory,
            )
        else:
            self.engine.collective_rpc("reload_weights")
            # What is cached of prompts was computed with the weights before.
            self.engine.reset_prefix_cache()


def _response(output: Any, end_id: int, config: SamplingConfig) -> Sample:
    """vLLM may or may not give the stop token back; here it belongs to the response."""
    tokens = tuple(int(x) for x in output.token_ids)
    if output.finish_reason == "stop" and tokens[-1:] != (end_id,):
        tokens = (*tokens, end_id)
    if not tokens or len(tokens) > config.max_new_tokens:
        raise ValueError(f"vLLM gave {len(tokens)} tokens, 1 to {config.max_new_tokens} were asked for")
    return Sample(tokens, tokens[-1] == end_id)
