"""Reports: one self-contained HTML file for a run, or for several side by side."""

from trainkit.report._run import Run as Run
from trainkit.report._run import environment as environment
from trainkit.report._sections import report as report
from trainkit.report._sections import summary as summary
