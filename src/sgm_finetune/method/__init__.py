"""Pure functions of tensors and plain data; each file is one section of docs/method.md."""
