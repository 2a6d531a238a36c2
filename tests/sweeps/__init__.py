"""Faults that are injected one after the other into savings, with what must hold after each."""
