"""Every command and every piece of Python in README and docs runs: in a sandbox with a tiny model at the same paths."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
import workbench
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from documents import BLOCK, blocks, changed
from lanes import thorough
from lights import light_of
from peft import LoraConfig, get_peft_model
from questions import CHAT_TEMPLATE, chats, squad, web_questions, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast, TrainingArguments

from lightpeft import EarlyPruner, load_light
from lightpeft.app import cli
from lightpeft.app.runs.demo import fetching
from lightpeft.app.runs.reproduce import running
from lightpeft.budget import room
from lightpeft.prune import length
from lightpeft.training import schedule

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS.remove(ROOT / "docs/tutorials/serve.md")  # test_start.py runs it, in processes and a clone of its own
CHANGES = sorted((ROOT / "docs/how-to").glob("from_*.md"))
ENCODER, DECODER = "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"
ROWS = 80
"""Of most data sets; those of the hub have twice as many for training."""
LONG = {"command_line", "several_gpus", "grids", "onnx_openvino"}
"""Pages whose commands take longest: `make test-all` runs them."""
OTHER_PROGRAMS = {"git", "pip", "python", "pre-commit", "pytest", ".venv/bin/pytest", ".venv/bin/pre-commit"}
OTHER_PROGRAMS |= {"llama-cli", "llama-server", "ollama", "vllm"}
"""Programs of the development set-up and of servers, whose commands are not run here."""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the repository's configs, and tiny models and data where the documents expect real ones."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for file in (folder / "configs").rglob("*.yaml"):
        file.write_text(re.sub(r"\blength: \d+\b(?!\.)", "length: 0.25", file.read_text()))  # of fewer rows
    for grid in workbench.GRIDS:
        smaller(folder / grid.relative_to(ROOT))
    with pytest.MonkeyPatch.context() as patch, workbench.forked():
        patch.setattr(running, "run_cell", workbench.in_this_process)
        patch.chdir(folder)
        patch.setattr(workbench, "POSITIONS", 128)
        patch.setattr(room, "LEAST_HELD", 16)
        patch.setattr(schedule, "LEAST_RUN_STEPS", 30)
        patch.setattr(length, "LEAST_STEPS", 8)
        patch.setattr(room, "SEARCH_FRACTION", 100.0)  # of trainings that are hardly longer than a probe
        workbench.save_base(folder / "demo/cache/minilm", "bert", tokenizer=workbench.tokenizer_of_word_pieces())
        workbench.save_base(folder / "demo/cache/smollm2", "llama", tokenizer=word_pieces())
        (folder / "demo/cache/smollm2/chat_template.jinja").write_text(CHAT_TEMPLATE)
        for cached, name in (("minilm", ENCODER), ("smollm2", DECODER)):  # folders of these names come before the hub
            shutil.copytree(folder / f"demo/cache/{cached}", folder / name)
        rows = workbench.labeled(ROWS)
        (folder / "demo/cache/movie_reviews").mkdir()
        for name in ("train", "test"):
            workbench.write_rows(folder / f"demo/cache/movie_reviews/{name}.csv", rows)
        in_reach_of_demo(folder, patch)
        renamed(folder / "reviews.csv", rows, review="text", stars="label")
        renamed(folder / "pairs.csv", rows, premise="text", hypothesis="text", relation="label")
        (folder / "reviews.txt").write_text("\n".join(row["text"] for row in rows[:5]))
        (folder / "demo/cache/socialiqa").mkdir()
        for name in ("train", "test"):
            workbench.write_rows(folder / f"demo/cache/socialiqa/{name}.jsonl", workbench.completions(ROWS))
        workbench.write_rows(folder / "questions.jsonl", questions(ROWS))
        layouts.write_task(folder / "data/sst2", "sst2")
        write_jsonl(folder / "passages.jsonl", squad(ROWS, longest=100, unanswerable=0.3))
        write_jsonl(folder / "trivia.jsonl", web_questions(ROWS))
        write_jsonl(folder / "chats.jsonl", chats(2 * ROWS))
        for name, kind in (("cornell-movie-review-data/rotten_tomatoes", classes), ("trl-lib/Capybara", chats)):
            write_splits(folder / name, kind)
        write_splits(folder / "sentence-transformers/natural-questions", pairs)
        (folder / "tasks").mkdir()
        (folder / "tasks/questions.yaml").write_text(blocks(ROOT / "docs/how-to/evaluate.md", "yaml")[0])
        layouts.write_task(folder / "data/quartz", "quartz", train=ROWS)
        layouts.write_task(folder / "demo/cache/quartz", "quartz", train=ROWS)
        write_own_task(folder, rows)
        run_python(blocks(ROOT / "README.md", "python")[0], folder)  # leaves the folder "adapter"
        run = commands(blocks(ROOT / "README.md", "")[1])[0]  # leaves the folder "runs/stars"
        cli.main(run[1:])
        yield folder


def in_reach_of_demo(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let `lightpeft demo` take the tiny model and rows."""
    (folder / "lightpeft").mkdir()
    (folder / "lightpeft/demo").symlink_to(folder / "demo/cache")
    patch.setenv("XDG_CACHE_HOME", str(folder))
    patch.setattr(fetching, "READY", {})


