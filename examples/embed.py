"""Train sentence embeddings on texts that belong together, with sentence-transformers, and search with them.

python examples/embed.py --output out/embeddings
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.training_args import BatchSamplers

from lightpeft import light_trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
parser.add_argument(
    "--data", default="sentence-transformers/natural-questions", help="two columns that belong together"
)
parser.add_argument("--light", type=float, default=0.4, help="part of the blocks' parameters that goes")
parser.add_argument("--plain", action="store_true", help="plain LoRA in the library's own trainer, to compare with")
parser.add_argument("--epochs", type=float, default=1)
parser.add_argument("--learning_rate", type=float, default=5e-4)
parser.add_argument("--output", default="out/embeddings")
options = parser.parse_args()


def found(model, rows):
    """How often the most similar of all second texts is the one that belongs to the first."""
    first, second = (rows[name] for name in rows.column_names[:2])
    choices = sorted(set(second))
    nearest = model.similarity(model.encode(first), model.encode(choices)).argmax(1).tolist()
    return sum(choices[near] == wanted for near, wanted in zip(nearest, second, strict=True)) / len(rows)


model = SentenceTransformer(options.model)
rows = load_dataset(options.data)
pairs = rows["train"]
test = rows["test"] if "test" in rows else pairs.select(range(100))
before = found(model, test)
loss, peft_config = MultipleNegativesRankingLoss(model), LoraConfig(task_type="FEATURE_EXTRACTION")
args = SentenceTransformerTrainingArguments(
    options.output,
    num_train_epochs=options.epochs,
    per_device_train_batch_size=32,
    learning_rate=options.learning_rate,
    batch_sampler=BatchSamplers.NO_DUPLICATES,  # the others of a batch are taken for what does not belong
    report_to=[],
)
if options.plain:
    peft_config.target_modules = "all-linear"
    model[0].model = get_peft_model(model[0].model, peft_config)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)
else:
    cut = {"remove": {"blocks": options.light}, "modules": {"remove_ranks": 0.5}, "rates": {"scale": 1.0}}
    trainer = light_trainer(SentenceTransformerTrainer)(
        model=model, args=args, train_dataset=pairs, loss=loss, peft_config=peft_config, light=cut
    )
trainer.train()
print(f"found for {len(test)} texts: {before:.1%} before, {found(model, test):.1%} after")
model.save_pretrained(f"{options.output}/model")
