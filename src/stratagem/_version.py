"""The version, in a separate file, so that building the package does not import other modules."""

__version__ = "0.2.0"
