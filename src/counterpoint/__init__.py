"""Counterpoint aligns, contrasts and distils representations of any modality."""

__version__ = "0.1.0"
