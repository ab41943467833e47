"""One file a command; cli.py reads the arguments."""
