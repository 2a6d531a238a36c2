"""Faults that are injected into saves one at a time, with the conditions that must hold after each."""
