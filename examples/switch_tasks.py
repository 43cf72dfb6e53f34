"""Answer for several tasks in one process, over one base: light adapters are read when they are asked for.

python examples/classify.py --output out/reviews
python examples/classify.py --data fancyzhx/ag_news --output out/news
python examples/switch_tasks.py reviews=out/reviews/adapter news=out/news/adapter
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoTokenizer

from lightpeft import LightSwitch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("tasks", nargs="+", metavar="NAME=FOLDER", help="light adapters that classify texts")
parser.add_argument("--model", default="google-bert/bert-base-uncased", help="their base")
parser.add_argument("--text", action="append", help="to be classified; may be given several times")
parser.add_argument("--cache_size", type=int, default=2, help="models to keep in memory")
options = parser.parse_args()

texts = options.text or ["A wonderful film.", "Stocks fell on Monday."]
tokenizer = AutoTokenizer.from_pretrained(options.model)
folders = dict(task.split("=", 1) for task in options.tasks)


@torch.inference_mode()
def classify(task, text):
    model = switch[task]  # lives as long as this variable, whatever other threads ask for
    scores = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
    return f"{task}: {text} -> class {scores.argmax().item()} ({scores.max().item():.0%})"


with LightSwitch(folders, base=options.model, cache_size=options.cache_size) as switch, ThreadPoolExecutor(4) as pool:
    requests = [(task, text) for text in texts for task in switch]
    for answer in pool.map(classify, *zip(*requests, strict=True)):
        print(answer)
    print(f"in memory: {', '.join(switch.cached)} of {', '.join(switch.names)}")
