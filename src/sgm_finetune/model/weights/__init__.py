"""Weight matrices read from a model's files, tensor by tensor."""
