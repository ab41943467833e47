"""The parts of training.step=fast (docs/method.md section 8)."""
