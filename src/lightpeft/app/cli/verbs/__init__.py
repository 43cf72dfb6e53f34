"""The verbs of the command line, one object each."""

from lightpeft.app.cli.verbs.bench import BENCH
from lightpeft.app.cli.verbs.check import CHECK
from lightpeft.app.cli.verbs.demo import DEMO
from lightpeft.app.cli.verbs.evaluate import EVALUATE
from lightpeft.app.cli.verbs.export import EXPORT
from lightpeft.app.cli.verbs.inspect import INSPECT
from lightpeft.app.cli.verbs.predict import PREDICT
from lightpeft.app.cli.verbs.report import REPORT
from lightpeft.app.cli.verbs.reproduce import REPRODUCE
from lightpeft.app.cli.verbs.stages import ESTIMATE, PLAN, PRUNE, RUN, TRAIN
from lightpeft.app.cli.verbs.trim import TRIM
from lightpeft.app.cli.verbs.verb import Verb

VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        RUN,
        CHECK,
        ESTIMATE,
        PLAN,
        PRUNE,
        TRAIN,
        EVALUATE,
        BENCH,
        PREDICT,
        EXPORT,
        TRIM,
        INSPECT,
        REPORT,
        REPRODUCE,
        DEMO,
    )
}
"""Name -> verb, in the order of help."""

__all__ = ["VERBS", "Verb"]
