"""`light_trainer` around the trainers that people use: TRL's, `Seq2SeqTrainer`, sentence-transformers', other tasks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from datasets import Dataset
from lanes import telling
from lights import but, light_of, preset
from peft import IA3Config, LoraConfig
from tiny import make, refusal
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl_settings import SETTINGS, WORDS, logits, tokenizer

from lightpeft import BottleneckConfig, LightTrainer, light_trainer, load_light
from lightpeft.prune import length
from lightpeft.prune.light_model import LightModel

trl = pytest.importorskip("trl")

LIGHT = light_of(length=5, heads=0.5, neurons=0.5, modules=0.5, scale=1.0)
ARGUMENTS: dict[str, Any] = {**SETTINGS, "warmup_steps": 2}


def rows_of(count: int = 48) -> list[tuple[str, str, str]]:
    """Prompt, good and bad answer."""
    return [
        (" ".join(WORDS[i % 20 : i % 20 + 2 + i % 3]), " ".join(WORDS[25:28]), " ".join(WORDS[29:31]))
        for i in range(count)
    ]


@pytest.fixture
def base(tmp_path: Path) -> PreTrainedModel:
    make("llama-gqa", eos_token_id=1).save_pretrained(tmp_path / "base")
    set_seed(0)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def check(trainer: Any, steps: int = 20, better: bool = True) -> None:
    """One training, cut after five steps, that learned something."""
    trainer.train()
    assert trainer.state.global_step == steps
    assert trainer.light_report["estimation_steps"] == 5 and trainer.light_plan.removed_parameters > 0
    found = losses(trainer)
    assert not better or mean(found[-4:]) < mean(found[:4])


# -- TRL -----------------------------------------------------------------------------------------------------------


def sft(base: PreTrainedModel, folder: Path, rows: list[dict[str, Any]], light: Any = LIGHT, **changes: Any) -> Any:
    return light_trainer(trl.SFTTrainer)(
        model=base,
        args=trl.SFTConfig(str(folder), **{**ARGUMENTS, **changes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=chat_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.05),
        light=light,
    )


def chat_tokenizer() -> Any:
    of_words = tokenizer()
    of_words.chat_template = (
        "{% for message in messages %}{{ message['content'] }} {% if message['role'] == 'assistant' %}"
        "{% generation %}<eos>{% endgeneration %} {% endif %}{% endfor %}"
    )
    return of_words


SFT_ROWS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "text": lambda prompt, answer: {"text": f"{prompt} {answer}"},
    "completion": lambda prompt, answer: {"prompt": f"{prompt} ", "completion": answer},
    "chat": lambda prompt, answer: {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    },
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("text", {}),
        ("text", {"packing": True, "max_length": 24, "max_steps": 20}),
        ("completion", {"gradient_checkpointing": True}),
        ("chat", {}),
    ],
    ids=["text", "packing", "completion", "chat"],
)
def test_sft(base: PreTrainedModel, tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    rows = [SFT_ROWS[kind](prompt, good) for prompt, good, _ in rows_of(192 if "packing" in changes else 48)]
    trainer = sft(base, tmp_path / "out", rows, **changes)
    check(trainer)
    trainer.save_model(str(tmp_path / "light"))
    again = load_light(tmp_path / "light", base=tmp_path / "base")
    assert logits(again).equal(logits(trainer.model))


def test_packed_rows_are_counted_as_before_training(
    base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps are scored, whose batches are one flattened row each."""
    monkeypatch.setattr(length, "LEAST_EXAMPLES", 16)
    rows = [SFT_ROWS["text"](prompt, good) for prompt, good, _ in rows_of(192)]
    light = but(LIGHT, length=0.5)
    trainer = sft(base, tmp_path / "out", rows, light, packing=True, max_length=24, max_steps=20)
    trainer.train()
    assert trainer.light_report["estimation_steps"] == 10
    assert trainer.light_record.meta["scored_examples"] > 40, "each packed row holds several"


