"""Pages: one self-contained HTML file per finished folder, readable from disk without any network."""

from pharmacist.report.benchmark_page import render_benchmark
from pharmacist.report.html import render_demo, render_ranking


__all__ = ["render_benchmark", "render_demo", "render_ranking"]
