"""Instructions and answers as chats: train.jsonl and test.jsonl with `messages`, as `data.task: chat` reads them.

    python demo/chats.py roleplay-simple-deduped-roleplay-instruct.json demo/cache/roleplay

The file is a JSON list of objects with `instruction`, `input` (may be empty) and `output` or `response`, as Alpaca, and
many after it, are published. The one named here is part of GPTeacher (MIT, github.com/teknium1/GPTeacher): 1,923
instructions to play a part, with answers by GPT-4. A fixed fifth of the instructions is held out.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from lightpeft.app.runs.demo.fetching import split
from lightpeft.errors import one_line
from lightpeft.files import replacing_folder

log = logging.getLogger("chats")


def main(argv: list[str] | None = None) -> int:
    """Write the chats of a file into a folder; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write instructions and answers as chats.")
    parser.add_argument("file", type=Path, help="JSON list of instruction, input, and output or response")
    parser.add_argument("folder", type=Path, help="folder that gets train.jsonl and test.jsonl")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        parts = split(read(args.file), "question")
        with replacing_folder(args.folder, "test.jsonl") as folder:
            for name, rows in parts.items():
                chats = "".join(json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n" for row in rows)
                (folder / f"{name}.jsonl").write_text(chats, encoding="utf-8")
    except (OSError, ValueError) as error:
        log.error("%s: %s", args.file, one_line(error))
        return 2
    return 0


def read(file: Path) -> list[dict[str, Any]]:
    """Rows with `question`, which decides the side of a row, and `messages`; what has no answer is left out.

    Raises:
        ValueError: the file is not a JSON list of instructions.
    """
    items = json.loads(file.read_text(encoding="utf-8"))
    if not (isinstance(items, list) and items and all(isinstance(item, dict) for item in items)):
        raise ValueError("not a JSON list of objects")
    rows = [chat(item) for item in items]
    return [row for row in rows if all(message["content"] for message in row["messages"])]


def chat(item: dict[str, Any]) -> dict[str, Any]:
    """One instruction, its input below it, and its answer.

    Raises:
        ValueError: it has no instruction, or neither output nor response, or one is no text.
    """
    asked, given, answer = item.get("instruction"), item.get("input") or "", item.get("output", item.get("response"))
    if not (isinstance(asked, str) and isinstance(given, str) and isinstance(answer, str)):
        raise ValueError(f"an object without texts as instruction, and output or response: {list(item)}")
    question = "\n\n".join(part for part in (asked.strip(), given.strip()) if part)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
    return {"question": asked, "messages": messages}


if __name__ == "__main__":
    raise SystemExit(main())
