"""A model in its files and in memory: folders, loading, matrices and their names."""
