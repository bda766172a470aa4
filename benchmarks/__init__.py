"""Measured speed and published experiments; nothing here is imported by the package."""
