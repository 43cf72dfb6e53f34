"""Teach a decoder which of two answers people prefer, with TRL's DPOTrainer. The reference is the dense model.

python examples/prefer.py --output out/preferences
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from lightpeft import light_trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", default="trl-lib/ultrafeedback_binarized", help="columns chosen and rejected")
parser.add_argument("--blocks", type=float, default=0.2, help="part of the blocks' parameters that goes; 0: nothing")
parser.add_argument("--estimation", type=int, help="steps before the cut; as many as it takes if not given")
parser.add_argument("--plain", action="store_true", help="plain LoRA in TRL's own trainer, to compare with")
parser.add_argument("--epochs", type=float, default=1)
parser.add_argument("--learning_rate", type=float, default=1e-4)
parser.add_argument("--output", default="out/preferences")
options = parser.parse_args()

on_gpu = torch.cuda.is_available()
rows = load_dataset(options.data)
cut = {"remove": {"blocks": options.blocks}, "estimate": {"length": options.estimation}}
trainer = (DPOTrainer if options.plain else light_trainer(DPOTrainer))(
    model=options.model,
    args=DPOConfig(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=4,
        learning_rate=options.learning_rate,
        max_length=512,
        gradient_checkpointing=False,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=10,
        report_to=[],
    ),
    train_dataset=rows["train"],
    eval_dataset=rows.get("test"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    **({} if options.plain else {"light": cut}),
)
trainer.train()
margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
print(f"by how much the preferred answers are ahead: {margins[0]:.3f} at first, {margins[-1]:.3f} in the end")
if "test" in rows:
    found = trainer.evaluate()
    print(f"test: loss {found['eval_loss']:.4f}, {found['eval_rewards/accuracies']:.1%} of the preferred ones ahead")
trainer.save_model(f"{options.output}/adapter")
