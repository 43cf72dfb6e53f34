"""Write a light adapter and its base as one file for llama.cpp, Ollama and LM Studio (pip install 'lightpeft[gguf]').

python examples/chat.py --output out/chat
python examples/export_gguf.py out/chat/adapter --output out/served
llama-cli -m out/served/model.gguf
"""

import argparse

from transformers import AutoTokenizer

from lightpeft import export_model, load_light

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="folder of a light adapter over a decoder")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="its base")
parser.add_argument("--dtype", default="bf16", choices=["f32", "f16", "bf16", "q8_0"])
parser.add_argument("--output", default="out/served", help="a new folder")
options = parser.parse_args()

light = load_light(options.adapter, base=options.model)
print(light.light_plan.summary())
tokenizer = AutoTokenizer.from_pretrained(options.model)
loader = export_model(light, options.output, "gguf", tokenizer, dtype=options.dtype)
print(f"{options.output}/model.gguf is for {loader}")
