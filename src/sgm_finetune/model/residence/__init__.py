"""A frozen base that is elsewhere: on disk, or in the host's memory; and which block of it is where it computes."""
