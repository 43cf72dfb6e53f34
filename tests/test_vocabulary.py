"""Fewer tokens: what stays is as it was, every text can still be tokenized, and runs carry it to the end."""

from __future__ import annotations

import copy
import json
import random
import string
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from adapters import light_over
from hypothesis import given
from hypothesis import strategies as st
from lanes import telling
from lights import light_of
from pieces import tokenizer_of_pieces
from safetensors.torch import load_file, save_file
from tiny import ALL, maker, refusal, relative_difference, with_lora
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from workbench import (
    Workbench,
    edit,
    lightpeft,
    read,
    save_base,
    tokenizer_of_bytes,
    write_rows,
)

from lightpeft import (
    LightTrainer,
    cut_vocabulary,
    full_width,
    light_tokenizer,
    load_light,
    load_merged,
    save_merged,
)
from lightpeft.app.evaluation.reports import evaluate_model
from lightpeft.app.folders.opening import find_model
from lightpeft.app.runs import pipeline
from lightpeft.files import file_checksum
from lightpeft.models.vocabulary.closure import kept_tokens
from lightpeft.models.vocabulary.cutting import cut_model, cut_parameters, vocabulary_of
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.models.vocabulary.tokenizer import cut_tokenizer
from lightpeft.profiling.sizes import count_parameters
from lightpeft.prune.light_model import LightModel
from lightpeft.saving.adapter_files import DESCRIPTION
from lightpeft.saving.kept_weights import KEPT_WEIGHTS
from lightpeft.saving.tokens import VOCABULARY_FILE

WORDS = [
    "good",
    "better",
    "bad",
    "worse",
    "movie",
    "movies",
    "actor",
    "acting",
    "plot",
    "story",
    "naïve",
    "écran",
    "Größe",
]
CORPUS = [
    " ".join(random.Random(number).choices(WORDS, k=9)) + random.Random(number).choice(".!?") for number in range(60)
]
CORPUS += [string.printable, "东京 and 大阪"]
FEW = ["good movies, better acting.", "bad plot! worse story?"]
"""The texts of a task: they need some of what the tokenizers below have learned."""
PAD = "[PAD]"
ROWS_TO_SPARE = 7
"""A model may have more rows than its tokenizer has tokens."""


# -- tokenizers, each of a kind of its own -----------------------------------------------------------------------------


