"""A user program that calls MPI itself: it sums up the ranks, then trains."""

import sys
from pathlib import Path

from mpi4py import MPI

from stratagem.cli.main import main

world = MPI.COMM_WORLD
total = world.allreduce(world.rank)
folder = Path("run")
folder.mkdir(exist_ok=True)
(folder / f"mpi_{world.rank}").write_text(f"{world.rank} of {world.size}, sum {total}")
main(sys.argv[1:])
