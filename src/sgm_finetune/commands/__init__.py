"""One file a command; cli.py lists the commands, and arguments/ reads the command line of each."""
