"""Where the wall time of a run goes: a clock of phases, its records, and the account over all sessions of a run."""
