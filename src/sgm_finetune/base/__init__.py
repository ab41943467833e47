"""What every room stands on: configuration, errors, files, memory, devices, processes, the console."""
