"""The verbs of the command line, one object each."""

from lightpeft.cli.verbs.bench import BENCH
from lightpeft.cli.verbs.check import CHECK
from lightpeft.cli.verbs.evaluate import EVALUATE
from lightpeft.cli.verbs.export import EXPORT
from lightpeft.cli.verbs.inspect import INSPECT
from lightpeft.cli.verbs.predict import PREDICT
from lightpeft.cli.verbs.report import REPORT
from lightpeft.cli.verbs.reproduce import REPRODUCE
from lightpeft.cli.verbs.stages import ESTIMATE, PLAN, PRUNE, RUN, TRAIN
from lightpeft.cli.verbs.verb import Verb

VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (RUN, CHECK, ESTIMATE, PLAN, PRUNE, TRAIN, EVALUATE, BENCH, PREDICT, EXPORT, INSPECT, REPORT, REPRODUCE)
}
"""Name -> verb, in the order of help."""

__all__ = ["VERBS", "Verb"]
