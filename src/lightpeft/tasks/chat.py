"""Chats as tokens, by the tokenizer's own chat template, and which of the tokens are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightpeft.errors import LightPeftError, require

Chat = Sequence[Mapping[str, Any]]
"""Messages in order, each with `role` ("system", "user", "assistant", ...) and `content`, a string."""
ASSISTANT = "assistant"
_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""In templates that say themselves what the assistant generates."""


def check_chat(chat: Any, place: str) -> None:
    """Raise `LightPeftError` unless it is a list of messages of which one is the assistant's; `place` names the row."""
    require(isinstance(chat, Sequence) and not isinstance(chat, str) and chat, f"{place}: there are no messages")
    for number, message in enumerate(chat, 1):
        fields = message if isinstance(message, Mapping) else {}
        for name in ("role", "content"):
            value = fields.get(name)
            require(
                isinstance(value, str) and (value.strip() or name == "content"),
                f'{place}: message {number} has no {name}; a message is an object with "role" and "content"',
            )
    require(
        any(message["role"] == ASSISTANT and message["content"].strip() for message in chat),
        f"{place}: no message of the assistant says anything, so there is nothing to learn",
    )


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `LightPeftError` unless the tokenizer has a chat template."""
    require(
        tokenizer.chat_template,
        "the tokenizer has no chat template; take a model that was made for chats, put chat_template.jinja into its "
        "folder, or write prompts and completions yourself (data.task: causal-lm)",
    )


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, place: str) -> tuple[list[int], list[bool]]:
    """Tokens of a whole chat, and which of them the assistant says: the ones to learn.

    A template that marks what the assistant generates (`{% generation %}`) is asked. For others a turn of the assistant
    is the text that the chat up to it has more than the chat before it with the generation prompt, so that it includes
    the end of the turn.

    Args:
        chat: messages that passed `check_chat`.
        tokenizer: one with a chat template.
        place: names the row in errors.

    Raises:
        LightPeftError: the template refuses the chat, or writes earlier turns differently once there are later ones.
    """
    messages = [dict(message) for message in chat]
    if _MARKS_ASSISTANT.search(str(tokenizer.chat_template)):
        encoded = _templated(tokenizer, messages, place, tokenize=True, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    text, turns = _turns(messages, tokenizer, place)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = [any(end > first and begin < last for first, last in turns) for begin, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), marks


def encode_prompt(chat: Chat, tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    """Tokens of a chat up to where the assistant answers: without its last turn, if that is the assistant's."""
    messages = [dict(message) for message in chat]
    if messages[-1]["role"] == ASSISTANT:
        messages.pop()
    require(messages, f"{place}: there is no message to answer")
    encoded = _templated(tokenizer, messages, place, tokenize=True, add_generation_prompt=True)
    return list(encoded["input_ids"])


def _turns(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[str, list[tuple[int, int]]]:
    """The chat's text, and where the turns of the assistant begin and end in it."""
    text = _templated(tokenizer, messages, place, tokenize=False)
    turns = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        require(number > 0, f"{place}: the assistant speaks first; begin with a message of the user or the system")
        before = _templated(tokenizer, messages[:number], place, tokenize=False, add_generation_prompt=True)
        through = _templated(tokenizer, messages[: number + 1], place, tokenize=False)
        require(
            text.startswith(through) and through.startswith(before),
            f"{place}: the chat template writes message {number + 1} differently within the whole chat, so the "
            "assistant's part cannot be told; mark it in the template with {% generation %}",
        )
        turns.append((len(before), len(through.rstrip())))  # a line end behind the turn is not said
    return text, turns


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], place: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise LightPeftError(f"{place}: the chat template refuses the messages: {reason}") from error
