"""The report of a run: one self-contained HTML page and the charts in it as PNG files."""

from xopd.report.page import write_report

__all__ = ["write_report"]
