"""Answering by likelihood and by a multiple-choice head: scores against sequences computed one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from layouts import cut_to, evaluate
from tiny import refusal
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.tasks.kinds.classification import ClassificationByLikelihood
from lightpeft.app.tasks.kinds.likelihood import ACCURACIES, LikelihoodTask, encode_pairs
from lightpeft.app.tasks.kinds.multiple_choice import MultipleChoiceByLikelihood, MultipleChoiceTask
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.models.batches import IGNORED
from lightpeft.prune.importance import RealTokens
from lightpeft.training.prefix import FrozenPrefix, PrefixCache, cache_prefix

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(12)), "Answer", "Question", ":", "yes", "no", "é"]
SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0}
QUESTIONS = Dataset.from_dict(
    {
        "context": ["w0 w1 w2", "w3", "w4 w5", "w6 w7 w8 w9"],
        "options": [["w1", "w2 w3 w4", "w5 w6"], ["w1 w1", "w7"], ["w9 w8 w7 é", "w0"], ["w2", "w3", "w4", "w1 w2"]],
        "answer": [1, 0, 1, 3],
    }
)
TEXTS = Dataset.from_dict({"text": ["w0 w1", "w2", "w5 w6 w7"], "label": ["bad", "good", "good"]})


def word_tokenizer(side: str = "right", start: bool = True, end: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if start or end:
        single = f"{'<s> ' if start else ''}$A{' </s>' if end else ''}"
        special = [("<s>", 1), ("</s>", 2)]
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair="<s> $A </s> $B", special_tokens=special
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if start else None,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side=side,
    )


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)).eval()


@pytest.fixture(scope="module")
def decoders(llama: LlamaForCausalLM) -> dict[str, nn.Module]:
    """Models with relative and with absolute positions."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.5}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2, **sizes)).eval()
    return {"llama": llama, "gpt2": gpt2}


def questions(rows: Dataset = QUESTIONS, prompt: str | None = None, **settings: Any) -> LikelihoodTask:
    entry = TaskEntry(kind="multiple-choice", prompt=prompt)
    return MultipleChoiceByLikelihood(DataConfig(task="multiple-choice", **settings), rows, rows, [], entry)


