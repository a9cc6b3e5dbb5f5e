"""report.json -> a page to look at: one HTML file without a network, one run or several compared.

Jinja2 and plotly are optional (the extra "report"): without them everything else goes on. Nothing
here knows a tensor; a page can be made again from report.json alone.
"""

from __future__ import annotations

from .facts import Report, parse_report, read_report
from .render import HOW_TO_GET_IT, available, render_comparison, render_page

__all__ = [
    "HOW_TO_GET_IT",
    "Report",
    "available",
    "parse_report",
    "read_report",
    "render_comparison",
    "render_page",
]
