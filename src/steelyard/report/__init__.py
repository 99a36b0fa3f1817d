"""Run folders to one self-contained HTML page. Imports no torch."""

from __future__ import annotations

from steelyard.report.page import build_report

__all__ = ["build_report"]
