"""GGUF files: llama.cpp computes what the light model computes; what it cannot hold is refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import gguf
import pytest
import torch
import workbench
from adapters import light_over
from lanes import telling
from llama_cpp import LlamaCpp
from pieces import TEXTS, tokenizer_of_pieces
from tiny import make, plan_for, refusal, relative_difference, with_lora
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast
from workbench import Workbench, lightpeft, save_base, tokenizer_of_bytes

from lightpeft import LightModel
from lightpeft.adapters.merging import merged_copy
from lightpeft.app.exports.exporting import EXPORTS
from lightpeft.app.exports.gguf import architectures
from lightpeft.app.exports.gguf.exporting import GgufFile, save_gguf
from lightpeft.app.exports.gguf.vocabulary import add_vocabulary, pre_tokenizer_name
from lightpeft.app.exports.gguf.writing import GgufType
from lightpeft.app.runs import pipeline
from lightpeft.models.all_weights import trained_weights
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan

CLOSE = 0.02
"""llama.cpp keeps keys and values in 16 bits."""
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bytewise(regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def split_by(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, bytewise(regex=False)])


SPLITS: dict[str, Callable[[], Any]] = {
    "gpt-2": bytewise,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytewise()]),
    "llama-bpe": lambda: split_by(WORDS.replace("DIGITS", "{1,3}")),
    "qwen2": lambda: split_by(WORDS.replace("DIGITS", "")),
}
"""Name of llama.cpp's pre-tokenizer -> how it is made."""


def tokenizer_of(split: Any, **options: Any) -> PreTrainedTokenizerFast:
    return tokenizer_of_bytes(split, TEXTS * 3, **options)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_of(SPLITS["smollm"](), chat_template="{{ messages[0].content }}")


EVEN = {"heads": 0.5, "neurons": 0.5, "scope": "layerwise"}
UNEVEN: dict[str, Any] = {"scope": "global"}


def light(name: str = "llama-gqa", budget: dict[str, Any] = UNEVEN, **changes: Any) -> LightModel:
    """A light model whose vocabulary has more rows than there are tokens."""
    return light_over(make(name, **{"vocab_size": 320, **changes}), **budget)


def light_by(plan: Callable[[PrunePlan], PrunePlan], name: str = "llama-gqa") -> LightModel:
    """A light model that is cut by a changed plan."""
    model = with_lora(make(name, vocab_size=320))
    changed = plan(plan_for(model))
    apply_plan(model, changed)
    return as_light(model.eval(), changed)


def without(block: int, **parts: tuple[int, ...]) -> Callable[[PrunePlan], PrunePlan]:
    """A plan whose block has no attention, or no FFN."""

    def change(plan: PrunePlan) -> PrunePlan:
        blocks = list(plan.blocks)
        blocks[block] = replace(blocks[block], **parts)
        gone = {n for s, n in plan.specs[block].projections.items() if s.startswith("ffn") == ("neurons" in parts)}
        sites = {name: ranks for name, ranks in plan.sites.items() if name not in gone}
        return replace(plan, blocks=tuple(blocks), sites=sites)

    return change


WITHOUT_ATTENTION = {"heads": (), "kv_heads": ()}


