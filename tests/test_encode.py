"""Text to tokens: where the prompt stops, what ends a response, what happens to long ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from steelyard.data.encode import Encoder, OverlongError, Tree
from steelyard.errors import InputError
from steelyard.types import Message, Preference


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny.VOCABULARY.index(word) for word in text.split())


def pair(prompt: Any = "w1 w2", chosen: str = "good", rejected: str = "bad", source: str = "d.jsonl:3") -> Preference:
    return Preference(id="p", prompt=prompt, chosen=chosen, rejected=rejected, source=source)


TALK = (Message("user", "w1 w2"), Message("assistant", "w3"), Message("user", "w4"))


def test_a_plain_pair_is_prompt_then_response_then_end() -> None:
    encoded = Encoder(tiny.build_tokenizer()).encode([pair(chosen="good w5")])
    assert encoded.trees == [Tree(ids("w1 w2"), (ids("good w5 <eos>"), ids("bad <eos>")))]
    assert (encoded.index, encoded.left_out, encoded.text()) == ([0], {}, "")
    tree = encoded.trees[0]
    assert (len(tree), tree.longest) == (7, 5)


def test_a_cut_off_response_has_no_end() -> None:
    encoder = Encoder(tiny.build_tokenizer())
    assert encoder.response_ids("w1", ended=False) == ids("w1")
    assert encoder.decode(ids("w1 w2 <eos>")) == "w1 w2"


def test_a_conversation_without_template_is_a_transcript() -> None:
    tokenizer = tiny.build_tokenizer(words=(*tiny.VOCABULARY, "Human:", "Assistant:"))
    encoder = Encoder(tokenizer)
    text = tokenizer.decode(list(encoder.prompt_ids(TALK)))
    assert text == "Human: w1 w2 Assistant: w3 Human: w4 Assistant:"
    assert encoder.end_id == tiny.EOS


def test_a_template_opens_the_turn_and_its_end_of_turn_token_ends_the_response() -> None:
    encoder = Encoder(tiny.build_tokenizer(chat_template=tiny.CHAT.replace("m['role']", "'Human'")))
    tree = encoder.tree("w1 w2", ["good"])
    assert tree == Tree(ids("<bos> Human : w1 w2 <turn> <bos> Assistant :"), (ids("good <turn>"),))
    assert encoder.prompt_ids("w1 w2") == encoder.prompt_ids((Message("user", "w1 w2"),))


def test_a_template_that_closes_turns_with_plain_text_leaves_eos_as_the_end() -> None:
    template = tiny.CHAT.replace("<turn>", "w9")
    assert Encoder(tiny.build_tokenizer(chat_template=template)).end_id == tiny.EOS


def test_tokens_added_by_the_tokenizer_stay_out_of_the_boundary() -> None:
    """A tokenizer that writes <bos> ... <eos> around every text: the prompt keeps the first, loses the last."""
    from tokenizers import processors

    tokenizer = tiny.build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tiny.BOS), ("<eos>", tiny.EOS)]
    )
    assert Encoder(tokenizer).tree("w1", ["w2"]) == Tree(ids("<bos> w1"), (ids("w2 <eos>"),))


def test_tokenizers_that_differ_at_the_beginning_or_end_alone_do_not_read_alike() -> None:
    from tokenizers import processors

    plain, opens = Encoder(tiny.build_tokenizer()), tiny.build_tokenizer()
    assert plain.reads_as(Encoder(tiny.build_tokenizer()))
    opens.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tiny.BOS)]
    )
    assert opens.get_vocab() == plain.tokenizer.get_vocab()
    assert not plain.reads_as(Encoder(opens))
    assert not plain.reads_as(Encoder(tiny.build_tokenizer(eos_token="<bos>")))


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    encoder = Encoder(tiny.build_tokenizer(chat_template=strict + tiny.CHAT))
    talk = (Message("system", "w1"), Message("user", "w2"))
    refusal = r"refuses the turns system, user: System role not supported; change them"
    with pytest.raises(InputError, match=rf"^d\.jsonl:3: the tokenizer's chat template {refusal}"):
        encoder.encode([pair("w1 w2"), pair(talk)])
    with pytest.raises(InputError, match=rf"^the tokenizer's chat template {refusal}"):
        encoder.prompt_ids(talk)
    with pytest.raises(InputError, match="refuses the turns user, assistant: no assistant"):
        Encoder(tiny.build_tokenizer(chat_template="{{ raise_exception('no assistant') }}"))


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({}, tiny.PAD),
        ({"pad_token": "<eos>"}, tiny.UNK),
        ({"pad_token": None}, tiny.UNK),
        ({"pad_token": "<eos>", "unk_token": None}, tiny.BOS),
        ({"pad_token": "<eos>", "unk_token": None, "bos_token": None}, tiny.TURN),
    ],
)
def test_padding_never_equals_the_end(special: dict[str, Any], expected: int) -> None:
    encoder = Encoder(tiny.build_tokenizer(**special))
    assert encoder.pad_id == expected != encoder.end_id


def test_a_tokenizer_with_nothing_to_pad_with_is_refused() -> None:
    words = [w for w in tiny.VOCABULARY if w != "<turn>"]
    tokenizer = tiny.build_tokenizer(words=words, pad_token="<eos>", unk_token=None, bos_token=None)
    with pytest.raises(InputError, match="no token to pad with"):
        Encoder(tokenizer)
    with pytest.raises(InputError, match="must name an end token"):
        Encoder(tiny.build_tokenizer(eos_token=None))


def test_a_saved_tokenizer_pads_with_the_padding_token(tmp_path: Path) -> None:
    tokenizer = tiny.build_tokenizer(pad_token="<eos>")
    Encoder(tokenizer).save(tmp_path)
    again = Encoder.load(tmp_path)
    assert again.tokenizer.pad_token_id == again.pad_id == tiny.UNK
    assert tokenizer.pad_token == "<eos>", "the caller's tokenizer must stay as it is"
    with pytest.raises(InputError, match=r"tokenizer_config\.json is missing"):
        Encoder.load(tmp_path / "nothing")


class TestTooLong:
    def encoder(self, max_length: int, **options: Any) -> Encoder:
        words = (*tiny.VOCABULARY, "Human:", "Assistant:")
        return Encoder(tiny.build_tokenizer(words=words), max_length=max_length, **options)

    def test_oldest_turns_go_first_and_what_is_left_begins_with_the_user(self) -> None:
        encoder = self.encoder(9)  # the whole has 8 + 2 tokens; without its first turn it would begin with "Assistant:"
        tree = encoder.tree(TALK, ["good"])
        assert encoder.tokenizer.decode(list(tree.prompt)) == "Human: w4 Assistant:"
        assert self.encoder(10).tree(TALK, ["good"]).prompt == encoder.prompt_ids(TALK)

    def test_a_system_turn_goes_before_the_users(self) -> None:
        encoder = self.encoder(7)
        tree = encoder.tree((Message("system", "w1 w2 w3 w4"), Message("user", "w5")), ["good w6"])
        assert encoder.tokenizer.decode(list(tree.prompt)) == "Human: w5 Assistant:"

    def test_cut_prompts_are_counted(self) -> None:
        encoded = self.encoder(8).encode([pair("w1 w2 w3 w4 w5 w6 w7"), pair()])
        assert (len(encoded.trees), encoded.truncated) == (2, 1)
        assert encoded.text() == "1 pairs lost the start of a prompt longer than max_length"

    def test_a_single_long_turn_keeps_its_end(self) -> None:
        tree = self.encoder(8).tree("w1 w2 w3 w4 w5 w6 w7", ["good w8", "bad"])
        assert tree.prompt == ids("w3 w4 w5 w6 w7")
        assert tree.longest == 8

    def test_a_template_still_gets_a_conversation_it_accepts(self) -> None:
        strict = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif %}"
        tokenizer = tiny.build_tokenizer(chat_template=strict + tiny.CHAT)
        assert Encoder(tokenizer, max_length=12).tree(TALK, ["good"]).longest <= 12

    def test_drop_leaves_the_pair_out_and_says_so(self) -> None:
        encoded = self.encoder(8, on_overlong="drop").encode([pair("w1 w2 w3 w4 w5 w6 w7"), pair()])
        assert (len(encoded.trees), encoded.index) == (1, [1])
        assert encoded.text() == "1 pairs left out: longer than max_length"

    def test_error_names_the_row_the_lengths_and_the_way_out(self) -> None:
        with pytest.raises(InputError, match=r"d\.jsonl:3: .* 9 tokens, more than max_length = 8; raise max_length"):
            self.encoder(8, on_overlong="error").encode([pair("w1 w2 w3 w4 w5 w6 w7")])

    def test_a_response_that_leaves_no_room_is_left_out_however_much_is_cut(self) -> None:
        encoder = self.encoder(8)
        with pytest.raises(OverlongError):
            encoder.tree("w1", ["w1 w2 w3 w4 w5 w6 w7"])
        assert list(encoder.encode([pair(chosen="w1 w2 w3 w4 w5 w6 w7 w8")]).left_out) == [0]


def test_pairs_that_are_the_same_tokens_are_left_out() -> None:
    encoded = Encoder(tiny.build_tokenizer()).encode([pair(chosen="unheard", rejected="unseen"), pair()])
    assert encoded.index == [1]
    assert "same tokens" in encoded.left_out[0]
