"""Every script of examples/ runs as it is, on tiny models and data, and leaves what it says."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import workbench
from lanes import thorough
from questions import CHAT_TEMPLATE
from transformers import set_seed

from lightpeft import LightModel, load_light

EXAMPLES = Path(__file__).parents[1] / "examples"
Run = Callable[..., str]
FEW = ("--estimation", 8)
"""For preferences, of which the tiny data have few."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder and a decoder, and data as each script takes them."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "POSITIONS", 256)
        workbench.save_base(folder / "encoder", "bert")
        words = [" ".join((*workbench.NEUTRAL, *workbench.GOOD, *workbench.BAD, "user assistant"))]
        workbench.save_base(folder / "decoder", "llama", tokenizer=workbench.tokenizer_of_bytes(texts=words))
    (folder / "decoder/chat_template.jinja").write_text(CHAT_TEMPLATE)
    rows = {"train": workbench.labeled(320), "test": workbench.labeled(64, seed=1)}
    for split, labeled in rows.items():
        write(folder / f"reviews/{split}.jsonl", labeled)
        classes = [{"text": row["text"], "label": int(row["label"] == "positive")} for row in labeled]
        write(folder / f"classes/{split}.jsonl", classes)
        named = [{"text": row["text"], "label": ("bad0_bad1", "good0_good1")[row["label"]]} for row in classes]
        write(folder / f"named/{split}.jsonl", named)
        write(folder / f"names/{split}.jsonl", [tagged(row["text"].split()) for row in labeled])
    texts = [(row["prompt"], row["completion"]) for row in workbench.completions(160)]
    said = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for asked, answer in texts]
    write(folder / "chats/train.jsonl", [{"messages": messages} for messages in said])
    worse = [[messages[0], {"role": "assistant", "content": "word1 word2"}] for messages in said]
    pairs = [{"chosen": good, "rejected": bad} for good, bad in zip(said, worse, strict=True)]
    write(folder / "preferences/train.jsonl", pairs)
    write(folder / "pairs/train.jsonl", [{"query": text, "answer": f"{text} {more}"} for text, more in texts])
    return folder


