"""Shared-prefix rows against plain, separate sequences in transformers: scores, values, log-probs, gradients."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from conftest import Folders
from steelyard.data.collate import TreeBatch, collate
from steelyard.data.encode import Encoder, Tree
from steelyard.errors import InputError
from steelyard.losses.preference import bradley_terry
from steelyard.models import attention, trunk
from steelyard.models.load import open_model
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel, is_reward_model
from steelyard.models.trunk import run_trunk
from steelyard.sampling import SamplingConfig, sample
from steelyard.train.pairwise import freeze_below


def draw_trees(*, n: int = 5, k: int = 2, seed: int = 0) -> list[Tree]:
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(len(tiny.SPECIAL), len(tiny.VOCABULARY), int(rng.integers(low, high))).tolist())

    return [Tree(text(1, 9), tuple((*text(0, 7), tiny.EOS) for _ in range(k))) for _ in range(n)]


TREES = draw_trees()


def plain_scores(model: Any, trees: Sequence[Tree]) -> Tensor:
    """Each prompt and response in a sequence of its own, pooled and scored by transformers. (B, K)"""
    rows = [[model(input_ids=torch.tensor([t.prompt + r])).logits[0, 0] for r in t.responses] for t in trees]
    return torch.stack([torch.stack(row) for row in rows])


def plain_logprobs(model: Any, tree: Tree, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p of each token of response k, and the entropies, from a sequence of its own."""
    ids = torch.tensor([tree.prompt + tree.responses[k]])
    logits = model(input_ids=ids).logits[0, len(tree.prompt) - 1 : -1] / temperature
    every = torch.log_softmax(logits, -1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return every[torch.arange(len(every)), torch.tensor(tree.responses[k])], entropy


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        error, size = (ours[name] - theirs[name]).abs().max(), theirs[name].abs().max()
        assert error <= 2e-5 * size + 1e-7, (name, float(error), float(size))


def rewritten(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model folder with other weights."""
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("family", tiny.FAMILIES)
class TestSharedPrefixEqualsSeparateSequences:
    def test_rewards_losses_and_gradients(self, family: str, reward_model: Folders) -> None:
        from transformers import AutoModelForSequenceClassification

        ours = RewardModel.load(reward_model(family))
        theirs = AutoModelForSequenceClassification.from_pretrained(reward_model(family))
        rewards, expected = ours(collate(TREES, tiny.PAD)), plain_scores(theirs, TREES)
        torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 0.1, "the check must be able to fail"
        bradley_terry(rewards[:, 0], rewards[:, 1]).mean().backward()
        torch.log1p(torch.exp(expected[:, 1] - expected[:, 0])).mean().backward()
        assert_close(gradients(ours.hf), gradients(theirs))

    def test_values_are_the_head_read_before_each_token(self, family: str, reward_model: Folders) -> None:
        ours = RewardModel.load(reward_model(family))
        values = ours.values(collate(TREES, tiny.PAD))
        for b, tree in enumerate(TREES):
            for k, response in enumerate(tree.responses):
                for t in range(len(response)):
                    # transformers reads a classifier at the last token: end the sequence where the value is read.
                    expected = plain_scores(ours.hf, [Tree(tree.prompt[:-1], ((tree.prompt[-1], *response[:t]),))])
                    torch.testing.assert_close(values[b, k, t], expected[0, 0], rtol=1e-4, atol=1e-5)

    def test_log_probabilities_entropy_and_gradients(self, family: str, language_model: Folders) -> None:
        from transformers import AutoModelForCausalLM

        ours = PolicyModel.load(language_model(family))
        theirs = AutoModelForCausalLM.from_pretrained(language_model(family))
        batch = collate(TREES, tiny.PAD)
        found = ours(batch, temperature=0.7)
        total = torch.zeros(())
        for b, tree in enumerate(TREES):
            for k, response in enumerate(tree.responses):
                n = len(response)
                sampled, entropy = plain_logprobs(theirs, tree, k, 0.7)
                plain, _ = plain_logprobs(theirs, tree, k)
                torch.testing.assert_close(found.sampled_BKR[b, k, :n], sampled, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found.entropy_BKR[b, k, :n], entropy, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found.plain_BKR[b, k, :n], plain, rtol=1e-4, atol=1e-5)
                total = total + sampled.sum()
        assert not found.sampled_BKR[~batch.mask_BKR].any()
        found.sampled_BKR.sum().backward()
        total.backward()
        assert_close(gradients(ours.hf), gradients(theirs))

    def test_padding_neighbours_and_batch_split_change_nothing(self, family: str, reward_model: Folders) -> None:
        model = RewardModel.load(reward_model(family))
        expected = model.score(TREES, pad_id=tiny.PAD)
        for max_tokens in (16, 40, 4096):
            for order in (slice(None), slice(None, None, -1)):
                found = model.score(TREES[order], pad_id=tiny.UNK, max_tokens=max_tokens)
                np.testing.assert_allclose(found[order], expected, rtol=1e-4, atol=1e-5)


def test_sets_that_share_pairs_are_scored_once_and_as_they_would_be_alone(
    reward_model: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RewardModel.load(reward_model("llama"))
    swapped = [Tree(t.prompt, t.responses[::-1]) for t in TREES]
    sets = {"original": TREES, "swapped": swapped, "part": TREES[:1]}
    expected = {name: model.score(trees, pad_id=tiny.UNK) for name, trees in sets.items()}
    computed: list[int] = []
    forward = RewardModel.forward

    def counted(self: RewardModel, batch: Any) -> Any:
        computed.append(batch.tokens)
        return forward(self, batch)

    monkeypatch.setattr(RewardModel, "forward", counted)
    found = model.score_sets(sets, pad_id=tiny.UNK)
    assert sum(computed) == sum(map(len, TREES))
    for name, rewards in expected.items():
        np.testing.assert_allclose(found[name], rewards, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["swapped"], found["original"][:, ::-1])


@pytest.mark.parametrize("special", [{}, {"pad_token": "<eos>"}, {"pad_token": None}], ids=["pad", "pad=eos", "none"])
def test_a_saved_checkpoint_scores_the_ordinary_way(
    special: dict[str, Any], language_model: Folders, tmp_path: Path
) -> None:
    """Texts padded by the saved tokenizer and pooled by transformers get the scores that training saw."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    encoder = Encoder(tiny.build_tokenizer(**special))
    model = RewardModel.from_language_model(language_model("llama"), pad_id=encoder.pad_id, seed=3)
    model.set_normal(0.5, 2.0)
    model.save(tmp_path / "model", encoder)
    prompts, responses = ["w1 w2 w3", "w4"], [("good w5 w6", "bad"), ("w7", "w8 w9 good bad")]
    trees = [encoder.tree(p, r) for p, r in zip(prompts, responses, strict=True)]
    expected = model.score(trees, pad_id=encoder.pad_id)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    texts = [f"{p} {r} <eos>" for p, both in zip(prompts, responses, strict=True) for r in both]
    inputs = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        found = theirs(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
    np.testing.assert_allclose(found.view(2, 2).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05
    again = RewardModel.load(tmp_path / "model")
    assert again.normal == (0.5, 2.0)
    np.testing.assert_array_equal(again.score(trees, pad_id=encoder.pad_id), expected)


class TestHead:
    def test_a_new_head_follows_its_seed_alone(self, language_model: Folders) -> None:
        first, same, other = (
            RewardModel.from_language_model(language_model("llama"), pad_id=0, seed=s).head.weight for s in (1, 1, 2)
        )
        assert torch.equal(first, same)
        assert not torch.equal(first, other)

    def test_a_reward_model_keeps_its_head(self, reward_model: Folders) -> None:
        folder = reward_model("llama")
        kept = RewardModel.from_language_model(folder, pad_id=0, seed=5).head.weight
        assert torch.equal(kept, RewardModel.load(folder).head.weight)

    def test_bfloat16_trunk_float32_weights_head_and_scores(self, reward_model: Folders) -> None:
        folder = reward_model("llama")
        half, full = RewardModel.load(folder, precision="bfloat16"), RewardModel.load(folder)
        seen: list[torch.dtype] = []
        half.head.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
        batch = collate(TREES, tiny.PAD)
        rewards = half(batch)
        assert seen == [torch.float32] * 2
        assert {p.dtype for p in half.parameters()} == {torch.float32}
        assert not torch.equal(rewards, full(batch)), "the trunk must really compute in bfloat16"
        torch.testing.assert_close(rewards, full(batch), rtol=0.1, atol=0.1)


class TestRefusals:
    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"not a model folder \(config\.json is missing\)"):
            PolicyModel.load(tmp_path)

    def test_a_language_model_is_no_reward_model(self, language_model: Folders, reward_model: Folders) -> None:
        assert is_reward_model(reward_model("llama"))
        with pytest.raises(InputError, match=r"LlamaForCausalLM.*not a reward model.*steelyard train reward"):
            RewardModel.load(language_model("llama"))

    def test_weights_that_are_not_there(self, tmp_path: Path, language_model: Folders, reward_model: Folders) -> None:
        """transformers fills them with random numbers: scores would be noise without a sign."""
        headless = rewritten(reward_model("llama"), tmp_path / "rm", lambda w: w.pop("score.weight"))
        with pytest.raises(InputError, match=r"rm: 1 of the model's weights are not in its files \(score\.weight\)"):
            RewardModel.load(headless)
        short = rewritten(
            language_model("llama"), tmp_path / "lm", lambda w: [w.pop(n) for n in list(w) if "layers.1" in n]
        )
        with pytest.raises(InputError, match=r"lm: \d+ of the model's weights are not in its files \(model\.layers\.1"):
            PolicyModel.load(short)
        wrapped = rewritten(
            language_model("llama"), tmp_path / "ddp", lambda w: [w.update({f"module.{n}": w.pop(n)}) for n in list(w)]
        )
        with pytest.raises(InputError, match=r"which hold others that it has no place for \(module\."):
            RewardModel.from_language_model(wrapped, pad_id=tiny.PAD, seed=0)

    def test_weights_that_are_not_finite(self, tmp_path: Path, reward_model: Folders) -> None:
        folder = rewritten(reward_model("llama"), tmp_path / "rm", lambda w: w["score.weight"].fill_(float("nan")))
        with pytest.raises(InputError, match=r"rm: 1 of the model's weights are not finite \(score\.weight\)"):
            RewardModel.load(folder)

    def test_classifiers_that_are_no_reward_models(self, tmp_path: Path) -> None:
        from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertForSequenceClassification(BertConfig(vocab_size=31, num_labels=1, **shape)).save_pretrained(tmp_path / "b")
        with pytest.raises(InputError, match="BertForSequenceClassification: has no linear head `score`"):
            RewardModel.load(tmp_path / "b")
        config = tiny.build_config("llama")
        config.num_labels = 3
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / "l")
        with pytest.raises(InputError, match="l: holds a classifier of 3 classes; start from a language model"):
            RewardModel.from_language_model(tmp_path / "l", pad_id=tiny.PAD, seed=0)

    def test_a_tokenizer_of_another_model(self, reward_model: Folders) -> None:
        model = RewardModel.load(reward_model("llama"))
        size = model.hf.config.vocab_size
        with pytest.raises(InputError, match=rf"gives token {size}, but the model knows {size} .*its folder"):
            model.score([Tree((1, size), ((2,), (3,)))], pad_id=tiny.PAD)

    def test_a_recurrent_model(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

        config = MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4)
        MambaForCausalLM(config).save_pretrained(tmp_path)
        with pytest.raises(InputError, match="cannot share their prompt in a model of type mamba"):
            open_model(AutoModelForCausalLM, tmp_path)

    def test_alibi_positions(self) -> None:
        from transformers import FalconConfig

        config = FalconConfig(
            vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True, initializer_range=0.2
        )
        with pytest.raises(InputError, match="FalconModel: chosen and rejected cannot share"):
            PolicyModel(tiny.build_model(config))

    def test_a_trunk_that_sees_its_neighbours(self) -> None:
        """A model that ignores the mask it is given computes on without an error: only its numbers are wrong."""

        class Deaf(torch.nn.Module):
            config: Any = tiny.build_config()

            def __init__(self) -> None:
                super().__init__()
                self.model = tiny.build_model(tiny.build_config()).model

            def forward(self, input_ids: Tensor, position_ids: Any = None, **_: Any) -> Any:
                return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)

        from steelyard.models.load import check_shared_prefix

        with pytest.raises(InputError, match=r"cannot share their prompt in this model \(relative difference"):
            check_shared_prefix(Deaf(), 31)

    def test_a_sliding_window_shorter_than_the_text(self) -> None:
        from transformers import MistralConfig

        shape = {k: v for k, v in tiny.build_config().to_dict().items() if k in MistralConfig().to_dict()}
        shape.pop("model_type")
        with pytest.raises(InputError, match="sliding window of 4"):
            PolicyModel(tiny.build_model(MistralConfig(**shape | {"sliding_window": 4})))
        model = PolicyModel(tiny.build_model(MistralConfig(**shape | {"sliding_window": 16})))
        fits, long = Tree((5,) * 8, ((6,) * 8, (7,) * 8)), Tree((5,) * 8, ((6,) * 8, (7,) * 9))
        run_trunk(model.hf.base_model, collate([fits], 0))
        with pytest.raises(InputError, match="17 tokens, more than the model's sliding window of 16; set max_length"):
            run_trunk(model.hf.base_model, collate([long], 0))

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
            {
                "rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0,
                "original_max_position_embeddings": 16, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            },
        ],
    )  # fmt: skip
    def test_a_rotation_that_depends_on_the_longest_text(self, rope: dict[str, Any]) -> None:
        """A text's states must not depend on its neighbours."""
        most = 16 if rope["rope_type"] == "dynamic" else 64
        config = tiny.build_config("llama", max_position_embeddings=most, rope_parameters=rope)
        model = PolicyModel(tiny.build_model(config))
        trunk = model.hf.base_model
        short, fits = Tree((5,) * 4, ((6,) * 4, (7,) * 4)), Tree((5,) * 8, ((6,) * 8, (7,) * 8))
        alone = run_trunk(trunk, collate([short], 0)).states_TD
        beside = run_trunk(trunk, collate([short, fits], 0)).states_TD
        torch.testing.assert_close(beside[: len(alone)], alone)
        with pytest.raises(InputError, match=r"up to 17 tokens, beyond 16, .* keep prompt and response to 16"):
            run_trunk(trunk, collate([short, Tree((5,) * 8, ((6,) * 8, (7,) * 9))], 0))

        def draw(most: int) -> None:
            config = SamplingConfig(max_new_tokens=most)
            sample(model, [(5,) * 8], ["a"], k=2, config=config, end_id=3, pad_id=0, seed=0)

        draw(8)
        with pytest.raises(InputError, match="up to 17 tokens, beyond 16"):
            draw(9)

    def test_places_that_were_not_learned(self) -> None:
        from transformers import GPT2Config

        config = GPT2Config(vocab_size=len(tiny.VOCABULARY), n_embd=32, n_layer=2, n_head=4, n_positions=16)
        model = PolicyModel(tiny.build_model(config))
        run_trunk(model.hf.base_model, collate([Tree((5,) * 8, ((6,) * 8, (7,) * 8))], 0))
        with pytest.raises(
            InputError, match="up to 17 tokens, but the model knows 16 places; keep prompt and response"
        ):
            run_trunk(model.hf.base_model, collate([Tree((5,) * 8, ((6,) * 8, (7,) * 9))], 0))
        with pytest.raises(InputError, match="up to 17 tokens, but the model knows 16 places"):
            sample(model, [(5,) * 8], ["a"], k=2, config=SamplingConfig(max_new_tokens=9), end_id=3, pad_id=0, seed=0)

    def test_layers_that_cannot_be_frozen_by_number(self) -> None:
        from transformers import GPT2Config

        config = GPT2Config(vocab_size=len(tiny.VOCABULARY), n_embd=32, n_layer=2, n_head=4, n_positions=16)
        model = RewardModel(tiny.build_model(config, head=True))
        freeze_below(model, None)
        with pytest.raises(InputError, match="trainable_layers: GPT2Model has no list of layers named `layers`"):
            freeze_below(model, 1)

    def test_scaled_logits(self) -> None:
        from transformers import GraniteConfig

        shape = {k: v for k, v in tiny.build_config().to_dict().items() if k in GraniteConfig().to_dict()}
        shape.pop("model_type")
        PolicyModel(tiny.build_model(GraniteConfig(**shape | {"logits_scaling": 1.0})))
        with pytest.raises(InputError, match="scales or caps its logits"):
            PolicyModel(tiny.build_model(GraniteConfig(**shape | {"logits_scaling": 4.0})))


