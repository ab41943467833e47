"""From a plan to an ordinary PEFT model whose groups share one parameter."""
