"""What is measured: the scan of the weights, the probe of the gradients."""