def write_splits(folder: Path, rows: Callable[[int], list[dict[str, Any]]]) -> None:
    """A data set of the hub with the splits train and test, as a folder."""
    folder.mkdir(parents=True)
    for split, count in (("train", 2 * ROWS), ("test", 32)):
        write_jsonl(folder / f"{split}.jsonl", rows(count))


def classes(count: int) -> list[dict[str, Any]]:
    """Texts with numbers for labels."""
    return [{"text": row["text"], "label": int(row["label"] == "positive")} for row in workbench.labeled(count)]


def pairs(count: int) -> list[dict[str, Any]]:
    """Texts that belong together."""
    return [
        {"query": row["prompt"], "answer": row["prompt"] + row["completion"]} for row in workbench.completions(count)
    ]


def word_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that has learned some of the words."""
    return workbench.tokenizer_of_bytes(texts=[" ".join((*workbench.NEUTRAL, *workbench.GOOD, *workbench.BAD))])


def write_own_task(folder: Path, rows: workbench.Rows) -> None:
    """The YAML of docs/reference/tasks.md that declares the task "claims", and rows for it."""
    (folder / "claims.yaml").write_text(
        next(code for code in blocks(ROOT / "docs/reference/tasks.md", "yaml") if "claims:" in code)
    )
    (folder / "claims").mkdir()
    for split in ("train", "dev"):
        renamed(folder / f"claims/{split}.jsonl", rows, title="text", body="text", source="text", verdict="label")
        verdicts = (folder / f"claims/{split}.jsonl").read_text().replace('"positive"', "1").replace('"negative"', "0")
        (folder / f"claims/{split}.jsonl").write_text(verdicts)


def questions(count: int) -> workbench.Rows:
    """Prompts with completions, and the same as multiple choice."""
    rows: workbench.Rows = []
    for row in workbench.completions(count):
        right = row["completion"]
        rows.append({**row, "options": [right, "word1"], "answer": 0})  # type: ignore[dict-item]
    return rows


def smaller(grid: Path) -> None:
    """Leave the first two methods and one seed of a grid, and few steps."""
    data = yaml.safe_load(grid.read_text())
    names = list(data["methods"])[:2]
    data["methods"] = names if isinstance(data["methods"], list) else {name: data["methods"][name] for name in names}
    data["run"]["training"]["epochs"] = 1
    grid.write_text(yaml.safe_dump({**data, "seeds": data["seeds"][:1]}, sort_keys=False))


def renamed(path: Path, rows: workbench.Rows, **columns: str) -> None:
    workbench.write_rows(path, [{new: row[old] for new, old in columns.items()} for row in rows])


def commands(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


def run_python(code: str, folder: Path) -> None:
    """Run a piece of Python with what its reader is assumed to have: rows, arguments, batches, a pruner, and so on."""
    base = AutoModelForSequenceClassification.from_pretrained("demo/cache/minilm", num_labels=2)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    rows = [{"input_ids": [2, 4 + i % 20, 24 + i % 12, 3], "labels": int(i % 12 < 6)} for i in range(512)]
    batch = {name: torch.tensor([row[name] for row in rows[:8]]) for name in ("input_ids", "labels")}
    names: dict[str, Any] = {
        "rows": Dataset.from_list(rows),
        "tokenizer": AutoTokenizer.from_pretrained("demo/cache/minilm"),
        "arguments": TrainingArguments(
            str(folder / "out"), max_steps=30, use_cpu=True, report_to=[], disable_tqdm=True
        ),
        "batches": itertools.repeat(batch),
        "model": model,
        "pruner": EarlyPruner(model, light_of(length=4)),
        "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
    }
    exec(compile(code, "documentation", "exec"), names)


def named(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, id=named(path), marks=thorough if path.stem in LONG else ()) for path in DOCUMENTS],
)
def test_commands_and_python_run(document: Path, sandbox: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for kind, code in BLOCK.findall(document.read_text(encoding="utf-8")):
        if kind == "python":
            run_python(code, sandbox)
        for program, *arguments in commands(code) if kind in ("", "bash", "shell") else ():
            if program == "lightpeft":
                cli.main(arguments)
            elif program == "accelerate":
                engine = load_config_from_file(arguments[arguments.index("--config_file") + 1])
                assert engine.num_processes == 2  # which test_sharded.py starts
                cli.main(arguments[arguments.index("lightpeft") + 1 :])
            elif program == "make":
                assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), f"make {arguments[0]} does not exist"
            else:
                assert program in OTHER_PROGRAMS, f"{document.name}: nobody checks the command {program}"


@pytest.mark.parametrize("page", CHANGES, ids=lambda page: page.stem)
def test_a_change_of_a_few_lines_makes_a_program_light(page: Path, sandbox: Path) -> None:
    (diff,) = blocks(page, "diff")
    assert len(diff.splitlines()) <= 6
    shutil.rmtree(sandbox / page.stem, ignore_errors=True)
    run_python(changed(blocks(page, "python")[0], diff), sandbox)
    (found,) = (sandbox / page.stem).rglob("lightpeft.json")
    assert load_light(found.parent).light_plan.removed_of_blocks > 0.15
