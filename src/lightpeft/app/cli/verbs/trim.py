"""`lightpeft trim`."""

from __future__ import annotations

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.verbs.predict import ALLOW_PICKLE
from lightpeft.app.cli.verbs.verb import Verb
from lightpeft.errors import require


def _trim(model: str, output: str, data: str | None = None, text: str | None = None, **switches: bool) -> None:
    from lightpeft.app.cli.tables import trim_table
    from lightpeft.app.exports.trimming import trim

    require(data is not None, "trim needs texts with the tokens to keep; set --data rows.csv")
    assert data is not None
    trimmed = trim(model, output, data, text, **switches)
    screen.print(trim_table(trimmed))
    screen.warn([f"{model} has no weights for {name}, which are random in {output}" for name in trimmed.untrained])
    screen.say(f"{output} holds the model and its tokenizer, for transformers to load")


TRIM = Verb(
    "trim",
    "Reduce the vocabulary of a transformers model to the tokens of some texts, without a run.",
    _trim,
    options=(
        Option("model", "Folder of a transformers model, or its name on the hub."),
        Option("output", "Where it goes: a new folder."),
        Option(
            "--data",
            "Texts whose tokens stay: text lines (.txt), a table (.csv, .tsv, .json, .jsonl, .parquet), or the name of "
            "a data set on the hub.",
        ),
        Option("--text --data.columns.text", "Column with the texts (default: every text of a row)."),
        ALLOW_PICKLE,
    ),
)
