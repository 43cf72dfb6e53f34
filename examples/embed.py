"""Train sentence embeddings on questions and their answers, with sentence-transformers, and search with them.

python examples/embed.py --output out/embeddings
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss

from lightpeft import light_trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
parser.add_argument(
    "--data", default="sentence-transformers/natural-questions", help="two columns that belong together"
)
parser.add_argument("--epochs", type=float, default=1)
parser.add_argument("--learning_rate", type=float, default=5e-4)
parser.add_argument("--output", default="out/embeddings")
options = parser.parse_args()

model = SentenceTransformer(options.model)
pairs = load_dataset(options.data, split="train")
trainer = light_trainer(SentenceTransformerTrainer)(
    model=model,
    args=SentenceTransformerTrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        learning_rate=options.learning_rate,
        report_to=[],
    ),
    train_dataset=pairs,
    loss=MultipleNegativesRankingLoss(model),
    peft_config=LoraConfig(task_type="FEATURE_EXTRACTION"),
    light="fast",  # 40% of the blocks' parameters go
)
trainer.train()

question, answer = pairs.column_names[:2]
texts = pairs[:100][answer]
found = model.similarity(model.encode([pairs[0][question]]), model.encode(texts)).argmax().item()
print(f"{pairs[0][question]}\n-> {texts[found]}")
model.save_pretrained(f"{options.output}/model")
