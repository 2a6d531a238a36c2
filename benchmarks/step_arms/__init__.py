"""The same training jobs, written by hand and with several training engines."""
