"""Helpers shared by tests of several folders: process groups, small runs, fault injection."""