def write(path: Path, rows: list[dict[str, object]] | workbench.Rows) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tagged(words: list[str]) -> dict[str, object]:
    """Telling words are names of two sorts."""
    return {"tokens": words, "ner_tags": [1 * (word in workbench.GOOD) + 2 * (word in workbench.BAD) for word in words]}


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script in the folder, and gives what it prints."""
    monkeypatch.chdir(home)

    def script(name: str, *arguments: object) -> str:
        set_seed(0)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return script


def on(model: str, data: str, *, epochs: int, output: str) -> list[object]:
    """Arguments of a script that trains, at a rate that suits a tiny model."""
    return ["--model", model, "--data", data, "--epochs", epochs, "--learning_rate", 2e-2, "--output", output]


def reviews(run: Run, home: Path, output: str = "out/reviews") -> str:
    """What `classify.py` prints; it is only run where its adapter is not there."""
    done = home / output / "printed.txt"
    if not done.exists():
        done.write_text(run("classify", *on("encoder", "reviews", epochs=4, output=output)))
    return done.read_text()


def chat(run: Run, home: Path) -> str:
    done = home / "out/chat/printed.txt"
    if not done.exists():
        done.write_text(run("chat", *on("decoder", "chats", epochs=4, output="out/chat")))
    return done.read_text()


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found.group(1))


def test_classify(run: Run, home: Path) -> None:
    printed = reviews(run, home)
    assert number(printed, r"accuracy: ([\d.]+)") > 0.7
    light = load_light(home / "out/reviews/adapter")
    assert light.light_plan.removed_of_blocks >= 0.4 and light.light_plan.summary() in printed


@thorough
def test_tag_tokens(run: Run, home: Path) -> None:
    printed = run("tag_tokens", *on("encoder", "names", epochs=3, output="out/names"))
    assert number(printed, r"accuracy of tags: ([\d.]+)") > 0.8
    assert load_light(home / "out/names/adapter").light_plan.removed_of_blocks > 0.3


def test_chat(run: Run, home: Path) -> None:
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", chat(run, home))]
    assert len(losses) > 1 and losses[-1] < losses[0] - 0.3, "it learns what answers are made of"
    assert load_light(home / "out/chat/adapter").light_plan.removed_of_blocks == pytest.approx(0.2, abs=0.05)


@thorough
def test_prefer(run: Run, home: Path) -> None:
    printed = run("prefer", *on("decoder", "preferences", epochs=2, output="out/preferences"), *FEW)
    first, last = (number(printed, pattern) for pattern in (r": (-?[\d.]+) at first", r", (-?[\d.]+) in the end"))
    assert last > first + 0.05
    assert load_light(home / "out/preferences/adapter").light_plan.removed_parameters > 0


@thorough
def test_prefer_pairs_that_were_made(run: Run, home: Path) -> None:
    """Right and wrong labels; and plain LoRA beside light training, which leaves an ordinary adapter."""
    made = run("make_pairs", "--data", "reviews", "--output", "out/answers", "--rows", 100)
    assert made.splitlines() == ["out/answers/train.jsonl: 100 pairs", "out/answers/test.jsonl: 64 pairs"]
    label_of = {row["text"]: row["label"] for row in lines(home / "reviews/train.jsonl")}
    for pair in lines(home / "out/answers/train.jsonl"):
        assert pair["chosen"] == f" {label_of[pair['prompt'].partition(chr(10))[0]]}"
        assert {pair["chosen"], pair["rejected"]} == {" positive", " negative"}
    printed = run("prefer", *on("decoder", "out/answers", epochs=1, output="out/plain"), "--plain")
    assert 0 < number(printed, r"test: loss ([\d.]+)") < 1
    assert (home / "out/plain/adapter/adapter_config.json").is_file()
    assert not (home / "out/plain/adapter/lightpeft.json").exists()


@thorough
@pytest.mark.parametrize("plain", [False, True])
def test_reward(run: Run, home: Path, plain: bool) -> None:
    names = ["--model", "decoder", "--data", "classes", "--labels", "bad", "good", "--output", "out/rewarded"]
    printed = run("reward", *names, "--steps", 40, "--learning_rate", 2e-2, "--estimation", 12, *["--plain"] * plain)
    before, after = (number(printed, pattern) for pattern in (r": ([\d.]+)% before", r", ([\d.]+)% after"))
    rewards = [float(found) for found in re.findall(r"'reward': '?([\d.]+)", printed)]
    assert rewards[3] > rewards[0] and after > before
    if not plain:
        assert load_light(home / "out/rewarded/adapter").light_plan.removed_parameters > 0


@thorough
def test_embed(run: Run, home: Path) -> None:
    printed = run("embed", *on("encoder", "pairs", epochs=8, output="out/embeddings"))
    assert number(printed, r", ([\d.]+)% after") >= number(printed, r": ([\d.]+)% before")
    assert (home / "out/embeddings/model").is_dir()
    light = load_light(next((home / "out/embeddings/model").rglob("lightpeft.json")).parent)
    assert isinstance(light, LightModel) and light.light_plan.removed_parameters > 0


def test_export_gguf(run: Run, home: Path) -> None:
    chat(run, home)
    printed = run("export_gguf", "out/chat/adapter", "--model", "decoder", "--output", "out/served")
    assert "model.gguf" in printed and "matrices" in printed
    assert (home / "out/served/model.gguf").is_file()


def test_switch_tasks(run: Run, home: Path) -> None:
    for output in ("out/reviews", "out/more"):
        reviews(run, home, output)
    tasks = ("reviews=out/reviews/adapter", "more=out/more/adapter")
    texts = ("--text", "good1 good2 word3 good0", "--text", "bad1 bad2 word3 bad0")
    printed = run("switch_tasks", *tasks, "--model", "encoder", "--cache_size", 1, *texts).splitlines()
    classes = [number(line, r"-> class (\d)") for line in printed[:4]]
    assert classes == [1, 1, 0, 0], printed
    assert re.fullmatch("in memory: (reviews|more) of reviews, more", printed[4])


def test_the_list_names_every_script() -> None:
    listed = re.findall(r"\[`(\w+\.py)`\]\(\1\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))
