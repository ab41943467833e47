"""What a run needs, predicted before it starts, and how it is made to fit."""
