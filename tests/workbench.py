"""A workbench for whole runs: tiny base checkpoints with a tokenizer on disk, data they can learn, and run settings."""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from fsdp_on_cpus import shard_on_cpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from lightpeft.app import cli
from lightpeft.app.runs import pipeline, workers
from lightpeft.app.runs.reproduce import Cell
from lightpeft.app.runs.trainers import RunTrainer
from lightpeft.config import RunConfig, merge_settings, run_config_from_dict
from lightpeft.config.peft import override_peft
from lightpeft.errors import LightPeftError
from lightpeft.files import write_json

NEUTRAL = tuple(f"word{index}" for index in range(20))
GOOD = tuple(f"good{index}" for index in range(6))
BAD = tuple(f"bad{index}" for index in range(6))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LATENT: dict[str, Any] = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
LATENT |= {"moe_intermediate_size": 24, "first_k_dense_replace": 1}
POSITIONS = 40
"""Tokens that the tiny models have positions for."""

ENGINES = Path(__file__).parents[1] / "configs" / "engines"
"""What ships for `accelerate launch`."""
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
CONFIGS = [path for path in sorted(ENGINES.parent.rglob("*.yaml")) if path.parent != ENGINES]
GRIDS = [path for path in CONFIGS if "methods" in yaml.safe_load(path.read_text(encoding="utf-8"))]
"""What ships for `lightpeft reproduce`."""
RUNS = [path for path in CONFIGS if path not in GRIDS]
"""What ships for `lightpeft run`."""

Rows = list[dict[str, str]]


# -- base checkpoints --------------------------------------------------------------------------------------------


def save_base(
    folder: Path, family: str = "bert", seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """A tiny base ("bert", "mpnet", "deepseek_v3", "llama" or "mixtral"; the last two with half as many KV heads) and
    a tokenizer, of words if none."""
    vocabulary = [*SPECIAL, *NEUTRAL, *GOOD, *BAD] if tokenizer is None else tokenizer.get_vocab()
    torch.manual_seed(seed)
    model: PreTrainedModel
    if family == "bert":
        model = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=POSITIONS, **SIZES))
    elif family == "mpnet":
        model = MPNetModel(MPNetConfig(vocab_size=len(vocabulary), max_position_embeddings=POSITIONS + 2, **SIZES))
    else:
        sizes: dict[str, Any] = {
            "vocab_size": len(vocabulary),
            "num_key_value_heads": 2,
            "max_position_embeddings": POSITIONS,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "pad_token_id": 0,
            **SIZES,
        }
        if family == "mixtral":
            model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **sizes))
        elif family == "deepseek_v3":
            model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes | {"num_key_value_heads": None} | LATENT))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    (tokenizer or _tokenizer(vocabulary, family)).save_pretrained(folder)
    return folder


