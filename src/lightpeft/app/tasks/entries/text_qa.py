"""Questions that are answered by a text: a piece of a context, or what a model writes."""

from __future__ import annotations

from lightpeft.config import TaskEntry

_SPAN_COLUMNS = {name: name for name in ("question", "context", "answers")}

ENTRIES: dict[str, TaskEntry] = {
    "squad": TaskEntry(kind="span", hub="rajpurkar/squad", columns=_SPAN_COLUMNS, metrics=["text_match"]),
    "squad_v2": TaskEntry(
        kind="span",
        hub="rajpurkar/squad_v2",
        columns=_SPAN_COLUMNS,
        null_threshold=0.0,
        metrics=["text_match", "answerability"],
    ),
    "web_questions": TaskEntry(
        kind="generation",
        hub="stanfordnlp/web_questions",
        test="test",
        columns={"question": "question", "answers": "answers"},
        prompt="Question: {question}\nAnswer:",
        metrics=["text_match"],
    ),
}
"""Name of a task -> its entry."""
