"""The command-line interface: its commands, their output, and the launchers that start several processes."""