def dpo(base: Any, folder: Path, **changes: Any) -> Any:
    rows = [{"prompt": f"{prompt} ", "chosen": good, "rejected": bad} for prompt, good, bad in rows_of()]
    reference = {"ref_model": changes.pop("ref_model")} if "ref_model" in changes else {}
    return light_trainer(trl.DPOTrainer)(
        model=base,
        args=trl.DPOConfig(str(folder), **{**ARGUMENTS, **changes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0),
        light=LIGHT,
        **reference,
    )


def test_dpo_with_the_dense_model_as_reference(base: PreTrainedModel, tmp_path: Path) -> None:
    """The reference is asked once, before training: the loss begins at the log of 2, and the cut changes nothing."""
    dense = logits(base)
    trainer = dpo(base, tmp_path / "out")
    assert trainer.args.precompute_ref_log_probs
    asked = trainer.train_dataset["ref_chosen_logps"][:]
    check(trainer)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert mean(losses(trainer, "rewards/margins")[-4:]) > 0.1
    assert trainer.train_dataset["ref_chosen_logps"][:] == asked
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert logits(fresh).equal(dense)


PROMPTS = [{"prompt": f"{prompt} "} for prompt, *_ in rows_of()]
PAIRS = [{"prompt": f"{prompt} ", "chosen": good, "rejected": bad} for prompt, good, bad in rows_of()]


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


TRAINERS: dict[str, tuple[str, str, list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "sft": ("SFTTrainer", "SFTConfig", [{"text": f"{row['prompt']}{row['chosen']}"} for row in PAIRS], {}, {}),
    "dpo": ("DPOTrainer", "DPOConfig", PAIRS, {}, {}),
    "grpo": (
        "GRPOTrainer", "GRPOConfig", PROMPTS, {"num_generations": 2, "max_completion_length": 4, "max_steps": 12},
        {"reward_funcs": lengths},
    ),
    "reward": ("RewardTrainer", "RewardConfig", PAIRS, {}, {}),
}  # fmt: skip
"""Of TRL, by class: configuration, rows, settings and arguments."""


def of_trl(kind: str, model: Any, folder: Path, light: Any = LIGHT, **changes: Any) -> Any:
    trainer_name, config_name, rows, settings, options = TRAINERS[kind]
    options = {**options, **{name: changes.pop(name) for name in ("peft_config",) if name in changes}}
    options.setdefault("peft_config", LoraConfig(task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM", r=4))
    arguments = {**ARGUMENTS, **settings, **changes}
    return light_trainer(getattr(trl, trainer_name))(
        model=model,
        args=getattr(trl, config_name)(str(folder), **arguments),
        train_dataset=Dataset.from_list(rows),
        light=light,
        **options,
    )


@pytest.fixture
def named(base: PreTrainedModel, tmp_path: Path) -> str:
    """A folder with a model and its tokenizer, by which a trainer loads both."""
    folder = tmp_path / "base"
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


def trained_sites(trainer: Any) -> set[tuple[str, int]]:
    model = trainer.model
    return {(name.replace(".ref.", "."), p.numel()) for name, p in model.named_parameters() if p.requires_grad}


@telling("kind", TRAINERS, ["dpo", "grpo", "reward"])
def test_a_model_given_by_name_is_the_loaded_one(kind: str, named: str, tmp_path: Path) -> None:
    """Its modules sit where those of a loaded one do, in the blocks in which they may; then it trains and is cut."""
    light = but(LIGHT, module_blocks=2 / 3)
    config = LoraConfig(task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM", r=4)
    before = copy.deepcopy(config.to_dict())
    trainer = of_trl(kind, named, tmp_path / "out", light, peft_config=config)
    assert config.to_dict() == before
    found = {name.split(".layers.")[1] for name, _ in trained_sites(trainer) if ".layers." in name}
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    projections += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    parts = itertools.product((1, 2), projections, "AB")
    assert found == {f"{block}.{place}.lora_{part}.default.weight" for block, place, part in parts}
    loads = LlamaForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    loaded = loads.from_pretrained(named, **({"num_labels": 1} if kind == "reward" else {}))
    assert trained_sites(trainer) == trained_sites(of_trl(kind, loaded, tmp_path / "out", light))
    trainer.train()
    assert trainer.light_plan.removed_parameters > 0 and isinstance(trainer.model, LightModel)
    trainer.save_model(str(tmp_path / "light"))
    if kind != "reward":
        assert logits(load_light(tmp_path / "light", base=named)).equal(logits(trainer.model))


def test_a_name_is_loaded_as_its_trainer_does(named: str, tmp_path: Path) -> None:
    """By what `model_init_kwargs` say, from the seed of the arguments, and with settings that need the model itself."""
    trainer = of_trl("sft", named, tmp_path / "out", model_init_kwargs={"dtype": "bfloat16"})
    weights = dict(trainer.model.named_parameters())
    assert {p.dtype for name, p in weights.items() if "lora" not in name} == {torch.bfloat16}
    again = of_trl("sft", named, tmp_path / "out")
    torch.manual_seed(5)
    other = of_trl("sft", named, tmp_path / "out")
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    for (name, one), (_, two) in zip(again.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert one.equal(two), name
    assert of_trl("sft", named, tmp_path / "out", but(LIGHT, depth="auto")).light_config.remove.depth == 0
    assert of_trl("sft", named, tmp_path / "out", None).light_config == preset("accurate", writes=True)


def test_a_name_that_nobody_loads(named: str, base: PreTrainedModel, tmp_path: Path) -> None:
    settings = {name: value for name, value in ARGUMENTS.items() if name != "bf16"}
    args = TrainingArguments(str(tmp_path / "out"), **settings)
    lora = LoraConfig(task_type="CAUSAL_LM")
    said = refusal(lambda: LightTrainer(named, args, train_dataset=Dataset.from_list(PAIRS), peft_config=lora))
    assert "LightTrainer does not load a model by name; load" in said
    nowhere = LoraConfig(task_type="CAUSAL_LM", target_modules=["nowhere"])
    said = refusal(lambda: of_trl("sft", named, tmp_path / "out", peft_config=nowhere))
    assert "PEFT cannot put its modules on the model" in said


def test_dpo_with_positional_arguments(base: PreTrainedModel, tmp_path: Path) -> None:
    """They are the ones they would be by name: the reference is asked before training here, too."""
    by_name = dpo(base, tmp_path / "out")
    positional = light_trainer(trl.DPOTrainer)(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        None,
        trl.DPOConfig(str(tmp_path / "out"), **ARGUMENTS),
        train_dataset=by_name.train_dataset.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0),
        light=LIGHT,
    )
    assert positional.args.precompute_ref_log_probs
    assert positional.train_dataset["ref_chosen_logps"][:] == by_name.train_dataset["ref_chosen_logps"][:]


def test_dpo_with_a_reference_of_its_own(base: PreTrainedModel, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(reference)
    trainer = dpo(base, tmp_path / "out", ref_model=reference)
    assert not trainer.args.precompute_ref_log_probs
    check(trainer)
    assert logits(reference).equal(before)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)


# -- transformers --------------------------------------------------------------------------------------------------


def test_seq2seq_on_t5(tmp_path: Path) -> None:
    set_seed(0)
    model, words = make("t5"), tokenizer()
    rows = [{**words(prompt), "labels": words(good)["input_ids"]} for prompt, good, _ in rows_of()]
    settings = {name: value for name, value in ARGUMENTS.items() if name != "bf16"}
    trainer = light_trainer(Seq2SeqTrainer)(
        model=model,
        args=Seq2SeqTrainingArguments(
            str(tmp_path / "out"), **settings, eval_strategy="steps", eval_steps=10, predict_with_generate=True
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        data_collator=DataCollatorForSeq2Seq(words, model),
        processing_class=words,
        peft_config=LoraConfig(task_type="SEQ_2_SEQ_LM", r=4),
        light=LIGHT,
    )
    check(trainer)
    generated = trainer.predict(trainer.eval_dataset, max_new_tokens=4).predictions
    assert generated.shape[0] == 8


def test_image_classification(tmp_path: Path) -> None:
    set_seed(0)
    model = make("vit", num_labels=2)
    size, channels = model.config.image_size, model.config.num_channels
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"pixel_values": torch.randn(channels, size, size, generator=generator) + 2 * (i % 2), "labels": i % 2}
        for i in range(48)
    ]
    settings = {name: value for name, value in ARGUMENTS.items() if name != "bf16"}
    trainer = LightTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path / "out"), **settings),
        train_dataset=rows,
        peft_config=LoraConfig(r=4, modules_to_save=["classifier"]),
        light=LIGHT,
    )
    check(trainer)
    trainer.save_model(str(tmp_path / "light"))
    assert isinstance(trainer.model, LightModel)


class Weighted(Trainer):
    """A trainer of somebody's own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        outputs = model(**inputs)
        loss: Tensor = 2 * outputs.loss
        return (loss, outputs) if return_outputs else loss


def test_a_trainer_of_ones_own(base: PreTrainedModel, tmp_path: Path) -> None:
    words = tokenizer()
    rows = [
        {**words(f"{prompt} {good}"), "labels": words(f"{prompt} {good}")["input_ids"]} for prompt, good, _ in rows_of()
    ]
    settings = {name: value for name, value in ARGUMENTS.items() if name != "bf16"}
    light_class = light_trainer(Weighted)
    assert light_class is light_trainer(Weighted) and issubclass(light_class, Weighted)
    trainer = light_class(
        model=base,
        args=TrainingArguments(str(tmp_path / "out"), **settings),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(words),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4),
        light=LIGHT,
    )
    check(trainer)


# -- sentence-transformers -----------------------------------------------------------------------------------------


@pytest.fixture
def embedder(tmp_path: Path) -> Any:
    st = pytest.importorskip("sentence_transformers")
    set_seed(0)
    make("bert").base_model.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    modules = pytest.importorskip("sentence_transformers.models")
    transformer = modules.Transformer(str(tmp_path / "bert"), max_seq_length=16)
    dense = modules.Dense(32, 16)  # trains beside the PeftModel
    return st.SentenceTransformer(modules=[transformer, modules.Pooling(32), dense], device="cpu")


def contrastive(embedder: Any, folder: Path, **changes: Any) -> Any:
    st = pytest.importorskip("sentence_transformers")
    losses_of = pytest.importorskip("sentence_transformers.losses")
    rows = [{"anchor": " ".join(WORDS[i : i + 3]), "positive": " ".join(WORDS[i + 1 : i + 4])} for i in range(28)]
    settings = {name: value for name, value in ARGUMENTS.items() if name != "bf16"}
    return light_trainer(st.SentenceTransformerTrainer)(
        model=embedder,
        args=st.SentenceTransformerTrainingArguments(str(folder), **{**settings, **changes}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:12]),
        loss=losses_of.MultipleNegativesRankingLoss(embedder),
        peft_config=LoraConfig(task_type="FEATURE_EXTRACTION", r=4, lora_dropout=0.0),
        light=LIGHT,
    )


def test_sentence_transformers(embedder: Any, tmp_path: Path) -> None:
    trainer = contrastive(embedder, tmp_path / "out", save_strategy="steps", save_steps=4)
    check(trainer)
    sentences = ["w1 w2 w3", "w9 w4"]
    found = embedder.encode(sentences)
    assert found.shape == (2, 16)
    embedder.save_pretrained(str(tmp_path / "saved"))
    light = load_light(next((tmp_path / "saved").rglob("lightpeft.json")).parent)
    name = next(name for name, module in embedder.named_modules() if isinstance(module, LightModel))
    parent, _, attribute = name.rpartition(".")
    setattr(embedder.get_submodule(parent), attribute, light)
    assert torch.tensor(embedder.encode(sentences)).allclose(torch.tensor(found), atol=1e-6)


def test_a_reference_that_would_be_cut_is_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt, *_ in rows_of()]

    def make_trainer() -> Any:
        return light_trainer(trl.GRPOTrainer)(
            model=base,
            reward_funcs=lambda completions, **_: [0.0 for _ in completions],
            args=trl.GRPOConfig(str(tmp_path / "out"), **ARGUMENTS, beta=0.1, num_generations=2),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4),
            light=LIGHT,
        )

    assert "would use the cut model as its reference model" in refusal(make_trainer)


@telling("kind", ["ia3", "bottleneck", "dora"], {"bottleneck"})
def test_other_kinds_of_peft(base: PreTrainedModel, tmp_path: Path, kind: str) -> None:
    """Placed by the recipe, in the upper blocks alone."""
    configs: dict[str, Any] = {
        "ia3": IA3Config(task_type="CAUSAL_LM"),
        "bottleneck": BottleneckConfig(placement="houlsby", size=8, task_type="CAUSAL_LM"),
        "dora": LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True),
    }
    words = tokenizer()
    texts = [words(f"{prompt} {good}") for prompt, good, _ in rows_of()]
    settings = {name: value for name, value in ARGUMENTS.items() if name != "bf16"}
    trainer = LightTrainer(
        model=base,
        args=TrainingArguments(str(tmp_path / "out"), **settings),
        train_dataset=Dataset.from_list([{**text, "labels": text["input_ids"]} for text in texts]),
        data_collator=DataCollatorForSeq2Seq(words),
        peft_config=configs[kind],
        light=but(LIGHT, module_blocks=2 / 3),
    )
    check(trainer, better=False)
    assert {site.block for site in trainer.light_record.sites} == {1, 2}