def fields(file: Path) -> dict[str, Any]:
    """What a file says of its model."""
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def difference(written: GgufFile, model: LightModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Of the logits behind a text, llama.cpp's from the model's own; texts are the same tokens there."""
    loaded = LlamaCpp(str(written.path))
    tokens = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [loaded.tokenize(text) for text in TEXTS] == tokens
    read = tokens[0][: architectures.context_length(model.config)]
    with torch.no_grad():
        own = merged_copy(model).eval()(input_ids=torch.tensor([read])).logits[0, -1].float()
    theirs = torch.tensor(loaded.logits(read))[: len(own)]
    loaded.close()
    return relative_difference(theirs - theirs.mean(), own - own.mean())  # what is added to all changes nothing


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [UNEVEN, EVEN], ids=["uneven", "even"])
@telling(
    "name",
    ["llama-mha", "llama-gqa", "llama-bias", "llama-head-dim", "llama-tied", "mistral", "qwen2", "qwen3"],
    {"llama-gqa", "qwen2", "qwen3"},
)
def test_llama_cpp_computes_the_same(
    name: str, budget: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = light(name, budget, **({"tie_word_embeddings": True} if name == "qwen3" else {}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    written = save_gguf(model, tmp_path / "out", tokenizer)
    assert difference(written, model, tokenizer) < CLOSE
    assert all(before[key].equal(value) for key, value in model.state_dict().items()), "the light model stays as it is"
    even, uneven = {"qwen2": ("deci", "deci"), "qwen3": ("qwen3", "openelm")}.get(name, ("llama", "deci"))
    assert fields(written.path)["general.architecture"] == (even if budget is EVEN else uneven)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "README.md"}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "llama-cli -m model.gguf" in card and "library_name: gguf" in card


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["linear", "llama3"],
)
def test_rotary_embeddings_that_reach_further(
    rope: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = light(rope_parameters={"rope_theta": 10000.0, **rope}, max_position_embeddings=128)
    assert difference(save_gguf(model, tmp_path, tokenizer), model, tokenizer) < CLOSE


def test_weights_that_trained(tokenizer: Any, tmp_path: Path) -> None:
    """Of a model whose weights all trained (`light.train: all`)."""
    model = light(budget={**UNEVEN, "train": "all"})
    with torch.no_grad():
        for parameter in trained_weights(model).values():
            parameter.mul_(1.01)
    assert difference(save_gguf(model, tmp_path, tokenizer), model, tokenizer) < CLOSE


def test_blocks_that_are_left_out_and_sublayers_that_are_gone(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shallow = light(budget={"depth": 0.3})
    written = save_gguf(shallow, tmp_path / "depth", tokenizer)
    assert difference(written, shallow, tokenizer) < CLOSE and fields(written.path)["deci.block_count"] == 2
    for name, model in {
        "attention": light_by(without(1, **WITHOUT_ATTENTION)),
        "ffn": light_by(without(1, neurons=())),
        "qwen2": light_by(without(2, **WITHOUT_ATTENTION), "qwen2"),
    }.items():
        written = save_gguf(model, tmp_path / name, tokenizer)
        assert difference(written, model, tokenizer) < CLOSE, name


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_data_types(dtype: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = light(budget={"heads": 0.0, "neurons": 1 / 3, "scope": "layerwise", "multiple_of": 32})
    written = save_gguf(model, tmp_path, tokenizer, dtype=dtype)
    assert set(written.matrices) == {dtype}
    assert difference(written, model, tokenizer) < (0.2 if dtype == "q8_0" else 2 * CLOSE)
    ragged = save_gguf(light(), tmp_path, tokenizer, dtype="q8_0", overwrite=True)
    assert set(ragged.matrices) == {"q8_0", "f16"}


# -- vocabulary --------------------------------------------------------------------------------------------------------


@telling("name", SPLITS, {"smollm", "qwen2"})
def test_texts_are_split_as_the_tokenizer_splits_them(name: str, tmp_path: Path) -> None:
    model, tokenizer = light(), tokenizer_of(SPLITS[name]())
    written = save_gguf(model, tmp_path, tokenizer)
    assert difference(written, model, tokenizer) < CLOSE
    assert fields(written.path)["tokenizer.ggml.pre"] == name


def test_pieces(tmp_path: Path) -> None:
    pieces = tokenizer_of_pieces()
    assert pieces.tokenize("she bought 日")[:2] == ["▁she", "▁bought"] and "<0xE6>" in pieces.tokenize("日")
    model = light(vocab_size=400)
    written = save_gguf(model, tmp_path, pieces)
    assert difference(written, model, pieces) < CLOSE
    found = fields(written.path)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_bos_token"]) == ("llama", True)
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


def test_what_a_file_says_of_its_tokens(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = fields(save_gguf(light(), tmp_path, tokenizer).path)
    assert found["general.name"] == "llama, pruned"
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (2, 3)
    assert found["tokenizer.ggml.add_bos_token"] is False
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320 and tokens[:5] == tokenizer.convert_ids_to_tokens(range(5))
    assert types[:5] == [3, 3, 3, 3, 1] and set(types[len(tokenizer) :]) == {5}


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        ({"model": {"type": "WordLevel"}}, "another kind"),
        ({"model": {"type": "BPE"}, "pre_tokenizer": None}, "another kind"),
        ({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Metaspace"}}, "another kind"),
        (
            {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "use_regex": False}},
            "not known to be supported by llama.cpp",
        ),
    ],
)
def test_other_tokenizers_are_refused(tokenizer: dict[str, Any], reason: str) -> None:
    assert reason in refusal(lambda: pre_tokenizer_name(tokenizer))


def test_tokens_that_the_model_has_no_row_for(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    last = len(tokenizer) - 1
    line = refusal(lambda: add_vocabulary(None, tokenizer, last, tmp_path))
    assert f"a token {last}, and the model has rows for {last}" in line


def test_pieces_of_another_kind_are_refused(tmp_path: Path) -> None:
    pieces = Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=True))
    unigram = PreTrainedTokenizerFast(tokenizer_object=pieces)
    assert "another kind" in refusal(lambda: add_vocabulary(None, unigram, 8, tmp_path))


# -- what llama.cpp cannot hold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: light("gemma"), "family gemma has no GGUF export; use llama, mistral, qwen2 and qwen3"),
        (lambda: light("qwen3"), "the head is not tied to the embeddings"),
        (lambda: light("qwen3", attention_bias=True, tie_word_embeddings=True), "is a bias, which llama.cpp's openelm"),
        (
            lambda: light_by(without(1, **WITHOUT_ATTENTION), "qwen3"),
            "block 1 has no attention, which llama.cpp",
        ),
        (lambda: light("llama-classifier"), "has another head"),
        (lambda: light(hidden_act="gelu"), "only silu in FFNs; this model has gelu"),
        (lambda: light(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "type dynamic"),
        (
            lambda: light_by(without(0, **WITHOUT_ATTENTION)),
            "which llama.cpp requires",
        ),
        (lambda: light_by(without(1, **WITHOUT_ATTENTION), "llama-bias"), "block 1 is only a bias"),
    ],
)
def test_other_models_are_refused(
    model: Callable[[], LightModel], reason: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert reason in refusal(lambda: save_gguf(model(), tmp_path / "out", tokenizer))
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert 'pip install "lightpeft[gguf]"' in refusal(lambda: save_gguf(light(), tmp_path / "out", tokenizer))


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_form_knows_every_data_type() -> None:
    """It is read without all that writes it."""
    assert ("auto", *EXPORTS["gguf"].dtypes) == get_args(GgufType)


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Workbench(tmp_path, "llama", "causal-lm")
    words = bench.config("words")
    pipeline.run(words)
    assert lightpeft("export", words.output, tmp_path / "out", "--form", "gguf") == 2
    assert "another kind" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "POSITIONS", 128)
        save_base(bench.base, "llama", tokenizer=tokenizer_of(None))
    run = bench.config("bytes", **{"data.max_length": 128})
    pipeline.run(run)
    assert lightpeft("export", run.output, tmp_path / "out", "--form", "gguf", "--dtype", "f16") == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "llama.cpp (matrices: 16 in f16)" in said
    assert lightpeft("export", run.output, tmp_path / "other", "--dtype", "f16") == 2
    assert "dtype f16 is not supported by form merged; leave it out" in capsys.readouterr().err
