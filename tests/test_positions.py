"""Fewer positions: what fits computes what it did, to the last bit, and what does not is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import light_over
from tiny import ALL, DROPPED, TEXT, Maker, encoder, inputs_for, maker, refusal
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from workbench import Workbench, lightpeft, read, save_base, tokenizer_of_word_pieces

from lightpeft import cut_positions, export_model, load_light, load_merged, save_merged
from lightpeft.models.families import max_positions
from lightpeft.saved.merging import MERGED

LONGEST = 12
"""Tokens of a text that the models below are cut to."""
WITH_TABLES = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "gpt2", "opt"]
WITH_TABLES += ["opt-post-norm", "opt-no-bias", "gpt2-classifier", "bart", "mbart"]
WITHOUT = [name for name in ALL if name not in WITH_TABLES]
TABLES: dict[str, Maker] = {name: ALL[name] for name in WITH_TABLES}
TABLES["esm-absolute"] = encoder("Esm", pad_token_id=0, mask_token_id=3, position_embedding_type="absolute")
every_table = pytest.mark.parametrize("name", TABLES)


def model_of(make: Maker) -> Any:
    torch.manual_seed(0)
    return make().eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tokenizer_of_word_pieces()


@torch.no_grad()
def logits(model: Any, tokens: int = LONGEST, padding: str = "right") -> Tensor:
    found: Tensor = model(**inputs_for(model, padding, length=tokens)).logits
    return found


@every_table
@pytest.mark.parametrize("padding", ["left", "right"])
def test_texts_that_fit_give_the_same_bits(name: str, padding: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = model_of(TABLES[name])
    size, before = model.num_parameters(), logits(model, padding=padding)
    short = cut_positions(model, tokenizer, LONGEST)
    assert logits(model, padding=padding).equal(before)
    assert max_positions(model.config) == short.model_max_length == LONGEST < tokenizer.model_max_length
    assert model.num_parameters() < size


@every_table
def test_merged_models_have_short_tables(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether transformers alone loads them or not; a light adapter is over the whole base, cut or not."""
    light = light_over(model_of(TABLES[name]), **({} if name == "bert" else DROPPED))
    save_merged(light, tmp_path / "whole")
    short = cut_positions(light, tokenizer, LONGEST)
    save_merged(light, tmp_path / "short", short)
    whole, cut = (load_merged(tmp_path / each) for each in ("whole", "short"))
    assert logits(cut).equal(logits(whole))
    assert AutoTokenizer.from_pretrained(tmp_path / "short").model_max_length == LONGEST
    sizes = [(tmp_path / each / "model.safetensors").stat().st_size for each in ("whole", "short")]
    assert sizes[0] - sizes[1] > 0.9 * 4 * (whole.num_parameters() - cut.num_parameters()) > 0
    # and again: what was loaded is saved as what it is
    cut.save_pretrained(tmp_path / "again")
    assert logits(load_merged(tmp_path / "again")).equal(logits(whole))


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "opt", "bart"])
def test_what_is_longer_is_refused_in_one_line(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Live, loaded again, and where a decoder would write on."""
    light = light_over(model_of(TABLES[name]))
    cut_positions(light, tokenizer, LONGEST)
    save_merged(light, tmp_path)
    for model in (light, load_merged(tmp_path)):
        line = refusal(lambda model=model: logits(model, LONGEST + 1))  # type: ignore[misc]
        assert line.startswith(f"a text has {LONGEST + 1} tokens, and this model was left the positions of {LONGEST}; ")
        assert f"a text has {LONGEST + 1} tokens" in refusal(
            lambda model=model: model(inputs_for(model, length=LONGEST + 1)["input_ids"])  # type: ignore[misc]
        )
    if name in ("gpt2", "opt"):
        prompt = inputs_for(light, "left", generate=True, length=LONGEST - 3)
        options: dict[str, Any] = {**prompt, "do_sample": False, "eos_token_id": None}
        written = light.generate(**options, max_new_tokens=3)
        assert written.shape[1] == LONGEST
        assert f"a text has {LONGEST + 1} tokens" in refusal(lambda: light.generate(**options, max_new_tokens=5))


@pytest.mark.parametrize("name", WITHOUT)
def test_models_without_a_table_are_refused(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = model_of(ALL[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    line = refusal(lambda: cut_positions(model, tokenizer, LONGEST))
    assert line.endswith("has no table of learned positions that could be cut; keep all positions")
    assert all(before[key].equal(tensor) for key, tensor in model.state_dict().items())


def test_a_table_beside_relative_positions_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """The distances that such a model tells apart follow from the same setting."""
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": True}
    for more in ({"position_buckets": 8}, {}):
        model = model_of(encoder("DebertaV2", **relative, **more))
        assert "no table" in refusal(lambda model=model: cut_positions(model, tokenizer, 9))  # type: ignore[misc]


def test_positions_that_are_not_there(tokenizer: PreTrainedTokenizerBase) -> None:
    """RoBERTa's table has 512 rows, of which the first two are of padding and of nothing."""
    model = model_of(TABLES["roberta"])
    line = "the model has 510 positions, and {} are to stay; give 1 to 510"
    assert refusal(lambda: cut_positions(model, tokenizer, 511)) == line.format(511)
    assert refusal(lambda: cut_positions(model, tokenizer, 0)) == line.format(0)


def test_all_positions_and_fewer_and_fewer(tokenizer: PreTrainedTokenizerBase) -> None:
    model = model_of(TABLES["roberta"])
    before, rows = logits(model, 9), []
    for tokens in (510, 20, 9):
        cut_positions(model, tokenizer, tokens)
        rows.append(model.roberta.embeddings.position_embeddings.num_embeddings)
        assert logits(model, 9).equal(before)
    assert rows == [512, 22, 11]
    assert "left the positions of 9;" in refusal(lambda: logits(model, 10))


def test_texts_are_told_from_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    """Many short rows, embedded or with a mask of fractions."""
    model = model_of(TABLES["bert"])
    cut_positions(model, tokenizer, LONGEST)
    ids = torch.randint(3, 60, (LONGEST + 5, LONGEST))
    expected = model(ids, attention_mask=torch.ones(ids.shape)).logits
    embedded = model.get_input_embeddings()(ids)
    assert model(inputs_embeds=embedded).logits.equal(expected)
    longer = torch.cat([embedded, embedded], 1)
    assert "a text has 24 tokens" in refusal(lambda: model(inputs_embeds=longer))


def test_several_texts_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    """Options come as one row of texts."""
    model = model_of(maker("BertConfig", "BertForMultipleChoice", TEXT))
    cut_positions(model, tokenizer, LONGEST)
    options = torch.randint(3, 60, (2, LONGEST + 1, LONGEST))
    assert model(input_ids=options).logits.shape == (2, LONGEST + 1)
    assert "a text has 13 tokens" in refusal(lambda: model(input_ids=torch.ones(1, 2, 13, dtype=torch.long)))


def test_an_adapter_of_a_cut_model_fits_the_whole_base(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    base = model_of(TABLES["bert"])
    base.save_pretrained(tmp_path / "base")
    cut_positions(base, tokenizer, LONGEST)
    light = light_over(base)
    light.save_pretrained(tmp_path / "light")
    again = load_light(tmp_path / "light", tmp_path / "base")
    assert logits(again).equal(logits(light))
    assert max_positions(again.config) == 512


def test_graphs_have_short_tables(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("onnxruntime")
    light = light_over(model_of(TABLES["bert"]))
    short = cut_positions(light, tokenizer, LONGEST)
    written = export_model(light, tmp_path, "onnx", short)
    assert written.agreement is not None and written.agreement.difference < 1e-4


# -- on the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bench = Workbench(tmp_path_factory.mktemp("positions"))
    assert lightpeft("run", "--config", bench.yaml(**{"data.max_length": 16})) == 0
    return bench.folder / "run"


def test_a_run_is_exported_with_the_positions_of_its_task(home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("good words and more\n" * 3 + "word " * 60 + "\n")
    for name, options in {"whole": (), "short": ("--positions", "task"), "shorter": ("--positions", 20)}.items():
        assert lightpeft("export", home, tmp_path / name, *options) == 0
        assert lightpeft("predict", tmp_path / name, rows, "--output", tmp_path / f"{name}.csv") == 0
    config = [read(tmp_path / name / "config.json") for name in ("short", "shorter")]
    assert [each.get("max_position_embeddings") or positions(each) for each in config] == [16, 20]
    assert len({(tmp_path / f"{name}.csv").read_text() for name in ("whole", "short", "shorter")}) == 1
    assert read(tmp_path / "short" / MERGED)["positions"] == 16
    assert read(tmp_path / "whole" / MERGED)["positions"] is None


def positions(config: dict[str, Any]) -> int:
    """In a config that only lightpeft reads: the family's keys lie one level deeper."""
    (inner,) = (value for value in config.values() if isinstance(value, dict) and "max_position_embeddings" in value)
    return int(inner["max_position_embeddings"])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--positions", 4000), "and 4000 are to stay; give 1 to 40"),
        (("--positions", "task", "--form", "peft"), "the form peft is over the whole base; leave --positions out"),
        (("--positions", "few"), "--positions is 'few'; it must be a whole number or one of task"),
    ],
)
def test_what_cannot_be_exported(
    home: Path, options: tuple[Any, ...], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lightpeft("export", home, tmp_path / "merged", *options) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_does_not_say_how_long_texts_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    save_base(tmp_path / "base", "bert", tokenizer=tokenizer)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    light_over(base).save_pretrained(tmp_path / "light")
    assert lightpeft("export", tmp_path / "light", tmp_path / "merged", "--positions", "task") == 2
    assert "does not say how long its texts are; give --positions a number" in capsys.readouterr().err
    assert lightpeft("export", tmp_path / "light", tmp_path / "merged", "--positions", 9) == 0
