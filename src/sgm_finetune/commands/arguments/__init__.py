"""The command line of each command: options in, checks of what needs no model, then the command itself."""
