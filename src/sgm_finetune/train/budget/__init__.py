"""What a run needs: the memory, disk space and time predicted before it begins."""
