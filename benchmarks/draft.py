"""A light model as the draft of its own base: does it make one text at a time faster, and which texts come out?

    python benchmarks/draft.py runs/gsm8k/writers/cells/smollm2/gsm8k/40-of-the-blocks/0 --rows 16

Of a run that keeps both: the whole base with the adapter at full width writes alone, and with the light model as
transformers' `assistant_model`, greedily, one prompt at a time, in alternation. The texts have to be the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from publishing import markdown_table, report, spread_text
from transformers import GenerationConfig

from lightpeft.errors import require
from lightpeft.models.loading import quiet_libraries
from lightpeft.profiling import ratio
from lightpeft.runs import pipeline
from lightpeft.saved.opening import open_result
from lightpeft.saved.results import open_peft
from lightpeft.saved.run_folder import RunFolder


class Writer:
    """The model at full width, alone or with a draft, and how often it computed."""

    def __init__(self, model: Any, draft: Any, tokenizer: Any, tokens: int) -> None:
        """
        Args:
            draft: a smaller model, or None.
            tokens: written a text at most.
        """
        self.model, self.draft, self.passes = model, draft, 0
        self.config = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    @torch.inference_mode()
    def write(self, prompt: Sequence[int]) -> tuple[list[int], float]:
        """Tokens behind a prompt, and the seconds they took."""
        ids = torch.tensor([list(prompt)])
        count = self.model.get_base_model().register_forward_pre_hook(self._count)
        started = time.perf_counter()
        with_draft = {} if self.draft is None else {"assistant_model": self.draft}
        written = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self.config, **with_draft
        )
        seconds = time.perf_counter() - started
        count.remove()
        return written[0, ids.shape[1] :].tolist(), seconds

    def _count(self, *_: Any) -> None:
        self.passes += 1


def measure(folder: Path, rows: int, tokens: int) -> dict[str, Any]:
    """Speed, passes and texts of both ways, prompt by prompt."""
    run = RunFolder.at(folder)
    require(run.keeps_full and run.result != run.full, f"{folder} does not keep both models; set light.keep to both")
    work = pipeline.prepare(run.config)
    light = open_result(run, work.task)
    model = open_peft(run.full, work.dense_model().model).eval()
    test = work.task.test.select(range(min(rows, len(work.task.test))))
    prompts = work.task.encode_inputs(test, work.tokenizer)["input_ids"]
    ways = {"alone": Writer(model, None, work.tokenizer, tokens), "with": Writer(model, light, work.tokenizer, tokens)}
    found: dict[str, list[tuple[list[int], float]]] = {name: [] for name in ways}
    for prompt in prompts:
        for name, way in ways.items():
            found[name].append(way.write(prompt))
    speeds = {name: [len(ids) / seconds for ids, seconds in texts] for name, texts in found.items()}
    written = {name: sum(len(ids) for ids, _ in texts) for name, texts in found.items()}
    return {
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "speed_ratio": vars(ratio(speeds["with"], speeds["alone"])),
        "tokens_per_pass": {name: written[name] / way.passes for name, way in ways.items()},
        "same_texts": sum(a[0] == b[0] for a, b in zip(found["with"], found["alone"], strict=True)),
        "texts": len(prompts),
        "removed_of_blocks": light.light_plan.removed_of_blocks,
        "values": speeds,
    }


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row a run."""
    header = ("", "alone, tokens/s", "with the draft", "speed", "tokens a pass", "same texts")
    return markdown_table(
        header,
        [
            [
                f"{found['removed_of_blocks']:.0%} of the blocks gone",
                f"{found['tokens_per_second']['alone']:.1f}",
                f"{found['tokens_per_second']['with']:.1f}",
                spread_text(found["speed_ratio"]),
                f"{found['tokens_per_pass']['with']:.2f}",
                f"{found['same_texts']} of {found['texts']}",
            ]
            for found in results.values()
        ],
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="draft", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs that keep both")
    parser.add_argument("--rows", type=int, default=16, help="held-out prompts")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a text at most")
    parser.add_argument("--out", type=Path, help="where all numbers go")
    options = parser.parse_args(arguments)
    quiet_libraries()

    def found() -> dict[str, Any]:
        require(min(options.rows, options.tokens) >= 1, "--rows and --tokens start at 1")
        return {"results": {str(folder): measure(folder, options.rows, options.tokens) for folder in options.runs}}

    return report("draft", arguments, options.out, found, markdown)


if __name__ == "__main__":
    sys.exit(main())
