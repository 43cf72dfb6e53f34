"""What `test_distributed.py` runs in two processes: the same stage under several kinds of data parallelism.

Each process writes the records it sees, and its masks, to a folder of its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lights import light_of
from safetensors.torch import save_file
from tiny import batch
from torch.nn.parallel import DistributedDataParallel
from training import (
    StopAt,
    chunks,
    collate,
    encoded,
    one_light_training,
    student,
    trained_classifier,
    trained_weights,
    trainer,
    upper,
)

from lightpeft.compat.transformers import cpu_without_number
from lightpeft.plans.scoring import rank_taylor_terms
from lightpeft.prune import learning
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.importance import RankObserver
from lightpeft.recipe.pruner import EarlyPruner
from lightpeft.training.prefix import FrozenPrefix, PrefixCache, cache_prefix

STEPS, ROWS = 3, 8


def loop(parts: int = 1, synchronize: str = "last", **options: Any) -> Estimator:
    """A hand-written loop over this process's share of the rows, in `parts` backward passes a step."""
    model = student()
    parallel = DistributedDataParallel(model, **options)
    estimator = Estimator(model, light_of(length=STEPS))
    estimator.start(total_steps=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        rows = list(chunks(batch(rows=ROWS, length=20, seed=step, labels=True), ROWS // dist.get_world_size()))
        shares = list(chunks(rows[dist.get_rank()], ROWS // dist.get_world_size() // parts))
        for index, share in enumerate(shares):
            wait = synchronize == "last" and index < parts - 1
            with parallel.no_sync() if wait else nullcontext():
                (parallel(**share).loss / parts).backward()
        estimator.step()
        optimizer.step()
        optimizer.zero_grad()
    estimator.stop()
    return estimator


def seen_gradients(**options: Any) -> dict[str, torch.Tensor]:
    """Rank terms that the observer sees in one step, and those of this process's rows without any parallelism."""
    rows = list(chunks(batch(rows=ROWS, length=20, labels=True), ROWS // dist.get_world_size()))[dist.get_rank()]
    model = student()
    sites = Estimator(model, light_of()).sites
    observer = RankObserver(sites)
    parallel = DistributedDataParallel(model, **options)
    parallel(**rows).loss.backward()
    seen = observer.take_terms()
    weights = [(site.down, 1) for site in sites] + [(site.up, 0) for site in sites]
    reduced = torch.cat([rank_taylor_terms(weight.detach(), weight.grad, dim) for weight, dim in weights])
    alone = student()
    observer = RankObserver(Estimator(alone, light_of()).sites)
    alone(**rows).loss.backward()
    return {"seen": seen, "local": observer.take_terms(), "reduced": reduced}


def in_trainer(folder: Path, rows: int, parts: int = 1) -> EarlyPruner:
    """A language model: its loss is the one that the trainer averages over the tokens of all processes."""
    pruner = EarlyPruner(student("llama-gqa"), light_of(length=4))
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts, "ddp_backend": "gloo"}
    trainer(pruner.model, folder, pruner.callback(), **settings).train()
    return pruner


def resumed_in_trainer(folder: Path) -> EarlyPruner:
    """Stop after three of four steps, inside the second window, and go on from the checkpoint."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    first = EarlyPruner(student("llama-gqa"), light_of(length=4))
    trainer(first.model, folder, first.callback(), StopAt(3), **settings).train()
    second = EarlyPruner(student("llama-gqa"), light_of(length=4))
    checkpoint = folder / "checkpoint-3"
    again = trainer(second.model, folder, second.callback(resume_from=checkpoint), **settings)
    with cpu_without_number(again.args):  # `Trainer` alone does not go on over CPUs before transformers 5.24
        again.train(resume_from_checkpoint=str(checkpoint))
    return second


def light_training(folder: Path, rows: int, train: str, resume: bool = False) -> Any:
    """Estimate, cut and fine-tune a language model in one training; `resume` from a checkpoint behind the cut."""
    settings: dict[str, Any] = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 8}
    trainer = one_light_training(folder, rows, train=train, **settings)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8") if resume else None)
    return trainer


def shared_prefix(folder: Path) -> dict[str, torch.Tensor]:
    """States that both processes computed into one file, and the gradients of a step on this process's rows."""
    model = upper()
    prefix = FrozenPrefix(model)
    computed: list[int] = []
    parallel = DistributedDataParallel(model)
    with prefix.attached():
        inside = next(prefix.blocks[0].children())
        inside.register_forward_hook(lambda module, args, output: computed.append(len(args[0])))
        settings = PrefixCache("file")
        prefix.known = known = cache_prefix(prefix, encoded(16), collate, settings, folder / "prefix", batch_size=4)
        assert known is not None
        seen = sum(computed)
        share = range(dist.get_rank(), 16, dist.get_world_size())
        parallel(**collate(encoded(16).select(share).to_list())).loss.backward()
    whole = collate(encoded(16).to_list())
    found = known.of(whole)
    assert found is not None
    states = found[whole["attention_mask"].bool()]
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**own, "states": states, "computed": torch.tensor(seen), "again": torch.tensor(sum(computed) - seen)}


def main(folder: Path) -> None:
    """What one of them does, which is forked from the process of the tests."""
    learning.FEWEST_TELLING = 2 * ROWS  # of both processes, in the last window of two steps
    dist.init_process_group("gloo")
    estimators = {
        "ddp": loop(),
        "ddp-bucket-view": loop(gradient_as_bucket_view=True),
        "ddp-static-graph": loop(static_graph=True),
        "accumulation-no-sync": loop(parts=2),
        "accumulation-bucket-view": loop(parts=2, gradient_as_bucket_view=True),
        "accumulation-every-sync": loop(parts=2, synchronize="every"),
        "trainer": in_trainer(folder / "trainer", rows=4).estimator,
        "trainer-accumulation": in_trainer(folder / "trainer", rows=2, parts=2).estimator,
        "trainer-resumed": resumed_in_trainer(folder / "resumed").estimator,
    }
    for name, estimator in estimators.items():
        record = estimator.record()
        place = folder / f"rank{dist.get_rank()}" / name
        record.save(place)
        save_file({"masks": estimator.masks.values.clone()}, place / "masks.safetensors")
    for name, options in (("plain", {}), ("bucket-view", {"gradient_as_bucket_view": True})):
        save_file(seen_gradients(**options), folder / f"rank{dist.get_rank()}" / f"{name}.safetensors")
    for train, resume in product(("peft", "all"), (False, True)):
        trained = light_training(folder / train, rows=4, train=train, resume=resume)
        place = folder / f"rank{dist.get_rank()}" / f"{train}-{'resumed' if resume else 'once'}"
        trained.light_plan.save(place / "plan.json")
        save_file(trained_weights(trained.model), place / "weights.safetensors")
    classifier = trained_classifier(folder / "classifier", rows=2, gradient_accumulation_steps=2, ddp_backend="gloo")
    save_file(trained_weights(classifier), folder / f"rank{dist.get_rank()}" / "classifier.safetensors")
    save_file(shared_prefix(folder), folder / f"rank{dist.get_rank()}" / "prefix.safetensors")
    dist.destroy_process_group()
