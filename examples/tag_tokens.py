"""Find names in texts (token classification), with a model that becomes smaller while it learns to.

python examples/tag_tokens.py --output out/names
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    TrainingArguments,
)

from lightpeft import LightTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="google-bert/bert-base-cased")
parser.add_argument("--data", default="lhoestq/conll2003", help="columns tokens (words) and ner_tags (numbers)")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--learning_rate", type=float, default=1e-3)
parser.add_argument("--output", default="out/names")
options = parser.parse_args()

data = load_dataset(options.data)
tags = 1 + max(tag for row in data["train"]["ner_tags"] for tag in row)
tokenizer = AutoTokenizer.from_pretrained(options.model)


def encode(row):
    encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=128)
    words = encoded.word_ids()  # the first token of a word has its tag
    first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
    labels = [row["ner_tags"][word] if begins else -100 for word, begins in zip(words, first, strict=True)]
    return {**encoded, "labels": labels}


def accuracy(found):
    tagged = found.label_ids != -100
    return {"accuracy": (found.predictions.argmax(-1) == found.label_ids)[tagged].mean()}


rows = data.map(encode, remove_columns=data["train"].column_names)
trainer = LightTrainer(
    model=AutoModelForTokenClassification.from_pretrained(options.model, num_labels=tags),
    args=TrainingArguments(
        options.output, num_train_epochs=options.epochs, learning_rate=options.learning_rate, report_to=[]
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
    data_collator=DataCollatorForTokenClassification(tokenizer),
    peft_config=LoraConfig(task_type="TOKEN_CLS"),
    compute_metrics=accuracy,
    light=0.4,  # of the blocks' parameters go
)
trainer.train()
print("accuracy of tags:", trainer.evaluate()["eval_accuracy"])
trainer.save_model(f"{options.output}/adapter")
