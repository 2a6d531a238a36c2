"""A report of one or several runs as a single HTML file, from the files in their work directories."""
