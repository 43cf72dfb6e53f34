"""Make pairs of texts with labels: right and wrong answers for prefer.py, texts that belong together for embed.py.

python examples/make_pairs.py --data demo/cache/movie_reviews --output out/pairs
"""

import argparse
import json
import random
from pathlib import Path

from datasets import load_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="columns text and label, which is a text, too")
parser.add_argument("--rows", type=int, default=5000, help="of each split, at most")
parser.add_argument("--longest", type=int, default=1000, help="characters of a text; longer ones are left out")
parser.add_argument("--together", action="store_true", help="text and label, for embed.py")
parser.add_argument("--output", default="out/pairs")
options = parser.parse_args()


def pair_of(text, label, labels):
    if options.together:
        return {"text": text, "meaning": label}
    wrong = random.choice([other for other in labels if other != label])
    return {"prompt": f"{text}\nLabel:", "chosen": f" {label}", "rejected": f" {wrong}"}


random.seed(0)
Path(options.output).mkdir(parents=True, exist_ok=True)
for split, rows in load_dataset(options.data).items():
    texts = [(row["text"], row["label"].replace("_", " ")) for row in rows if len(row["text"]) <= options.longest]
    labels = sorted({label for _, label in texts})
    pairs = [pair_of(text, label, labels) for text, label in random.sample(texts, min(options.rows, len(texts)))]
    path = Path(options.output) / f"{split}.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    print(f"{path}: {len(pairs)} pairs")
