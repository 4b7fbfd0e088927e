"""Experts as one vector and one packed bit per weight each: `compress` makes them, `restore` gives any expert back."""

from __future__ import annotations

from .compress import CompressReport, compress
from .restore import restore

__all__ = ["CompressReport", "compress", "restore"]
