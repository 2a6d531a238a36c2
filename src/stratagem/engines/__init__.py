"""Engines of others as strategies; each is loaded when it is asked for."""
