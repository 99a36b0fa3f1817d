"""k responses per prompt from a policy: each prompt is read once, its k samples share the reading.

Every sample owns its stream of random numbers, a function of (seed, key of the prompt, number of the sample). So which
prompts are sampled together, in which order and how many at a time decides nothing but the rounding of the logits: a
token can differ between two such runs only if its random number lies within that rounding of the edge between two
tokens (about 1e-6 in float32, a hundredth in bfloat16). The same call gives the same bits.
"""

from __future__ import annotations

from steelyard.sampling.backends import Sampler, sample, sampler_for
from steelyard.sampling.settings import Sample, SamplingConfig
from steelyard.sampling.tokens import draw

__all__ = ["Sample", "Sampler", "SamplingConfig", "draw", "sample", "sampler_for"]
