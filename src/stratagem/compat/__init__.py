"""Interfaces of other engines, implemented with this package. Nothing else in the package imports this folder."""
