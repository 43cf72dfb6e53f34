"""`lightpeft check`: what a run needs, stage by stage, before anything of its model is loaded."""

from lightpeft.app.runs.checking.needs import Check, Need, check

__all__ = ["Check", "Need", "check"]
