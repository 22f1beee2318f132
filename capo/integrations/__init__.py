"""Adapters for other trainers, one file each; none is imported by ``import capo``."""
