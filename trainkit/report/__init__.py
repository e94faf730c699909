"""Reports: one self-contained HTML file for a run, or for several side by side."""

from trainkit.report._frontier import frontier_page as frontier_page
from trainkit.report._network import network_page as network_page
from trainkit.report._page import live_page as live_page
from trainkit.report._run import Run as Run
from trainkit.report._run import environment as environment
from trainkit.report._sections import report as report
from trainkit.report._sections import summary as summary
