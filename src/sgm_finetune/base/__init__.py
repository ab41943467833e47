"""The base of every other room: configuration, errors, files, memory, devices, processes, the console."""
