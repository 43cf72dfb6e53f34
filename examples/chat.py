"""Teach a decoder to answer as in some chats, with TRL's SFTTrainer, and let it answer.

python examples/chat.py --output out/chat
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lightpeft import light_trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", default="trl-lib/Capybara", help="a column messages")
parser.add_argument("--blocks", type=float, default=0.2, help="part of the blocks' parameters that goes; 0: nothing")
parser.add_argument("--epochs", type=float, default=1)
parser.add_argument("--learning_rate", type=float, default=5e-4)
parser.add_argument("--output", default="out/chat")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
on_gpu = torch.cuda.is_available()
trainer = light_trainer(SFTTrainer)(
    model=AutoModelForCausalLM.from_pretrained(options.model),
    args=SFTConfig(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        max_length=512,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to=[],
    ),
    train_dataset=load_dataset(options.data, split="train"),
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM"),
    light=options.blocks,
)
trainer.train()
trainer.save_model(f"{options.output}/adapter")

question = [{"role": "user", "content": "What is a good name for a small model?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
model = trainer.model.eval()
answer = model.generate(**inputs.to(model.device), max_new_tokens=40, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
