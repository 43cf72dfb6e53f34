"""`lightpeft` as one of several processes, of which the last is lost as a machine would be: `STEP OPTIONS...`.

At step -1 none is.
"""

from __future__ import annotations

import os
import signal
import sys

from fsdp_on_cpus import shard_on_cpus
from lights import few_examples_are_enough
from workbench import at_step, lightpeft, signalling

if __name__ == "__main__":
    few_examples_are_enough()
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        at_step(int(sys.argv[1]), signalling(signal.SIGKILL))()
    shard_on_cpus()
    sys.exit(lightpeft(*sys.argv[2:]))