def tokenizer_of_bytes(split: Any = None, texts: Sequence[str] = (), **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer as decoders have it, of bytes and merges; its special tokens are 0 to 3, those of a tiny base.

    Args:
        split: the first step, a pre-tokenizer; None: that of GPT-2.
        texts: from which merges are learned.
        options: of the tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(names.values()), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def tokenizer_of_word_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer as BERT's, of the words of the data and single characters, with the ids that words have elsewhere."""
    words = [*NEUTRAL, *GOOD, *BAD]
    characters = sorted({character for word in words for character in word})
    pieces = [*SPECIAL, *words, *characters, *(f"##{character}" for character in characters)]
    return _around(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"), "bert")


def _tokenizer(vocabulary: Iterable[str], family: str) -> PreTrainedTokenizerFast:
    return _around(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"), family)


def _around(model: Any, family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words separated by spaces, around a model of how these are cut."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair, special = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    if family != "bert":
        single, pair, special = "[CLS] $A", "[CLS] $A $B:1", [("[CLS]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    start, end = ("cls_token", "sep_token") if family == "bert" else ("bos_token", "eos_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=POSITIONS,
        **{start: "[CLS]", end: "[SEP]"},
    )


# -- data --------------------------------------------------------------------------------------------------------


def labeled(count: int, seed: int = 0, longest: int = 12) -> Rows:
    """Texts of 4 words and more with three telling words each, half of them positive."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        telling = GOOD if index % 2 else BAD
        words = draw.choices(NEUTRAL, k=draw.randint(1, longest - 3)) + draw.choices(telling, k=3)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": "positive" if index % 2 else "negative"})
    return rows


def completions(count: int, seed: int = 0) -> Rows:
    """Prompts and what follows: the same telling word three times."""
    rows = []
    for index, row in enumerate(labeled(count, seed)):
        words = GOOD if index % 2 else BAD
        rows.append({"prompt": row["text"], "completion": " ".join([words[0]] * 3)})
    return rows


def write_rows(path: Path, rows: Rows) -> Path:
    """The rows as .csv or .jsonl."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


# -- runs --------------------------------------------------------------------------------------------------------


class Workbench:
    """One base with training and test data in a folder, and settings of short runs over them."""

    def __init__(self, folder: Path, family: str = "bert", task: str = "classification") -> None:
        self.folder = folder
        self.base = save_base(folder / "base", family)
        make, suffix = (labeled, "csv") if task == "classification" else (completions, "jsonl")
        self.train = write_rows(folder / f"train.{suffix}", make(64, seed=1))
        self.test = write_rows(folder / f"test.{suffix}", make(40, seed=2))
        self.task = task

    def settings(self, name: str = "run", **changes: Any) -> dict[str, Any]:
        """Nested settings of a run of 24 steps, 6 of them estimation; `changes` as {"light.remove.heads": 0.5}."""
        data = {"task": self.task, "train": str(self.train), "test": str(self.test), "max_length": 32}
        if self.task == "causal-lm":
            data["columns"] = {"prompt": "prompt", "completion": "completion"}
        rate = "auto" if changes.get("method") == "full" else 3e-2
        settings: dict[str, Any] = {
            "output": str(self.folder / name),
            "model": {"name": str(self.base)},
            "data": data,
            "light": {
                "remove": {"heads": 0.25, "neurons": 1 / 3, "experts": 1 / 3, "multiple_of": 1},
                "estimate": {"length": 0.25},
                "modules": {"blocks": 1.0, "remove": 0.75, "remove_ranks": 0.5},
                "rates": {"scale": 1.0},
            },
            "peft": {"r": 4, "lora_alpha": 8},
            "training": {"epochs": 3, "batch_size": 8, "learning_rate": rate, "save_steps": 4},
            "trainer": {"logging_steps": 4},
        }
        for path, value in changes.items():
            *sections, key = path.split(".")
            if sections[:1] == ["light"]:
                change = functools.reduce(lambda inner, section: {section: inner}, reversed(sections), {key: value})
                settings = merge_settings(settings, change)
                continue
            place = settings
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = override_peft(place[key], value) if path == "peft" else value
        return settings

    def config(self, name: str = "run", **changes: Any) -> RunConfig:
        """The `RunConfig` of `settings`."""
        return run_config_from_dict(self.settings(name, **changes))

    def yaml(self, name: str = "run", **changes: Any) -> Path:
        """The file <name>.yaml with `settings`."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.settings(name, **changes)), encoding="utf-8")
        return path


def lightpeft(*arguments: object) -> int:
    """Exit code of the command, run in this process."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def in_this_process(cell: Cell, devices: int, log: Path, module: Sequence[str] = ()) -> str | None:
    """How a grid runs its cells where processes of their own would take too long."""
    try:
        if module:
            importlib.import_module(module[0]).main(*module[1:])
        else:
            pipeline.run(cell.config)
    except LightPeftError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever ends the process of a cell is its own
        return f"{type(error).__name__}: {error}"
    return None


def in_other_process(*command: object, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """What a Python module does that is run with these words, such as a launcher."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    words = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout)


# -- disturbances ------------------------------------------------------------------------------------------------


Disturb = Callable[[], None]
"""Something that happens to a run: called in its process, or what makes it happen later."""


def signalling(number: int) -> Disturb:
    """Sends a signal to the process it is called in."""
    return lambda: os.kill(os.getpid(), number)


class _ActAt(TrainerCallback):
    def __init__(self, step: int, act: Disturb, event: str) -> None:
        self.step, self.act = step, act
        setattr(self, event, self._act)

    def _act(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def at_step(step: int, act: Disturb, event: str = "on_step_end") -> Disturb:
    """Makes `act` happen when the run has done so many steps."""

    def disturb() -> None:
        make = RunTrainer.__init__

        def disturbed(self: RunTrainer, *args: Any, **options: Any) -> None:
            make(self, *args, **options)
            self.add_callback(_ActAt(step, act, event))

        RunTrainer.__init__ = disturbed

    return disturb


@contextmanager
def forked() -> Iterator[None]:
    """Inside, processes that measure are forked: they begin in a moment."""
    fork = multiprocessing.get_context("fork")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "multiprocessing", SimpleNamespace(get_context=lambda _: fork))
        yield


def before(owner: Any, name: str, act: Disturb, calls: int = 1) -> Disturb:
    """Makes `act` happen before the n-th call of a function."""

    def disturb() -> None:
        original, counted = getattr(owner, name), iter(range(1, 1000))

        def disturbed(*args: Any, **options: Any) -> Any:
            if next(counted) == calls:
                act()
            return original(*args, **options)

        setattr(owner, name, disturbed)

    return disturb


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.truncate", "ctypes.dlsym"}
"""Audit events of what changes something on disk (the last one comes before two folders change places)."""


def at_file_operation(number: int, act: Disturb, counted: Callable[[int], object] = lambda count: None) -> Disturb:
    """Makes `act` happen before the n-th time that the process changes something on disk.

    Args:
        counted: told each time how many there were so far.
    """

    def disturb() -> None:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
            # compiled modules are no business of ours
            if (event in CHANGES or opened) and not str(arguments[0]).endswith(".pyc"):
                count += 1
                counted(count)
                if count == number:
                    act()

        sys.addaudithook(hook)

    return disturb


def in_child(disturb: Disturb, *arguments: object) -> tuple[int, str]:
    """The command in a forked process, in which `disturb` is called first.

    Returns:
        Its exit code (the negative number of the signal that killed it), and what it wrote to stderr besides notices
        of stages that are done and of a prefix cache.
    """
    (end,) = in_children(1, lambda rank: disturb(), *arguments)
    return end


def in_children(
    count: int, disturb: Callable[[int], object], *arguments: object, engine: str = "ddp"
) -> list[tuple[int, str]]:
    """The command, if any, in forked processes that are one run (over gloo), or in one, and how each of them ends.

    Args:
        disturb: called first in each, with its rank.
        engine: name of a file of `configs/engines`.

    Returns:
        As for `in_child`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_forked(partial(_member, rank, count, port, engine, disturb), arguments) for rank in range(count)]
    return [_ended(process, reading) for process, reading in children]


def _member(rank: int, count: int, port: int, engine: str, disturb: Callable[[int], object]) -> None:
    """Make this process one of several, as `accelerate launch` does."""
    if count > 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # that of the process it is forked from
        sharding = yaml.safe_load((ENGINES / f"{engine}.yaml").read_text(encoding="utf-8")).get("fsdp_config", {})
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = {**place, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_FSDP": bool(sharding), **sharding}
        os.environ.update({name.upper(): str(value) for name, value in environment.items()})
        shard_on_cpus()
    disturb(rank)


def _forked(first: Callable[[], object], arguments: tuple[object, ...]) -> tuple[Any, int]:
    """A process with the command, and where to read what it writes to stderr."""
    reading, writing = os.pipe()

    def child() -> None:
        os.close(reading)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        sys.stderr = os.fdopen(writing, "w", encoding="utf-8", buffering=1)
        first()
        os._exit(lightpeft(*arguments) if arguments else 0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(writing)
    return process, reading


def _ended(process: Any, reading: int) -> tuple[int, str]:
    with open(reading, encoding="utf-8") as errors:
        written = errors.readlines()
    process.join()
    return process.exitcode, "".join(line for line in written if not NOTICE.match(line))


NOTICE = re.compile("prefix cache: |generated |(estimate|prune|train|widen|evaluate): done in ")
"""How lines begin that a run writes to stderr in any case."""


# -- what is on disk ---------------------------------------------------------------------------------------------


def checksums(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below a folder; empty where there is none."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stamps(folder: Path) -> dict[str, int]:
    """Relative path -> time of the last change, in nanoseconds, of everything below a folder but locks."""
    files = (path for path in sorted(folder.rglob("*")) if path.name != ".lock")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def read(path: Path) -> dict[str, Any]:
    """A JSON object, without its checksum."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content.pop("checksum", None)
    return content


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON object as who wrote it could: its checksum fits again."""
    content = read(path)
    change(content)
    write_json(path, content)


def comparable(folder: Path) -> dict[str, Any]:
    """What two equal runs share: plan, weights, quality and sizes; not times and places."""
    metrics = read(folder / "metrics.json")
    return {
        "plan": read(folder / "plan.json"),
        "weights": checksums(folder / "adapter")["adapter_model.safetensors"],
        **{name: metrics[name] for name in ("metrics", "parameters")},
    }
