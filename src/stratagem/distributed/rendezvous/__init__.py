"""How the processes of a run find each other and form the process group."""
