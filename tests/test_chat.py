"""Chats through the tokenizer's template: what the assistant says is learned, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightpeft.app.tasks.kinds.chat import check_chat, check_template, encode_chat, encode_prompt
from lightpeft.errors import LightPeftError

WORDS = ("system", "user", "assistant", "hello", "there", "bye", "now", "one", "two", "be", "kind")
SYSTEM = "{% if messages[0].role != 'system' %}<|start|> system be kind <|end|>{% endif %}"
TURN = "<|start|> {{ message.role }} {{ message.content }} <|end|>"
PROMPT = "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
PLAIN = f"{SYSTEM}{{% for message in messages %}}{TURN}{{% endfor %}}{PROMPT}"
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|start|> assistant "
    "{% generation %}{{ message.content }} <|end|>{% endgeneration %}{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + PROMPT
)
FORGETFUL = "{% for message in messages %}{% if loop.last %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + PLAIN
CHAT = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "one two"},
    {"role": "user", "content": "bye now"},
    {"role": "assistant", "content": "bye"},
]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(("<unk>", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<|start|>"), AddedToken("<|end|>")])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|end|>")
    made.chat_template = template
    return made


def learned(template: str, chat: list[dict[str, str]]) -> str:
    made = tokenizer(template)
    ids, marks = encode_chat(chat, made, "row 1")
    return made.decode([token for token, mark in zip(ids, marks, strict=True) if mark])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_turns_of_the_assistant_are_learned(template: str) -> None:
    assert learned(template, CHAT) == "one two <|end|> bye <|end|>"
    system = [{"role": "system", "content": "now"}, *CHAT[:3]]
    assert learned(template, system) == "one two <|end|>"


def test_both_ways_give_the_tokens_of_the_template() -> None:
    for template in (PLAIN, MARKED):
        made = tokenizer(template)
        ids, marks = encode_chat(CHAT, made, "row 1")
        assert ids == made.apply_chat_template(CHAT)["input_ids"]
        assert len(marks) == len(ids)


def test_the_prompt_is_what_comes_before_the_last_answer() -> None:
    made = tokenizer(PLAIN)
    expected = "<|start|> system be kind <|end|> <|start|> user hello there <|end|> <|start|> assistant"
    assert made.decode(encode_prompt(CHAT[:2], made, "row 1")) == expected
    assert made.decode(encode_prompt(CHAT[:1], made, "row 1")) == expected
    ids, marks = encode_chat(CHAT[:2], made, "row 1")
    assert encode_prompt(CHAT[:2], made, "row 1") == ids[: marks.index(True)]


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (FORGETFUL, CHAT, "row 1: the chat template changes message 2 when later ones follow.* {% generation %}"),
        (STRICT, [{"role": "system", "content": "now"}, *CHAT], "row 1: .* rejects the messages: begin with the user"),
        (PLAIN, CHAT[1:], "row 1: the first message is from the assistant"),
    ],
)
def test_templates_that_cannot_do_it(template: str, chat: list[dict[str, str]], message: str) -> None:
    with pytest.raises(LightPeftError, match=message):
        encode_chat(chat, tokenizer(template), "row 1")


@pytest.mark.parametrize("marked", ["", "{% generation %}{% endgeneration %}"])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "rejects the messages"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "rejects the messages"),
        ("{{ 1 / 0 }}", "rejects the messages"),
        ("{{ messages.nothing.at_all }}", "rejects the messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "rejects the messages"),
    ],
)
def test_templates_that_fail(template: str, message: str, marked: str) -> None:
    for encode in (encode_chat, encode_prompt):
        with pytest.raises(LightPeftError, match=f"row 1: the chat template {message}"):
            encode(CHAT, tokenizer(template + marked), "row 1")


def test_fields_that_tables_leave_open() -> None:
    template = "{% for m in messages %}{{ 'bye' if m.tools is defined else 'now' }} {% endfor %}"
    ids = encode_prompt([{**CHAT[0], "tools": None}], tokenizer(template), "row 1")
    assert tokenizer(template).decode(ids) == "now"


def test_no_template() -> None:
    with pytest.raises(LightPeftError, match="has no chat template; use a chat model"):
        check_template(tokenizer(None))
    check_template(tokenizer(PLAIN))


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (None, "row 3: the list of messages is empty or missing"),
        ([], "row 3: the list of messages is empty or missing"),
        ("hello", "row 3: the list of messages is empty or missing"),
        (["hello"], 'row 3: message 1 has no role; a message is an object with "role" and "content"'),
        ([CHAT[0], {"role": "assistant", "content": None}], "row 3: message 2 has no content"),
        ([{"role": " ", "content": "hello"}], "row 3: message 1 has no role"),
        ([CHAT[0]], "row 3: no assistant message has text"),
        ([CHAT[0], {"role": "assistant", "content": " "}], "row 3: no assistant message has text"),
    ],
)
def test_chats_that_are_none(chat: Any, message: str) -> None:
    with pytest.raises(LightPeftError, match=message):
        check_chat(chat, "row 3")


def test_chats_pass() -> None:
    check_chat(CHAT, "row 1")
    check_chat([{"role": "user", "content": ""}, CHAT[1]], "row 1")
