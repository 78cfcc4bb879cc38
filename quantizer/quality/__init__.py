"""How good a file is: its weights beside those of another, and what an error in them does to the model's output."""
