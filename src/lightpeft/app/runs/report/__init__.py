"""`lightpeft report`: one page about runs, made of what lies in their folders: read, drawn, set."""

from lightpeft.app.runs.report.page import page, write_report

__all__ = ["page", "write_report"]
