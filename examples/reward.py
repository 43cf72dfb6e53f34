"""Teach a decoder by a reward that a function computes, with TRL's GRPOTrainer: one for the right word in an answer.

python examples/reward.py --output out/rewarded
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from lightpeft import light_trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", default="cornell-movie-review-data/rotten_tomatoes", help="columns text and label")
parser.add_argument(
    "--labels", nargs="+", default=["negative", "positive"], help="in class order, if label is a number"
)
parser.add_argument("--longest", type=int, default=1000, help="characters of a text; longer ones are left out")
parser.add_argument("--blocks", type=float, default=0.1, help="part of the blocks' parameters that goes; 0: nothing")
parser.add_argument("--estimation", type=int, help="steps before the cut; as many as it takes if not given")
parser.add_argument("--plain", action="store_true", help="plain LoRA in TRL's own trainer, to compare with")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch_size", type=int, default=16, help="answers a step, four to each text")
parser.add_argument("--learning_rate", type=float, default=1e-4)
parser.add_argument("--output", default="out/rewarded")
options = parser.parse_args()


def asked(row):
    label = row["label"] if isinstance(row["label"], str) else options.labels[row["label"]]
    return {"prompt": f"Review: {row['text']}\nSentiment ({' or '.join(options.labels)}):", "label": label}


def right(completions, label, **_):
    """One for an answer that names the right label and no other."""
    named = [[name for name in options.labels if name in text.lower()] for text in completions]
    return [float(names == [true]) for names, true in zip(named, label, strict=True)]


@torch.no_grad()
def accuracy(model, tokenizer, rows):
    answers = []
    for start in range(0, len(rows), 32):
        batch = tokenizer(rows[start : start + 32]["prompt"], padding=True, padding_side="left", return_tensors="pt")
        written = model.eval().generate(**batch.to(model.device), max_new_tokens=LENGTH, do_sample=False)
        answers += tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(right(answers, rows["label"])) / len(rows)


LENGTH = 4  # tokens of an answer
on_gpu = torch.cuda.is_available()
rows = load_dataset(options.data).filter(lambda row: len(row["text"]) <= options.longest)
rows = rows.map(asked, remove_columns=["text"])
test = rows["test"].shuffle(seed=0).select(range(min(200, len(rows["test"]))))
cut = {"remove": {"blocks": options.blocks}, "estimate": {"length": options.estimation}}
trainer = (GRPOTrainer if options.plain else light_trainer(GRPOTrainer))(
    model=options.model,
    reward_funcs=right,
    args=GRPOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        num_generations=4,
        max_completion_length=LENGTH,
        gradient_checkpointing=False,
        learning_rate=options.learning_rate,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=10,
        report_to=[],
    ),
    train_dataset=rows["train"].shuffle(seed=0),
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    **({} if options.plain else {"light": cut}),
)
before = accuracy(trainer.model, trainer.processing_class, test)
trainer.train()
after = accuracy(trainer.model, trainer.processing_class, test)
print(f"right answers on {len(test)} test rows: {before:.1%} before, {after:.1%} after")
trainer.save_model(f"{options.output}/adapter")
