"""Chats as tokens, by the tokenizer's own chat template, and which of the tokens are the assistant's."""

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
"""In templates that say themselves what the assistant generates."""


class ChatTask(CompletionTask):
    """Next-token loss on what the assistant says. Rows have `messages`."""

    columns: ClassVar[tuple[str, ...]] = ("messages",)

    @classmethod
    def from_texts(cls, rows: Dataset, column: str) -> Dataset:
        """Texts as what a user says first; chats as they are."""
        chats = [[{"role": "user", "content": chat}] if isinstance(chat, str) else chat for chat in rows[column]]
        return Dataset.from_dict({**rows.to_dict(), column: chats})

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Every row is a list of messages, and the assistant says something in it."""
        for where, chat in values(rows, "messages", entry, what):
            check_chat(chat, where)

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Every row is a list of messages."""
        for where, chat in values(rows, "messages", entry, what):
            check_messages(chat, where)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Chats as the template writes them, cut to `data.max_length`; labels are -100 on all but the assistant's part.

        Raises:
            LightPeftError: there is no template, it refuses a chat, or nothing to learn is left of one.
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
        """Chats up to where the assistant answers; those that are too long lose their beginning."""
        check_template(tokenizer)

        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            chats = enumerate(chunk["messages"], start + 1)
            prompts = [encode_prompt(chat, tokenizer, f"row {number}") for number, chat in chats]
            return prompt_columns(prompts, self.config.max_length, tokenizer)

        return in_chunks(rows, encode)


def _check_learnable(marks: Sequence[bool], max_length: int, place: str) -> None:
    require(any(marks), f"{place}: the chat template writes nothing that the assistant says")
    first = list(marks).index(True) + 1
    require(
        first <= max_length,
        f"{place}: the assistant's first token is number {first}, and data.max_length is {max_length}; raise it, or "
        "drop the row",
    )


def check_messages(chat: Any, place: str) -> None:
    """Raise `LightPeftError` unless it is a list of messages; `place` names the row."""
    require(isinstance(chat, Sequence) and not isinstance(chat, str) and chat, f"{place}: there are no messages")
    for number, message in enumerate(chat, 1):
        fields = message if isinstance(message, Mapping) else {}
        for name in ("role", "content"):
            value = fields.get(name)
            require(
                isinstance(value, str) and (value.strip() or name == "content"),
                f'{place}: message {number} has no {name}; a message is an object with "role" and "content"',
            )


def check_chat(chat: Any, place: str) -> None:
    """Raise `LightPeftError` unless it is a list of messages, and the assistant says something in it."""
    check_messages(chat, place)
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
    messages = _plain(chat)
    if _MARKS_ASSISTANT.search(str(tokenizer.chat_template)):
        written = _written(tokenizer, messages, place, return_dict=True, return_assistant_tokens_mask=True)
        return list(written["input_ids"]), [bool(mark) for mark in written["assistant_masks"]]
    text, turns = _turns(messages, tokenizer, place)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = [any(end > first and begin < last for first, last in turns) for begin, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), marks


def encode_prompt(chat: Chat, tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    """Tokens of a chat up to where the assistant answers: without its last turn, if that is the assistant's."""
    messages = _plain(chat)
    if messages[-1]["role"] == ASSISTANT:
        messages.pop()
    require(messages, f"{place}: there is no message to answer")
    text = _written(tokenizer, messages, place, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain(chat: Chat) -> list[dict[str, Any]]:
    """The messages without what they leave open: tables have every field that any message has."""
    return [{name: value for name, value in message.items() if value is not None} for message in chat]


def _turns(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[str, list[tuple[int, int]]]:
    """The chat's text, and where the turns of the assistant begin and end in it."""
    text = _written(tokenizer, messages, place, tokenize=False)
    turns = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        require(number > 0, f"{place}: the assistant speaks first; begin with a message of the user or the system")
        before = _written(tokenizer, messages[:number], place, tokenize=False, add_generation_prompt=True)
        through = _written(tokenizer, messages[: number + 1], place, tokenize=False)
        require(
            text.startswith(through) and through.startswith(before),
            f"{place}: the chat template writes message {number + 1} differently within the whole chat, so the "
            "assistant's part cannot be told; mark it in the template with {% generation %}",
        )
        turns.append((len(before), len(through.rstrip())))  # a line end behind the turn is not said
    return text, turns


def _written(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], place: str, **options: bool) -> Any:
    """What the template makes of a chat; options as for `apply_chat_template`."""
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
        raise LightPeftError(f"{place}: the chat template refuses the messages: {reason}") from error
