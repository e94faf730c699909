"""Reports: one self-contained HTML file a run."""

from trainkit.report._demo import demo_report as demo_report
