"""Data: reads named sources and files, makes three disjoint splits and encodes them as token sequences."""
