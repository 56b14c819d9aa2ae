"""Pages that show what was found: plain data, gathered from a run, drawn as one self-contained HTML file."""

from pyinf.report.collect import collect
from pyinf.report.html import render_html, write_html
from pyinf.report.schema import ExampleReport, Histogram, QueryReport, ReportData, Table

__all__ = [
    "ExampleReport",
    "Histogram",
    "QueryReport",
    "ReportData",
    "Table",
    "collect",
    "render_html",
    "write_html",
]
