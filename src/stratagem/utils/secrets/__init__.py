"""Recognize secrets by name and value, and mask them in everything that is displayed or saved."""