def test_a_scratch_model_follows_its_seed(tmp_path: Path) -> None:
    encoder = Encoder(tiny.build_tokenizer())
    models = [PolicyModel.scratch(encoder, layers=1, width=16, heads=2, context=32, seed=s) for s in (4, 4, 5)]
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    models[0].save(tmp_path / "m", encoder)
    again = PolicyModel.load(tmp_path / "m")
    batch = collate(TREES, tiny.PAD)
    assert torch.equal(again(batch).plain_BKR, models[0](batch).plain_BKR)


def step(model: RewardModel, batch: TreeBatch) -> list[Tensor]:
    """Rewards, and the gradient of a loss on them."""
    model.zero_grad()
    rewards = model(batch)
    (rewards[:, 0] - rewards[:, 1]).square().sum().backward()
    return [rewards.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_written_out_layers_give_the_numbers_and_gradients_of_the_models_own_code(
    family: str, reward_model: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RewardModel.load(reward_model(family))
    batch = collate(TREES, tiny.PAD)
    ours = step(model, batch)
    monkeypatch.setattr(trunk, "_plain", lambda layer: False)
    for found, expected in zip(ours, step(model, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_scored_tokens_alone_have_the_states_they_have_among_all(family: str, reward_model: Folders) -> None:
    model = RewardModel.load(reward_model(family))
    batch = collate(TREES, tiny.PAD)
    everything = run_trunk(model.trunk, batch).states_TD[batch.last_BK.flatten()]
    alone = run_trunk(model.trunk, batch, read="scored").states_TD
    torch.testing.assert_close(alone, everything, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_policy_that_reads_responses_alone_has_the_numbers_and_gradients_of_one_that_reads_all(
    family: str, language_model: Folders
) -> None:
    """Also responses of one token, which are drawn from the prompt's last state, and ones longer than a piece."""
    policy = PolicyModel.load(language_model(family))
    trees = [*TREES, Tree((5, 6, 7), ((8,), (9,))), Tree((5, 6), (tuple(range(5, 15)) * 14, (7, 8)))]
    results = []
    for reads in ("scored", "responses"):
        policy.zero_grad(set_to_none=True)
        batch = collate(trees, tiny.PAD, reads=reads)  # type: ignore[arg-type]
        found = policy(batch)
        found.sampled_BKR.sum().backward()
        results.append((found.sampled_BKR.detach(), found.entropy_BKR, gradients(policy.hf)))
    if family != "gpt_neox":
        assert not policy.states(batch)[0].any(), "a prompt's first token is not computed in the last layer"
    (all_log, all_entropy, all_g), (log, entropy, g) = results
    torch.testing.assert_close(log, all_log, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, all_entropy, rtol=1e-4, atol=1e-5)
    assert_close(g, all_g)


def test_a_trunk_run_in_two_parts_is_the_trunk(reward_model: Folders) -> None:
    model = RewardModel.load(reward_model("llama"))
    batch = collate(TREES, tiny.PAD)
    below = run_trunk(model.trunk, batch, last=1, collect=[0, 1])
    whole = run_trunk(model.trunk, batch, collect=[1])
    torch.testing.assert_close(whole.collected[1], below.states_TD)
    torch.testing.assert_close(
        run_trunk(model.trunk, batch, first=1, states_TD=below.states_TD).states_TD, whole.states_TD
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_products_keep_float32_weights_states_and_gradients(family: str, reward_model: Folders) -> None:
    folder = reward_model(family)
    exact, rough = RewardModel.load(folder), RewardModel.load(folder, precision="bfloat16")
    batch = collate(TREES, tiny.PAD)
    assert run_trunk(rough.trunk, batch, "bfloat16").states_TD.dtype == torch.float32
    expected, found = step(exact, batch), step(rough, batch)
    assert all(g.dtype == torch.float32 for g in found)
    a, b = (torch.cat([x.flatten() for x in xs[1:]]) for xs in (expected, found))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99
    torch.testing.assert_close(found[0], expected[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_rows_that_bfloat16_adds_are_nowhere_to_be_seen(family: str, reward_model: Folders) -> None:
    trunk = RewardModel.load(reward_model(family)).trunk
    for reads in ("scored", "responses"):
        batch = collate(TREES, tiny.PAD, reads=reads)  # type: ignore[arg-type]
        exact, rough = (run_trunk(trunk, batch, p, collect=[0, 1]) for p in ("float32", "bfloat16"))  # type: ignore[arg-type]
        for a, b in zip(
            (exact.states_TD, *exact.collected.values()), (rough.states_TD, *rough.collected.values()), strict=True
        ):
            assert len(b) == batch.tokens
            torch.testing.assert_close(b, a, rtol=0.05, atol=0.05)
        read = run_trunk(trunk, batch, "bfloat16", read=reads).states_TD  # type: ignore[arg-type]
        assert len(read) == (batch.last_BK.numel() if reads == "scored" else batch.tokens)
        if family != "gpt_neox":
            upper = run_trunk(trunk, batch, "bfloat16", first=1, states_TD=rough.collected[1]).states_TD
            torch.testing.assert_close(upper, rough.states_TD)


def test_long_texts_are_attended_in_pieces(reward_model: Folders) -> None:
    """Prompts and responses longer than a piece of queries, against plain transformers."""
    folder = reward_model("llama")
    generator = torch.Generator().manual_seed(0)

    def text(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 20, (n,), generator=generator).tolist())

    model = RewardModel.load(folder)
    with torch.no_grad():
        for trees in ([Tree(text(290), (text(150), text(131)))], [Tree(text(129), (text(128), text(1))), TREES[0]]):
            expected = plain_scores(model.hf, trees)
            torch.testing.assert_close(model(collate(trees, tiny.PAD)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reads", ["all", "scored", "responses"])
@pytest.mark.parametrize("d", [16, 8])
@pytest.mark.filterwarnings(r"ignore:flex_attention called without torch\.compile")  # a GPU gets it compiled
def test_flex_attention_is_given_the_same_rule_of_who_sees_whom(reads: Any, d: int) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    trees = [*TREES, Tree(tuple(range(5, 25)) * 8, ((9,) * 40, (10,) * 3))]
    read = reads != "all"
    batch = collate(trees, tiny.PAD, reads=reads if read else "scored")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch.tokens, heads, d, generator=generator) for heads in (4, 2, 2))
    if read:
        q = q[batch.read_n]
    ours = attention.tree_attention(q, k, v, batch, 0.25, read=read)
    flex = attention._flex(q, k, v, batch, 0.25, read=read, run=flex_attention)
    torch.testing.assert_close(flex, ours, rtol=1e-4, atol=1e-5)


def test_what_a_batch_keeps_for_one_model_is_not_taken_for_anothers() -> None:
    """Policy, critic and reward model read one batch: other heads and other precisions, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    shared = collate(TREES, tiny.PAD)
    for heads, groups, dtype in ((4, 2, torch.float32), (6, 3, torch.float32), (4, 4, torch.bfloat16)):
        found = []
        drawn = [torch.randn(shared.tokens, n, 8, generator=generator).to(dtype) for n in (heads, groups, groups)]
        for batch in (shared, collate(TREES, tiny.PAD)):
            inputs = [x.clone().requires_grad_() for x in drawn]
            out = attention.tree_attention(*inputs, batch, 0.3)
            found.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def test_what_a_token_does_not_see_may_be_of_any_size() -> None:
    """Scores of hidden keys so large that their exponentials are infinite: outputs and gradients stay exact."""
    batch = collate(TREES, tiny.PAD)
    tree, branch, place = batch.tree_T, batch.branch_T, torch.arange(batch.tokens)
    sees = (place <= place[:, None]) & (tree == tree[:, None])
    sees &= (branch == 0) | (branch == branch[:, None])
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(batch.tokens, heads, 8, generator=generator) for heads in (4, 2, 2, 4))
    q, k = q.abs(), k.abs()
    # The last tokens of responses are hidden from all before them.
    k[batch.last_BK.flatten()] *= 200.0
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ours = attention.tree_attention(*inputs, batch, 1.0)
    found = torch.autograd.grad(ours, inputs, g)
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1))
    assert scores.detach()[:, ~sees].max().item() > 200  # exp overflows in float32 at 89
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    plain = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(2, 1))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(plain, inputs, g), rtol=1e-3, atol=1e-3)
