"""From a plan to an ordinary PEFT model, in which the layers of a group share one parameter."""
