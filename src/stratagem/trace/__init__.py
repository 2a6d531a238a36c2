"""Traces: what a training computed in each optimizer step, and where two trainings begin to differ.

``record`` records a trace of any training loop, and ``compare`` finds the first difference between two traces and the part of the
step in which it arises.
"""

from stratagem.trace.comparison import AnyTolerances, Comparison, Difference, Tolerances, compare
from stratagem.trace.format import FORMAT, SECTIONS, VERSION, Group, Part, RankStep, RankTrace, Trace
from stratagem.trace.reader import read_trace
from stratagem.trace.recorder import Recording, record
from stratagem.trace.values import Value
from stratagem.trace.writer import FULL_LIMIT, TraceWriter

__all__ = [
    "AnyTolerances",
    "Comparison",
    "Difference",
    "FORMAT",
    "FULL_LIMIT",
    "Group",
    "Part",
    "RankStep",
    "RankTrace",
    "Recording",
    "SECTIONS",
    "Tolerances",
    "Trace",
    "TraceWriter",
    "VERSION",
    "Value",
    "compare",
    "read_trace",
    "record",
]
