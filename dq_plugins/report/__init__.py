"""Results as a table, as plots, and as one self-contained HTML page."""

from dq_plugins.report.page import Page
from dq_plugins.report.table import Table

__all__ = ["Page", "Table"]
