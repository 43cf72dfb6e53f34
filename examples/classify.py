"""Classify texts, with a model that becomes smaller while it learns to.

python examples/classify.py --output out/reviews
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from lightpeft import LightTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="google-bert/bert-base-uncased")
parser.add_argument("--data", default="cornell-movie-review-data/rotten_tomatoes", help="columns text and label")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--learning_rate", type=float, default=1e-3)
parser.add_argument("--output", default="out/reviews")
options = parser.parse_args()

data = load_dataset(options.data)
classes = sorted(set(data["train"]["label"]))
tokenizer = AutoTokenizer.from_pretrained(options.model)


def encode(row):
    return {**tokenizer(row["text"], truncation=True, max_length=128), "labels": classes.index(row["label"])}


rows = data.map(encode, remove_columns=data["train"].column_names)
trainer = LightTrainer(
    model=AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(classes)),
    args=TrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=16,
        learning_rate=options.learning_rate,
        report_to=[],
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1),
    compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
    light=0.4,  # of the blocks' parameters go; without it, what is measured to cost no more than a point of accuracy
)
trainer.train()
print(trainer.light_plan)
print("accuracy:", trainer.evaluate()["eval_accuracy"])
trainer.save_model(f"{options.output}/adapter")  # load_light(folder) reads it over a fresh base
