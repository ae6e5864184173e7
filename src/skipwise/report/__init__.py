"""Tables, plots and one self-contained HTML page, made from Results and Analyses alone."""

from skipwise.report.page import write_report
from skipwise.report.table import table

__all__ = ["table", "write_report"]
