"""Steelyard weighs human preferences: it measures, repairs and learns from noisy preference data."""

from __future__ import annotations

__version__ = "0.1.0"
