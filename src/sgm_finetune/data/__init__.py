"""Data: named sources and files in, three disjoint splits and encoded sequences out."""