def log_p(model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> list[float]:
    """Log-probability of every token of the completion, computed alone."""
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {completion}")["input_ids"]
    with torch.no_grad():
        of_tokens = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [of_tokens[place - 1, ids[place]].item() for place in range(start, len(ids))]


class TestScores:
    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_every_rule_equals_scoring_one_by_one(
        self, decoders: dict[str, nn.Module], family: str, side: str, batch_size: int
    ) -> None:
        model, tokenizer = decoders[family], word_tokenizer(side)
        expected: dict[str, list[int]] = {rule: [] for rule in ACCURACIES}
        right = []
        for context, options, index in zip(*(QUESTIONS[name] for name in QUESTIONS.column_names), strict=True):
            asked = [log_p(model, tokenizer, f"Question: {context}\nAnswer:", option) for option in options]
            scores = {
                "sum": [sum(of_option) for of_option in asked],
                "byte": [sum(a) / len(option.encode()) for a, option in zip(asked, options, strict=True)],
            }
            for rule, of_options in scores.items():
                expected[rule].append(int(np.argmax(of_options)))
            right.append(asked[index])
        assert len({tuple(picks) for picks in expected.values()}) > 1  # the rules do not all agree
        for rule, picks in expected.items():
            task = questions(likelihood=rule)
            encoded = cut_to(task, 32).encode_test(task.test, tokenizer)
            collator = task.collator(tokenizer)
            given = task.answer(BatchedModel(model, collator, batch_size), encoded).answers
            assert (list(given.predictions), list(given.references)) == (picks, QUESTIONS["answer"][:])
        metrics = evaluate(model, encoded, task, collator, batch_size)
        for rule, name in ACCURACIES.items():
            hits = [pick == index for pick, index in zip(expected[rule], QUESTIONS["answer"], strict=True)]
            assert metrics[name] == pytest.approx(np.mean(hits))
        tokens = [p for of_option in right for p in of_option]
        assert metrics["loss"] == pytest.approx(-sum(tokens) / len(tokens), rel=1e-4)
        assert metrics["examples"] == len(QUESTIONS)
        assert (next(iter(metrics)), task.main_metric) == ("accuracy_norm", "accuracy_norm")

    def test_label_words_and_probabilities(self, llama: LlamaForCausalLM) -> None:
        entry = TaskEntry(labels=["bad", "good"], words=["no", "yes"], prompt="{text}\nAnswer:", metrics=["f1"])
        task = ClassificationByLikelihood(DataConfig(), TEXTS, TEXTS, ["bad", "good"], entry)
        tokenizer = word_tokenizer()
        encoded = cut_to(task, 32).encode_test(task.test, tokenizer)
        given = task.answer(BatchedModel(llama, task.collator(tokenizer), 4), encoded).answers
        scores = [[sum(log_p(llama, tokenizer, f"{t}\nAnswer:", w)) for w in ("no", "yes")] for t in TEXTS["text"]]
        expected = torch.tensor(scores).softmax(-1).numpy()
        np.testing.assert_allclose(given.probabilities, expected, rtol=1e-4)
        assert given.probabilities is not None and given.probabilities.dtype == np.float32
        assert list(given.predictions) == expected.argmax(-1).tolist()
        assert list(given.references) == [0, 1, 1]
        metrics = evaluate(llama, encoded, task, task.collator(tokenizer), 4)
        assert set(metrics) == {"f1", *ACCURACIES.values(), "loss", "examples"}

    def test_a_prompt_with_a_column_that_the_rows_lack(self) -> None:
        entry = TaskEntry(labels=["bad", "good"], words=["no", "yes"], prompt="{text} {text_pair}")
        task = ClassificationByLikelihood(DataConfig(), TEXTS, TEXTS, ["bad", "good"], entry)
        line = refusal(lambda: task.encode_test(task.test, word_tokenizer()))
        assert "names the column 'text_pair', which the rows do not have" in line

    def test_what_follows_the_option_is_scored_where_there_is_an_ending(self, llama: LlamaForCausalLM) -> None:
        rows = Dataset.from_dict(
            {"context": ["w0 w1"], "options": [["w2", "w3 w4"]], "ending": ["w5 w6"], "answer": [1]}
        )
        task, tokenizer = questions(rows, prompt="{context}"), word_tokenizer()
        encoded = cut_to(task, 32).encode_test(rows, tokenizer)
        scores = [sum(log_p(llama, tokenizer, f"w0 w1 {option}", "w5 w6")) for option in ("w2", "w3 w4")]
        given = task.answer(BatchedModel(llama, task.collator(tokenizer), 4), encoded).answers
        assert list(given.predictions) == [int(np.argmax(scores))]
        assert encoded["bytes"][:] == [[5, 5]]

    def test_several_right_options_go_by_their_names(self, llama: LlamaForCausalLM) -> None:
        rows = Dataset.from_dict(
            {
                "context": ["w0", "w1"],
                "options": [["w2", "w3"], ["w4", "w5"]],
                "names": [["Ann", "Bob"], ["Ann", "Cid"]],
                "right": [["Ann", "Bob"], ["Eve"]],
                "answer": [0, 0],
            }
        )
        task, tokenizer = questions(rows), word_tokenizer()
        encoded = cut_to(task, 32).encode_test(rows, tokenizer)
        result = task.answer(BatchedModel(llama, task.collator(tokenizer), 4), encoded)
        assert set(result.answers.predictions) <= {"Ann", "Bob", "Cid"}
        assert list(result.answers.references) == [["Ann", "Bob"], ["Eve"]]
        metrics = evaluate(llama, encoded, task, task.collator(tokenizer), 4)
        assert metrics["accuracy"] == 0.5  # any of Ann and Bob will do; nobody says Eve


class TestEncoding:
    def test_training_rows_are_the_prompt_and_the_right_option(self) -> None:
        task, tokenizer = questions(), word_tokenizer()
        encoded = cut_to(task, 32).encode(task.train, tokenizer)
        texts = ["Question : w0 w1 w2 Answer :", "Question : w3 Answer :"]
        for row, prompt, option in zip(encoded, texts, ["w2 w3 w4", "w1 w1"], strict=False):
            ids = tokenizer.convert_tokens_to_ids(["<s>", *prompt.split(), *option.split()])
            learned = len(option.split())
            assert row["input_ids"] == ids
            assert row["labels"] == [IGNORED] * (len(ids) - learned) + ids[-learned:]
        assert encoded["length"][:] == [len(ids) for ids in encoded["input_ids"]]

    def test_what_is_trained_is_what_is_scored(self) -> None:
        task, tokenizer = questions(), word_tokenizer(end=True)  # an end token at every text's end is not scored
        train = cut_to(task, 9).encode(task.train, tokenizer)
        test = cut_to(task, 9).encode_test(task.train, tokenizer)
        for learned, asked, index in zip(train, test, QUESTIONS["answer"], strict=True):
            assert learned["input_ids"] == asked["input_ids"][index]
            assert learned["labels"].count(IGNORED) == asked["start"][index]
            assert len(learned["input_ids"]) <= 9 and learned["input_ids"][0] == 1  # cut behind the start token
            assert 2 not in learned["input_ids"]

    def test_tokens_are_those_of_running_text(self) -> None:
        """A tokenizer that puts a mark before every text must not put one before the option."""
        backend = Tokenizer(models.WordLevel({"<unk>": 0, "▁a": 1, "▁b": 2, "▁": 3, "</s>": 4}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
        assert encode_pairs(["a"], [" b"], tokenizer, 8) == [([1], [2])]


class TestMultipleChoiceHead:
    @pytest.fixture(scope="class")
    def bert(self) -> BertForMultipleChoice:
        torch.manual_seed(0)
        return BertForMultipleChoice(BertConfig(**SIZES)).eval()

    def task(self) -> MultipleChoiceTask:
        entry = TaskEntry(kind="multiple-choice")
        return MultipleChoiceTask(DataConfig(task="multiple-choice"), QUESTIONS, QUESTIONS, [], entry)

    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_equals_scoring_one_by_one(self, bert: BertForMultipleChoice, batch_size: int) -> None:
        task, tokenizer = self.task(), word_tokenizer()
        encoded = cut_to(task, 32).encode_test(task.test, tokenizer)
        metrics = evaluate(bert, encoded, task, task.collator(tokenizer), batch_size)
        losses, hits = [], []
        for context, options, index in zip(*(QUESTIONS[name] for name in QUESTIONS.column_names), strict=True):
            inputs = [tokenizer(context, option) for option in options]
            with torch.no_grad():
                alone = [bert(**{name: torch.tensor([[ids]]) for name, ids in of.items()}).logits[0] for of in inputs]
            logits = torch.cat(alone)
            losses.append(-logits.log_softmax(-1)[index].item())
            hits.append(logits.argmax().item() == index)
        assert metrics == pytest.approx({"accuracy": np.mean(hits), "loss": np.mean(losses), "examples": 4.0}, rel=1e-4)

    def test_batches(self) -> None:
        task, tokenizer = self.task(), word_tokenizer()
        encoded = cut_to(task, 32).encode(task.train, tokenizer)
        batch = task.collator(tokenizer)(encoded.to_list())
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 4, 8)
        assert batch["labels"].tolist() == QUESTIONS["answer"][:]
        assert batch["attention_mask"][1].sum(-1).tolist() == [5, 4, 1, 1]  # two empty options: a start token each
        assert encoded["length"][0] == 3 * 8 and encoded["length"][1] == 2 * 5

    def test_there_is_no_prefix_cache(self, bert: BertForMultipleChoice, tmp_path: Path) -> None:
        task, tokenizer, said = self.task(), word_tokenizer(), []
        rows = cut_to(task, 32).encode(task.train, tokenizer)
        for name, parameter in bert.named_parameters():
            parameter.requires_grad_("layer.1" in name)
        with FrozenPrefix(bert).attached() as prefix:
            assert prefix.blocks
            options: dict[str, Any] = {"batch_size": 2, "announce": said.append}
            assert cache_prefix(prefix, rows, task.collator(tokenizer), PrefixCache(), tmp_path, **options) is None
        assert said == ["no prefix cache: it holds one sequence per row, and multiple choice has one per option"]

    def test_real_tokens_of_options(self, bert: BertForMultipleChoice) -> None:
        task, tokenizer = self.task(), word_tokenizer()
        batch = task.collator(tokenizer)(cut_to(task, 32).encode(task.train, tokenizer).to_list())
        seen = []
        real = RealTokens(bert)
        bert.bert.encoder.layer[0].register_forward_hook(
            lambda module, args, output: seen.append((args[0].shape, real._masks[False])), always_call=True
        )
        with torch.no_grad():
            bert(**batch)
        real.remove()
        ((shape, mask),) = seen
        assert mask is not None and mask.shape == shape[:2]
        assert torch.equal(mask, batch["attention_mask"].flatten(0, 1))
