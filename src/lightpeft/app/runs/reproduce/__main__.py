"""The process of a cell that a Python function runs: `python -m lightpeft.app.runs.reproduce FOLDER FUNCTION JSON`.

The grid gives the function on the command line, because what lies in a folder says what to run to nobody.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightpeft.app.folders.run_folder import stored_config
from lightpeft.app.runs.reproduce.arms import Call
from lightpeft.errors import LightPeftError
from lightpeft.models.loading import quiet_libraries


def main(folder: str, function: str, arguments: str) -> None:
    """Run the cell whose config lies in a folder; what it raises for bad input is one line, as of the command."""
    quiet_libraries()
    try:
        Call(function, json.loads(arguments))(stored_config(Path(folder)))
    except LightPeftError as error:
        sys.exit(f"lightpeft: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
