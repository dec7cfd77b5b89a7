"""The report of one run: Markdown, HTML, JSON and plots, all from one Analysis."""

from mtc.report.comparison import write_comparison
from mtc.report.write import write_report

__all__ = ["write_comparison", "write_report"]
