"""`lightpeft check`: memory and computation of each stage of a run, before its model is loaded."""

from lightpeft.app.runs.checking.needs import Check, Need, check

__all__ = ["Check", "Need", "check"]
