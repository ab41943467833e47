"""A model as it lies in its files and as torch holds it: folders, loading, matrices and their names."""
