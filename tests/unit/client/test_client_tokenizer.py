"""Text to ids and back, chats, and text out of ids that come one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from sale_prefill_client import IncrementalDecoder, Tokenizer
from sale_prefill_client.chat_template import ChatTemplateError
from tests.unit.client.texts import CHAT_TEMPLATE, save_byte_tokenizer

LONG_CHARACTERS = st.characters(codec="utf-8", min_codepoint=0x80, exclude_characters="\N{REPLACEMENT CHARACTER}")
QUESTION = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def pieces_of(decoder: IncrementalDecoder, ids: list[int]) -> list[str]:
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


class TestIncrementalDecoding:
    @given(text=st.text(max_size=40))
    def test_pieces_add_up_to_the_text(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(pieces_of(tokenizer.stream_decoder(), ids)) == text

    @given(text=st.text(LONG_CHARACTERS, max_size=20))
    def test_no_piece_holds_half_a_character(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces_of(tokenizer.stream_decoder(), ids))

    def test_a_character_comes_with_its_last_byte(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("é€🙂", add_special_tokens=False)
        assert pieces_of(tokenizer.stream_decoder(), ids) == ["", "é", "", "", "€", "", "", "", "🙂", ""]

    def test_the_end_shows_what_is_left_of_a_broken_character(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("a€", add_special_tokens=False)[:-1]
        assert pieces_of(tokenizer.stream_decoder(), ids) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]

    def test_special_tokens_say_nothing(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("hi<|end|>", add_special_tokens=False)
        assert pieces_of(tokenizer.stream_decoder(), ids) == ["h", "i", "", ""]
        assert "".join(pieces_of(tokenizer.stream_decoder(skip_special_tokens=False), ids)) == "hi<|end|>"

    def test_blanks_that_depend_on_the_place_are_right(self) -> None:
        raw = RawTokenizer(models.WordLevel({"▁to": 0, "▁be": 1, "!": 2}, unk_token="!"))
        raw.decoder = decoders.Metaspace()
        assert pieces_of(IncrementalDecoder(raw.decode), [0, 1, 2]) == ["to", " be", "!", ""]

    def test_the_cost_of_a_token_does_not_grow_with_the_answer(self, tokenizer: Tokenizer) -> None:
        longest = 0

        def decode(ids: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids)

        pieces_of(IncrementalDecoder(decode), tokenizer.encode("abc " * 500, add_special_tokens=False))
        assert longest <= 4


class TestEncoding:
    def test_the_model_gets_its_begin_token_unless_told_otherwise(self, tokenizer: Tokenizer) -> None:
        begin = tokenizer.encode("<|begin|>", add_special_tokens=False)
        assert tokenizer.encode("x") == begin + tokenizer.encode("x", add_special_tokens=False)

    def test_special_tokens_have_their_text(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}

    def test_half_a_surrogate_pair_is_no_text(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match="surrogates not allowed"):
            tokenizer.encode("a\ud800")

    def test_a_folder_without_a_tokenizer_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            Tokenizer(tmp_path)


class TestChat:
    def test_a_conversation_is_written_as_the_template_says(self, tokenizer: Tokenizer) -> None:
        expected = "<|start|>system\nBe kind.<|end|>\n<|start|>user\nWhy?<|end|>\n<|start|>assistant\n"
        assert tokenizer.apply_chat_template(QUESTION) == expected
        assert tokenizer.apply_chat_template(QUESTION, tokenize=True) == tokenizer.encode(
            expected, add_special_tokens=False
        )
        assert not tokenizer.apply_chat_template(QUESTION, add_generation_prompt=False).endswith("assistant\n")

    def test_the_next_turn_repeats_nothing(self, tokenizer: Tokenizer) -> None:
        expected = "\n<|start|>user\nWhy?<|end|>\n<|start|>assistant\n"
        assert tokenizer.chat_continuation(QUESTION) == expected
        assert tokenizer.chat_continuation(QUESTION, reply_ended=False) == "<|end|>" + expected

    def test_turns_add_up_to_the_whole_conversation(self, tokenizer: Tokenizer) -> None:
        answer = {"role": "assistant", "content": "So."}
        appended = tokenizer.apply_chat_template(QUESTION) + "So.<|end|>" + tokenizer.chat_continuation(QUESTION)
        assert appended == tokenizer.apply_chat_template([*QUESTION, answer, *QUESTION])

    def chat_of(self, folder: Path, template: str, **variables: Any) -> str:
        tokenizer = Tokenizer(save_byte_tokenizer(folder, chat_template=template))
        return str(tokenizer.apply_chat_template(QUESTION, **variables))

    def test_templates_get_what_published_ones_use(self, tmp_path: Path) -> None:
        template = (
            "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
            "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}"
            "{{ bos_token }}{{ tools | length }}{{ strftime_now('%Y') | length }}{{ mood }}"
        )
        assert self.chat_of(tmp_path, template, tools=[1], mood="grün") == '"Why?"<|begin|>14grün'

    def test_a_template_file_goes_before_the_configuration(self, tmp_path: Path) -> None:
        folder = save_byte_tokenizer(tmp_path)
        (folder / "chat_template.jinja").write_text("from the file")
        assert Tokenizer(folder).apply_chat_template(QUESTION) == "from the file"

    def test_the_default_of_several_templates_is_taken(self, tmp_path: Path) -> None:
        several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
        folder = save_byte_tokenizer(tmp_path, chat_template=several)
        assert Tokenizer(folder).apply_chat_template(QUESTION) == "plain"

    def test_a_model_without_a_template_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(ChatTemplateError, match="no chat template"):
            Tokenizer(save_byte_tokenizer(tmp_path, chat_template=None)).apply_chat_template(QUESTION)

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ raise_exception('no system role') }}", "no system role"),
            ("{% for %}", "TemplateSyntaxError"),
            ("{{ messages.__class__.__mro__ }}", "SecurityError"),
            ("{{ messages.append(1) }}", "SecurityError"),
        ],
        ids=["refusal", "syntax", "escape", "change"],
    )
    def test_a_template_can_fail_but_not_break_out(self, tmp_path: Path, template: str, message: str) -> None:
        with pytest.raises(ChatTemplateError, match=message):
            self.chat_of(tmp_path, template)

    def test_a_template_that_drops_answers_allows_no_next_turn(self, tmp_path: Path) -> None:
        template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
        with pytest.raises(ChatTemplateError, match="prefill the whole conversation"):
            Tokenizer(save_byte_tokenizer(tmp_path, chat_template=template)).chat_continuation(QUESTION)

    def test_it_renders_as_transformers_does(self, tmp_path: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        folder = save_byte_tokenizer(tmp_path)
        reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=CHAT_TEMPLATE)
        messages = [*QUESTION, {"role": "assistant", "content": json.dumps({"a": "é"})}, *QUESTION]
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert Tokenizer(folder).apply_chat_template(messages) == expected
