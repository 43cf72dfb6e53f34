"""What all tests share: no hub, one thread, fixed seeds, and the real models and data that `demo/fetch.py` leaves."""

from __future__ import annotations

import functools
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read by the Hugging Face libraries when they are imported, so set before any test module imports them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No threads that compile: a process that is forked later would wait for those of its parent, which it does not have.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import hypothesis
import jinja2
import pytest
import torch
from lanes import FULL, needs_family, needs_other_types
from transformers import set_seed

from lightpeft.prune import length

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("any machine", deadline=None, max_examples=100 if FULL else 25)
hypothesis.settings.load_profile("any machine")

CACHE = Path(__file__).parents[1] / "demo" / "cache"

LONG = ("support", "graphs", "resume", "parity", "docs", "going_on", "surgery", "reproduce", "checking")
LONG += ("real_models", "faults", "sharded", "peft_variants", "full_width", "switching", "pipeline", "checkpoint")
LONG += ("hostile", "gpu", "task_entries", "start", "discovery", "on_disk", "exporting", "prefix", "bad_input")
"""Test files that take longest, the longest first."""
OF_OTHER_TYPE = ("bottleneck", "houlsby", "pfeiffer", "adapters")
"""In names of cases: those of bottleneck adapters."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files begin first, so that processes that take a file at a time end together. `make test` is a part."""
    if not FULL and "thorough" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    for item in items:
        named = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        for name in (str(value) for value in named):
            item.add_marker(needs_family(name))
        if any(kind in item.name.partition("[")[2] for kind in OF_OTHER_TYPE):
            item.add_marker(needs_other_types)
    rank = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


MANY = 50_000
"""Objects that a collection goes through in some milliseconds; imports leave a million in the end."""


def pytest_collection_finish() -> None:
    _freeze()


def pytest_runtest_logfinish() -> None:
    if len(gc.get_objects()) > MANY:  # the test was the first to need a library, or a family of models
        _freeze()


def _freeze() -> None:
    """What imports leave is there to stay: without it a collection takes milliseconds instead of half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run side by side, and sums in one thread are the same in every run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def without_waiting() -> Iterator[None]:
    """Nobody waits for a disk, since no test outlives the machine; PEFT's model card is compiled once, not per save."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same seeds, alone or in any order."""
    set_seed(0)


def fetched(name: str, option: str = "") -> Path:
    """The folder `name` of the demo's cache; the test is skipped where it is not there."""
    folder = CACHE / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; run: python demo/fetch.py{option}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def few_examples_are_enough() -> Iterator[None]:
    """Tiny models are estimated on a handful of rows; tests of the floor set it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length, "LEAST_EXAMPLES", 0)
        yield


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2: a BERT encoder with 6 layers."""
    return fetched("minilm")


@pytest.fixture(scope="session")
def movie_reviews() -> Path:
    """Folder with train.csv and test.csv: columns text and label ("positive" or "negative")."""
    return fetched("movie_reviews")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct: a Llama decoder with 30 layers and grouped-query attention."""
    return fetched("smollm2", " --decoder")


@pytest.fixture(scope="session", autouse=True)
def forkable() -> None:
    """Autograd begins before any fake tensor is made.

    Fake tensors give PyTorch's builds for CUDA a pretended device where there is none. Autograd would begin with a
    thread for it, and refuse to work in processes that are forked later.
    """
    torch.ones((), requires_grad=True).backward()


BROWSER = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, if it is installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*BROWSER.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()
