"""The parts of training.step=fast, which computes a step with fewer copies (docs/method.md section 8)."""