def _wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = {"pad_token": PAD, "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    letters = [c for c in string.printable if not c.isspace()]
    tokenizer.train_from_iterator(
        [*CORPUS, *(f"{a}{b}" for a in letters for b in letters)],
        trainers.WordPieceTrainer(vocab_size=420, special_tokens=list(names.values())),
    )
    around = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", around)
    return _wrapped(tokenizer, **names)


def of_bytes() -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama 3's."""
    return tokenizer_of_bytes(texts=CORPUS * 2)


def ending(roberta: bool = False) -> PreTrainedTokenizerFast:
    """Bytes with special tokens behind all others, as GPT-2's, so that their ids change."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS * 2, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer.add_special_tokens([*names.values()])
    if roberta:
        sides = [(name, tokenizer.token_to_id(name)) for name in ("</s>", "<s>")]
        tokenizer.post_processor = processors.RobertaProcessing(*sides)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<pad>"), pad_token="<pad>")
    return _wrapped(tokenizer, **names)


def roberta() -> PreTrainedTokenizerFast:
    """As RoBERTa's: bytes, and a processor of its own around texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learning = trainers.BpeTrainer(vocab_size=340, special_tokens=list(names.values()), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS * 2, learning)
    tokenizer.add_special_tokens(["<mask>"])  # behind all others, as in RoBERTa
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return _wrapped(tokenizer, **names, cls_token="<s>", sep_token="</s>", mask_token="<mask>")


def unigram(around: bool = True) -> PreTrainedTokenizerFast:
    """As XLM-R's or, with an end token alone, T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special = [*names.values(), "<mask>"]
    learning = trainers.UnigramTrainer(vocab_size=220, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS * 3, learning)
    template = "<s> $A </s>" if around else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(template, None, [("<s>", 0), ("</s>", 2)])
    return _wrapped(tokenizer, **names)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "wordpiece": wordpiece,
    "bytes": of_bytes,
    "ending": ending,
    "ending-around": lambda: ending(roberta=True),
    "roberta": roberta,
    "pieces": tokenizer_of_pieces,
    "unigram": unigram,
    "t5": lambda: unigram(around=False),
}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[name]()


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts)["input_ids"]
    return found


@cache
def smaller(name: str) -> tuple[PreTrainedTokenizerBase, Vocabulary]:
    """A tokenizer with the tokens of `FEW`, and which these are."""
    whole = tokenizer_of(name)
    needed = {token for ids in ids_of(whole, FEW) for token in ids}
    vocabulary = Vocabulary(kept_tokens(whole, needed), len(whole) + ROWS_TO_SPARE)
    return cut_tokenizer(whole, vocabulary), vocabulary


# -- which tokens stay -------------------------------------------------------------------------------------------------


@every_tokenizer
def test_fewer_tokens_and_the_same_ids_for_what_needs_them(name: str) -> None:
    whole, (small, vocabulary) = tokenizer_of(name), smaller(name)
    assert len(small) == len(vocabulary) < len(whole)
    assert (small.pad_token_id != whole.pad_token_id) == name.startswith("ending"), "ids change where they can"
    assert [small.convert_ids_to_tokens(new) for new in range(len(small))] == whole.convert_ids_to_tokens(
        list(vocabulary.kept)
    )
    for before, after in zip(ids_of(whole, FEW), ids_of(small, FEW), strict=True):
        assert [vocabulary.kept[token] for token in after] == before
    pair = whole(*FEW), small(*FEW)
    assert [vocabulary.kept[token] for token in pair[1]["input_ids"]] == pair[0]["input_ids"]
    assert pair[0].get("token_type_ids") == pair[1].get("token_type_ids")
    assert small.special_tokens_map == whole.special_tokens_map
    assert len({len(ids) for ids in small(FEW, padding=True)["input_ids"]}) == 1
    padding = cut_tokenizer(TOKENIZERS[name](), vocabulary).backend_tokenizer.padding
    assert padding is None or padding["pad_id"] == small.pad_token_id


@every_tokenizer
@given(text=st.text(max_size=40))
def test_any_text_is_tokenized_without_an_unknown_where_there_was_none(name: str, text: str) -> None:
    whole, (small, _) = tokenizer_of(name), smaller(name)
    ids = ids_of(small, [text])[0]
    assert all(0 <= token < len(small) for token in ids)
    (unknown,) = {small.unk_token_id}
    assert unknown not in ids or whole.unk_token_id in ids_of(whole, [text])[0]


@every_tokenizer
@given(data=st.data())
def test_a_text_whose_tokens_stay_is_tokenized_as_before(name: str, data: st.DataObject) -> None:
    """Texts put together from tokens that stay: some of them take tokens that do not, the others must be equal."""
    whole, (small, vocabulary) = tokenizer_of(name), smaller(name)
    pieces = [whole.convert_ids_to_tokens(token).removeprefix("##") for token in vocabulary.kept]
    words = st.lists(st.sampled_from(pieces), max_size=4).map("".join)
    text = " ".join(data.draw(st.lists(words, max_size=5))).replace("Ġ", " ").replace("▁", " ")
    before, after = ids_of(whole, [text])[0], ids_of(small, [text])[0]
    if set(before) <= set(vocabulary.kept):
        assert [vocabulary.kept[token] for token in after] == before
    else:
        # of merges another one may come to as many pieces; the best path of the others need not be the shortest
        assert len(after) >= len(before) or name in ("unigram", "t5")


def test_merges_lead_to_every_token_that_stays() -> None:
    """Each of them is what its own characters are merged to, as with all merges."""
    for name in ("bytes", "ending", "roberta", "pieces"):
        whole, small = tokenizer_of(name), smaller(name)[0]
        whole_model_form, of_small = (json.loads(each.backend_tokenizer.to_str())["model"] for each in (whole, small))
        assert {left + right for left, right in of_small["merges"]} <= of_small["vocab"].keys()
        assert 0 < len(of_small["merges"]) < len(whole_model_form["merges"])
        for token in of_small["vocab"].keys() - {f"<0x{byte:02X}>" for byte in range(256)}:  # which are no texts
            parts = [tok.backend_tokenizer.model.tokenize(token) for tok in (whole, small)]
            assert [part.value for part in parts[0]] == [part.value for part in parts[1]], token


def test_every_bit_counts() -> None:
    for size in (1, 7, 8, 9, 300):
        draw = random.Random(size)
        for _ in range(20):
            vocabulary = Vocabulary(tuple(sorted(draw.sample(range(size), draw.randint(1, size)))), size)
            bits = vocabulary.to_bits()
            assert bits.dtype == torch.uint8 and len(bits) == (size + 7) // 8
            assert Vocabulary.from_bits(bits, size) == vocabulary
    assert "ascending ids below 3" in refusal(lambda: Vocabulary((0, 3), 3))
    assert "ascending ids" in refusal(lambda: Vocabulary((), 3))
    assert "does not fit 30 tokens" in refusal(lambda: Vocabulary.from_bits(torch.zeros(3).byte(), 30))
    assert "ascending ids" in refusal(lambda: Vocabulary.from_bits(torch.full((1,), 255).byte(), 7))


# -- what cannot be cut ------------------------------------------------------------------------------------------------


def test_words_without_parts_are_refused() -> None:
    words = _wrapped(Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1}, unk_token="[UNK]")), unk_token="[UNK]")
    reason = refusal(lambda: kept_tokens(words, [1]))
    assert "its kind is WordLevel, not one of BPE, WordPiece and Unigram" in reason
    assert "keep all its tokens" in reason


def test_another_size_and_another_cut_are_refused() -> None:
    model, (_, vocabulary) = family("bert"), smaller("wordpiece")
    assert "selected from 9,000".replace(",", "") in refusal(lambda: cut_model(model, Vocabulary((0, 1), 9000)))
    cut_model(model, vocabulary)
    before = model.get_input_embeddings().weight
    cut_model(model, vocabulary)
    assert model.get_input_embeddings().weight is before, "nothing is left to do"
    assert "cut to other tokens before" in refusal(lambda: cut_model(model, Vocabulary((0, 1), vocabulary.size)))


def test_positions_that_are_counted_from_a_token_that_moves_are_refused() -> None:
    model = family("roberta", pad_token_id=9)
    kept = tuple(number for number in range(model.config.vocab_size) if number != 4)
    reason = refusal(lambda: cut_model(model, Vocabulary(kept, model.config.vocab_size)))
    assert "position_embeddings counts positions from the padding token's id" in reason
    assert model.config.pad_token_id == 9 and len(model.get_input_embeddings().weight) == model.config.vocab_size


# -- the model ---------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, tuple[str, Any]] = {
    "bert": ("wordpiece", ALL["bert"]),
    "bert-masked": ("wordpiece", maker("BertConfig", "BertForMaskedLM", SIZES)),
    "roberta": ("roberta", ALL["roberta"]),
    "llama": ("bytes", ALL["llama-gqa"]),
    "llama-tied": ("ending", ALL["llama-tied"]),
    "llama-pieces": ("pieces", ALL["llama-gqa"]),
    "gpt2": ("ending", ALL["gpt2"]),
    "xlm-roberta": ("unigram", ALL["xlm-roberta"]),
    "t5": ("t5", ALL["t5"]),
    "bart": ("ending-around", ALL["bart"]),
}
"""Tokenizer of a family, and its models."""
every_family = telling("name", FAMILIES, {"bert", "roberta", "llama-tied", "llama-pieces", "xlm-roberta", "t5", "bart"})
"""Those of each kind of tokenizer in `make test`."""


def family(name: str, **changes: Any) -> PreTrainedModel:
    """A random model for a tokenizer, with more rows than there are tokens."""
    kind, make = FAMILIES[name]
    tokenizer = tokenizer_of(kind)
    ids = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("pad", "bos", "eos")}
    if name.startswith(("t5", "bart", "mbart")):
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    torch.manual_seed(0)
    model: PreTrainedModel = make(**{"vocab_size": len(tokenizer) + ROWS_TO_SPARE, **ids, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def outputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str] = FEW) -> Tensor:
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :5]
    return model(**batch).logits


@every_family
def test_what_stays_computes_what_it_did(name: str) -> None:
    whole, (small, vocabulary) = tokenizer_of(FAMILIES[name][0]), smaller(FAMILIES[name][0])
    dense = family(name)
    model = copy.deepcopy(dense)
    cut_model(model, vocabulary)
    before, after = outputs(dense, whole), outputs(model, small)
    if before.shape[-1] == dense.config.vocab_size:
        before = before[..., list(vocabulary.kept)]
    assert relative_difference(after, before) < 1e-6
    rows = dense.get_input_embeddings().weight[list(vocabulary.kept)]
    assert model.get_input_embeddings().weight.equal(rows), "bit-equal"
    assert model.config.vocab_size == len(vocabulary) == model.get_input_embeddings().num_embeddings
    tied = [each.get_output_embeddings() is not None and _tied(each) for each in (dense, model)]
    assert tied[0] == tied[1]
    assert not [module for module in model.modules() if getattr(module, "vocab_size", 0) == dense.config.vocab_size]
    ids = [(config.pad_token_id, config.eos_token_id) for config in (dense.config, model.config)]
    assert [None if id is None else vocabulary.kept[id] for id in ids[1]] == list(ids[0])
    lost = count_parameters(dense).base - count_parameters(model).base
    assert lost == cut_parameters(model) > 0 and vocabulary_of(model) == vocabulary


def _tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@every_family
def test_the_config_makes_the_same_model_again(name: str, tmp_path: Path) -> None:
    small, vocabulary = smaller(FAMILIES[name][0])
    model = family(name)
    cut_model(model, vocabulary)
    model.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(FEW)["input_ids"] == small(FEW)["input_ids"] and len(tokenizer) == len(small)
    assert outputs(again, tokenizer).equal(outputs(model, small))
    for key in ("pad", "bos", "eos"):
        named = getattr(again.config, f"{key}_token_id", None)
        assert named is None or named == getattr(small, f"{key}_token_id")


def test_labels_are_learned_with_fewer_tokens() -> None:
    """The loss counts on the number of tokens, which modules keep for themselves as well."""
    small, vocabulary = smaller("bytes")
    dense = family("llama")
    model = copy.deepcopy(dense)
    cut_model(model, vocabulary)
    batch = dict(small(FEW, padding=True, return_tensors="pt"))
    loss = model(**batch, labels=batch["input_ids"]).loss
    ids = torch.tensor(vocabulary.kept)[batch["input_ids"]]
    logits = dense(ids, attention_mask=batch["attention_mask"]).logits[:, :-1, list(vocabulary.kept)]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(loss, expected)


def test_generation_writes_and_ends_with_the_new_ids() -> None:
    small, vocabulary = smaller("bytes")
    dense, whole = family("llama"), tokenizer_of("bytes")
    dense.generation_config.eos_token_id = [whole.eos_token_id, whole.pad_token_id]
    dense.generation_config.suppress_tokens = [vocabulary.kept[20], dense.config.vocab_size - 1]
    model = copy.deepcopy(dense)
    cut_model(model, vocabulary)
    assert model.generation_config.eos_token_id == [small.eos_token_id, small.pad_token_id]
    assert model.generation_config.suppress_tokens == [20]
    written = model.generate(**small(FEW[:1], return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert written.max() < len(vocabulary)


# -- light models ------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base with its tokenizer, of the family that the test names (llama-tied if none)."""
    name = getattr(request, "param", "llama-tied")
    family(name).save_pretrained(tmp_path / "base")
    tokenizer_of(FAMILIES[name][0]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def light_over_fewer(folder: Path, name: str = "llama-tied") -> tuple[LightModel, PreTrainedTokenizerBase]:
    model = type(family(name)).from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    small = cut_vocabulary(model, tokenizer, ids_of(tokenizer, FEW))
    return light_over(model), small


@pytest.mark.parametrize(("base", "name"), [(n, n) for n in ("llama-tied", "llama", "bert", "t5")], indirect=["base"])
@pytest.mark.parametrize("low_memory", [False, True], ids=["whole", "low_memory"])
def test_a_light_adapter_brings_them_back(base: Path, name: str, low_memory: bool, tmp_path: Path) -> None:
    light, small = light_over_fewer(base, name)
    light.save_pretrained(tmp_path / "light")
    loaded = load_light(tmp_path / "light", low_memory=low_memory)
    tokenizer = light_tokenizer(tmp_path / "light")
    assert tokenizer(FEW)["input_ids"] == small(FEW)["input_ids"]
    assert outputs(loaded, tokenizer).equal(outputs(light, small))
    assert count_parameters(loaded).base == count_parameters(light).base
    assert loaded.config.vocab_size == len(small)
    embeddings = [key for key in load_file(tmp_path / "light" / "adapter_model.safetensors") if "embed" in key]
    assert not embeddings
    size = (tmp_path / "light" / VOCABULARY_FILE).stat().st_size
    assert size < 250 + light.light_plan.base_parameters / 8


def test_another_base_or_damage_is_refused(base: Path, tmp_path: Path) -> None:
    light, _ = light_over_fewer(base)
    folder = tmp_path / "light"
    light.save_pretrained(folder)
    other = family("llama-tied")
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    assert "another base" in refusal(lambda: load_light(folder, other))
    assert len(other.get_input_embeddings().weight) == other.config.vocab_size, "nothing was done to it"
    narrow = family("llama-tied", vocab_size=400)
    assert "has 400 tokens" in refusal(lambda: load_light(folder, narrow))
    narrow.save_pretrained(tmp_path / "narrow")
    assert "has 400 tokens" in refusal(lambda: load_light(folder, tmp_path / "narrow", low_memory=True))
    lost = family("llama-tied")
    cut_model(lost, Vocabulary(tuple(range(9)), lost.config.vocab_size))
    assert "was cut to other tokens" in refusal(lambda: load_light(folder, lost))

    def change(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / VOCABULARY_FILE)
        checksum = file_checksum(folder / VOCABULARY_FILE)
        edit(folder / DESCRIPTION, lambda content: content["checksums"].update({VOCABULARY_FILE: checksum}))

    good = load_file(folder / VOCABULARY_FILE)
    (folder / VOCABULARY_FILE).write_bytes(b"nothing")
    assert VOCABULARY_FILE in refusal(lambda: load_light(folder))
    for damaged in (
        {"kept": good["kept"]},
        {**good, "size": torch.tensor([10**12])},
        {**good, "size": torch.tensor([5, 6])},
        {**good, "size": torch.tensor(float("nan"))},
        {**good, "kept": good["kept"].float()},
        {**good, "kept": good["kept"] * 0},
    ):
        change(damaged)
        assert refusal(lambda: load_light(folder))
        assert refusal(lambda: light_tokenizer(folder))


@pytest.mark.parametrize("given", [True, False])
def test_merged_it_needs_no_base(given: bool, base: Path, tmp_path: Path) -> None:
    """The tokenizer of the tokens that are left need not be given."""
    light, small = light_over_fewer(base)
    save_merged(light, tmp_path / "merged", small if given else None)
    loaded = load_merged(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert relative_difference(outputs(loaded, tokenizer), outputs(light, small)) < 3e-5
    assert loaded.config.vocab_size == len(small) == len(loaded.get_input_embeddings().weight)


def test_at_full_width_it_is_over_the_base_with_all_tokens(base: Path, tmp_path: Path) -> None:
    light, _ = light_over_fewer(base)
    light.save_pretrained(tmp_path / "light")
    wide = full_width(light)
    assert wide.config.vocab_size == len(tokenizer_of("ending")) + ROWS_TO_SPARE
    assert (
        vocabulary_of(wide.get_base_model()) is None and wide.config.pad_token_id == tokenizer_of("ending").pad_token_id
    )
    assert not [key for key in wide.state_dict() if "embed" in key and "lora" in key]
    assert outputs(wide, tokenizer_of("ending")).shape[-1] == wide.config.vocab_size


# -- live models -------------------------------------------------------------------------------------------------------


def test_a_token_that_the_model_has_no_row_for(base: Path) -> None:
    model, tokenizer = type(family("llama-tied")).from_pretrained(base), AutoTokenizer.from_pretrained(base)
    while len(tokenizer) <= model.config.vocab_size:
        tokenizer.add_special_tokens({"additional_special_tokens": [f"<{len(tokenizer)}>"]}, False)
    line = refusal(lambda: cut_vocabulary(model, tokenizer, ids_of(tokenizer, FEW)))
    assert f"the model has rows for {model.config.vocab_size} tokens" in line and "resize_token_embeddings" in line


def test_a_live_model_is_cut_by_hand(base: Path, tmp_path: Path) -> None:
    model = type(family("llama-tied")).from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    small = cut_vocabulary(model, tokenizer, ids_of(tokenizer, FEW))
    rows = [{**dict(small(text)), "labels": small(text)["input_ids"]} for text in FEW * 8]
    args = hf.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=1, max_steps=8, save_steps=2, report_to="none"
    )
    light = light_of(vocabulary="task", length=4)
    trainer = LightTrainer(
        with_lora(model, trained=False), args, train_dataset=rows, processing_class=small, light=light
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    for saved in (tmp_path / "adapter", *(tmp_path / "out").glob("checkpoint-*")):
        assert not [key for key in load_file(saved / "adapter_model.safetensors") if "embed" in key], saved
    loaded = load_light(tmp_path / "adapter")
    assert outputs(loaded, light_tokenizer(tmp_path / "adapter")).equal(outputs(trainer.model.eval().cpu(), small))


# -- runs --------------------------------------------------------------------------------------------------------------


def _reviews(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    kinds = {"good": ["good", "better"], "bad": ["bad", "worse"]}
    names = [*kinds] * (count // 2)
    rest = ["movie", "movies", "plot", "story"]
    return [{"text": " ".join([draw.choice(kinds[n]), *draw.choices(rest, k=4)]), "label": n} for n in names]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A base whose tokenizer has parts of words, and test rows with a word that training rows have not."""
    bench = Workbench(tmp_path_factory.mktemp("vocabulary"))
    tokenizer = wordpiece()
    tokenizer.model_max_length = 40
    bench.base = save_base(bench.folder / "pieces", tokenizer=tokenizer)
    write_rows(bench.train, _reviews(64, 1))
    test = _reviews(40, 2)
    test[0]["text"] += " actor"
    write_rows(bench.test, test)
    return bench


def test_a_run_that_trains_all_weights(bench: Workbench) -> None:
    """Embeddings are neither trained nor saved; the folder gives the same answers again."""
    light = {"light.remove.vocabulary": "task", "light.train": "all"}
    result = pipeline.run(bench.config("all", **light))
    adapter = bench.folder / "all" / "adapter"
    assert not [key for key in load_file(adapter / KEPT_WEIGHTS) if "embed" in key]
    again = evaluate_model(adapter, {"data": {"test": str(bench.test), "max_length": 32}})["model"]
    assert again["metrics"]["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)


def test_a_whole_run(bench: Workbench) -> None:
    result = pipeline.run(bench.config("run", **{"light.remove.vocabulary": "task"}))
    folder = bench.folder / "run"
    said = result["vocabulary"]
    assert 0 < said["tokens"] < said["of"] == len(wordpiece())
    light = load_light(folder / "adapter")
    lost = said["removed_parameters"]
    assert lost == (said["of"] - said["tokens"]) * 32
    assert result["parameters"]["base_dense"] == light.light_plan.base_parameters + lost
    assert result["parameters"]["base"] == count_parameters(light).base
    notes = [json.loads(line).get("note", "") for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any("tokens are kept (light.remove.vocabulary: task)" in note for note in notes)
    for saved in folder.rglob("adapter_model.safetensors"):
        assert not [key for key in load_file(saved) if "embed" in key], saved


def test_training_is_that_of_a_run_with_all_tokens(bench: Workbench) -> None:
    """The rows to train on have the same tokens, and these the same embeddings: to the last bit."""
    pipeline.run(bench.config("run", **{"light.remove.vocabulary": "task"}))
    kept = pipeline.run(bench.config("kept"))
    of_task, of_all = (bench.folder / name / "adapter" for name in ("run", "kept"))
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (of_task, of_all)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])
    assert "vocabulary" not in kept
    plans = [read(bench.folder / name / "plan.json") for name in ("run", "kept")]
    assert plans[0]["blocks"] == plans[1]["blocks"] and plans[0]["fingerprint"] != plans[1]["fingerprint"]


def test_its_result_is_asked_with_its_own_tokenizer(
    bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = pipeline.run(bench.config("run", **{"light.remove.vocabulary": "task"}))
    for place in ("run", "run/adapter"):
        code = lightpeft(
            "evaluate", bench.folder / place, "--data.test", bench.test, "--json", tmp_path / "report.json"
        )
        assert code == 0
        report = read(tmp_path / "report.json")["model"]
        assert report["metrics"]["accuracy"] == result["metrics"]["accuracy"]
        assert report["metrics"]["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)
        assert report["parameters"]["base_dense"] == result["parameters"]["base_dense"]
    assert lightpeft("export", bench.folder / "run", tmp_path / "merged") == 0
    for place in (bench.folder / "run", tmp_path / "merged"):
        assert lightpeft("predict", place, bench.test, "--output", tmp_path / f"{place.name}.csv") == 0
    answers = [(tmp_path / f"{name}.csv").read_text().splitlines() for name in ("run", "merged")]
    assert len(answers[0]) == 41 and [a.split(",")[2] for a in answers[0]] == [a.split(",")[2] for a in answers[1]]
    found = find_model(bench.folder / "run")
    kept, size = result["vocabulary"]["tokens"], result["vocabulary"]["of"]
    assert len(found.tokenizer()) == kept == found.config.vocab_size
    capsys.readouterr()
    assert lightpeft("inspect", bench.folder / "run") == 0 and f"{kept} of {size}" in capsys.readouterr().out


# -- real ones ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["minilm", "smollm2"])
def real(request: pytest.FixtureRequest) -> Iterator[PreTrainedTokenizerBase]:
    yield AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def test_real_tokenizers(real: PreTrainedTokenizerBase) -> None:
    vocabulary = Vocabulary(kept_tokens(real, {token for ids in ids_of(real, FEW) for token in ids}), len(real))
    small = cut_tokenizer(real, vocabulary)
    assert len(small) < 0.1 * len(real)
    texts = [*FEW, "Größe, naïve café; 東京と大阪 🙂", "Why didn't she ask?\n\nShe'll tell.", "Ａ①ﬁ\u0301\u200b"]
    whole_ids, ids = ids_of(real, texts), ids_of(small, texts)
    assert [[vocabulary.kept[token] for token in each] for each in ids[:2]] == whole_ids[:2]
    for before, after in zip(whole_ids, ids, strict=True):
        assert len(after) >= len(before) and (small.unk_token_id in after) <= (real.unk_token_id in before)
        assert small.decode(after) == real.decode(before)
