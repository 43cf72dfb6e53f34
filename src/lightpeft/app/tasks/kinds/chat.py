"""Chats as tokens, by the tokenizer's chat template, with a mask of the assistant's tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightpeft.app.tasks.kinds.completions import CompletionTask, prompt_columns
from lightpeft.app.tasks.rows.columns import values
from lightpeft.app.tasks.tokens import in_chunks
from lightpeft.config import TaskEntry
from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.models.batches import IGNORED

Chat = Sequence[Mapping[str, Any]]
"""Messages in order, each with `role` ("system", "user", "assistant", ...) and `content`, a string."""
ASSISTANT = "assistant"
_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Marker of the assistant's part in chat templates that return a mask of it."""


class ChatTask(CompletionTask):
    """Next-token loss on the assistant's messages. Rows have `messages`."""

    columns: ClassVar[tuple[str, ...]] = ("messages",)

    @classmethod
    def from_texts(cls, rows: Dataset, column: str) -> Dataset:
        """Return plain texts as chats with one user message, and chats unchanged."""
        chats = [[{"role": "user", "content": chat}] if isinstance(chat, str) else chat for chat in rows[column]]
        return Dataset.from_dict({**rows.to_dict(), column: chats})

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless every row is a list of messages with text from the assistant."""
        for where, chat in values(rows, "messages", entry, what):
            check_chat(chat, where)

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless every row is a list of messages."""
        for where, chat in values(rows, "messages", entry, what):
            check_messages(chat, where)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return chats in the template's format, truncated to `data.max_length`; labels are -100 outside the assistant.

        Raises:
            LightPeftError: there is no template, it rejects a chat, or truncation leaves nothing to learn.
        """
        check_template(tokenizer)
        max_length = self.config.max_length

        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            encoded = []
            for number, chat in enumerate(chunk["messages"], start + 1):
                ids, marks = encode_chat(chat, tokenizer, f"row {number}")
                _check_learnable(marks, max_length, f"row {number}")
                encoded.append((ids[:max_length], marks[:max_length]))
            return {
                "input_ids": [ids for ids, _ in encoded],
                "attention_mask": [[1] * len(ids) for ids, _ in encoded],
                "labels": [
                    [token if mark else IGNORED for token, mark in zip(ids, marks, strict=True)]
                    for ids, marks in encoded
                ],
            }

        return in_chunks(rows, encode)

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return chats up to the assistant's next answer; those that are too long lose their beginning."""
        check_template(tokenizer)

        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            chats = enumerate(chunk["messages"], start + 1)
            prompts = [encode_prompt(chat, tokenizer, f"row {number}") for number, chat in chats]
            return prompt_columns(prompts, self.config.max_length, tokenizer)

        return in_chunks(rows, encode)


def _check_learnable(marks: Sequence[bool], max_length: int, place: str) -> None:
    require(any(marks), f"{place}: the chat template omits the assistant's messages; use another template")
    first = list(marks).index(True) + 1
    require(
        first <= max_length,
        f"{place}: the assistant's first token is number {first}, beyond data.max_length {max_length}; raise it, or "
        "drop the row",
    )


def check_messages(chat: Any, place: str) -> None:
    """Raise `LightPeftError` unless `chat` is a list of messages; `place` names the row."""
    require(
        isinstance(chat, Sequence) and not isinstance(chat, str) and chat,
        f"{place}: the list of messages is empty or missing; fill it in or drop the row",
    )
    for number, message in enumerate(chat, 1):
        fields = message if isinstance(message, Mapping) else {}
        for name in ("role", "content"):
            value = fields.get(name)
            require(
                isinstance(value, str) and (value.strip() or name == "content"),
                f'{place}: message {number} has no {name}; a message is an object with "role" and "content"',
            )


def check_chat(chat: Any, place: str) -> None:
    """Raise `LightPeftError` unless `chat` is a list of messages with text from the assistant."""
    check_messages(chat, place)
    require(
        any(message["role"] == ASSISTANT and message["content"].strip() for message in chat),
        f"{place}: no assistant message has text, so there is nothing to learn; drop the row",
    )


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `LightPeftError` unless the tokenizer has a chat template."""
    require(
        tokenizer.chat_template,
        "the tokenizer has no chat template; use a chat model, put chat_template.jinja into its "
        "folder, or give prompts and completions (data.task: causal-lm)",
    )


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, place: str) -> tuple[list[int], list[bool]]:
    """Return the token ids of a chat, and a mask of the assistant's tokens, which are the ones to learn.

    A template with `{% generation %}` gives the mask. For others, a turn of the assistant is the text that the chat
    through that turn adds to the chat before it with the generation prompt, so that it includes the end of the turn.

    Args:
        chat: messages that passed `check_chat`.
        tokenizer: a tokenizer with a chat template.
        place: names the row in errors.

    Raises:
        LightPeftError: the template rejects the chat, or writes earlier turns differently once there are later ones.
    """
    messages = _without_empty_fields(chat)
    if _MARKS_ASSISTANT.search(str(tokenizer.chat_template)):
        written = _apply_template(tokenizer, messages, place, return_dict=True, return_assistant_tokens_mask=True)
        return list(written["input_ids"]), [bool(mark) for mark in written["assistant_masks"]]
    text, turns = _assistant_turns(messages, tokenizer, place)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = [any(end > first and begin < last for first, last in turns) for begin, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), marks


def encode_prompt(chat: Chat, tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    """Return the token ids of a chat up to the assistant's answer; a last turn of the assistant is left out."""
    messages = _without_empty_fields(chat)
    if messages[-1]["role"] == ASSISTANT:
        messages.pop()
    require(messages, f"{place}: the chat has no message to answer; add a message of the user")
    text = _apply_template(tokenizer, messages, place, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _without_empty_fields(chat: Chat) -> list[dict[str, Any]]:
    """Return the messages without empty fields: a table gives every message the fields of all."""
    return [{name: value for name, value in message.items() if value is not None} for message in chat]


def _assistant_turns(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[str, list[tuple[int, int]]]:
    """Return the chat's text, and the character range (start, end) of each turn of the assistant."""
    text = _apply_template(tokenizer, messages, place, tokenize=False)
    turns = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        require(
            number > 0,
            f"{place}: the first message is from the assistant; begin with a message of the user or the system",
        )
        before = _apply_template(tokenizer, messages[:number], place, tokenize=False, add_generation_prompt=True)
        through = _apply_template(tokenizer, messages[: number + 1], place, tokenize=False)
        require(
            text.startswith(through) and through.startswith(before),
            f"{place}: the chat template changes message {number + 1} when later ones follow, so the "
            "assistant's part is unknown; mark it in the template with {% generation %}",
        )
        turns.append((len(before), len(through.rstrip())))  # the line end after a turn is no part of it
    return text, turns


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], place: str, **options: bool
) -> Any:
    """Return the result of `tokenizer.apply_chat_template(messages, **options)`; its errors become `LightPeftError`."""
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (
        TemplateError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = one_line(error, 300)
        raise LightPeftError(f"{place}: the chat template rejects the messages: {reason}") from error
